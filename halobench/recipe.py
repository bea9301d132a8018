"""A recipe: one YAML file that says everything a conversion does, from the teacher to the finished hybrid."""

from __future__ import annotations

from dataclasses import dataclass, field
from importlib.resources import files
from pathlib import Path
from typing import TYPE_CHECKING, Any

from halobench.config import apply_overrides, from_dict, read_yaml
from halobench.errors import UserError, unknown_name
from halobench.surgery.loop import LoopConfig

if TYPE_CHECKING:
    from transformers import PretrainedConfig

    from halobench.surgery.plan import SurgeryPlan

STAGES = ("align", "select", "distil", "finetune", "scale")


@dataclass(frozen=True, kw_only=True)
class AlignConfig(LoopConfig):
    """Stage 1. relative: errors divided by the power of the teacher's output in that layer (see Alignment)."""

    relative: bool = False


@dataclass(frozen=True, kw_only=True)
class SelectConfig:
    """The evidence for layer selection.

    length: of the recall prompts, in tokens. haystacks and items: samples per layer. kl_sequences: for kl-ls.
    restore_tokens: kl-ls re-distils each candidate for this many tokens (0: the aligned student as it is).
    recall_metric, csr_metric: what a selector ranks by; accuracy saturates on small models, likelihoods do not.
    """

    length: int
    haystacks: int
    items: int
    kl_sequences: int
    kl_length: int
    restore_tokens: int = 0
    recall_metric: str = "answer_logprob"
    csr_metric: str = "margin"


@dataclass(frozen=True, kw_only=True)
class ScaleConfig:
    """Search for a in s_t = log_a(t + a), the scaling of NoPE queries by position, on long training documents."""

    candidates: list[float]
    length: int
    sequences: int


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """See the module. `keep` is a number of layers or, below 1, a share of them (rounded down, as in the paper)."""

    name: str
    mixer: str
    keep: int | float
    select: str
    data: str
    align: AlignConfig
    selection: SelectConfig
    distil: LoopConfig
    finetune: LoopConfig
    scale: ScaleConfig | None = None
    seed: int = 0
    hype: bool = True
    mixer_options: dict[str, Any] = field(default_factory=dict)
    softmax_options: dict[str, Any] = field(default_factory=dict)

    def kept_count(self, layers: int) -> int:
        """Softmax layers that stay in a model of `layers`."""
        return self.keep if isinstance(self.keep, int) else int(self.keep * layers)

    def plan(self, config: PretrainedConfig, keep: int | float | list[int]) -> SurgeryPlan:
        """Which layer of a model of `config` becomes what when `keep` layers stay softmax.

        Raises:
            UserError: layers that are not there, options that do not exist, or a plan that converts nothing.
        """
        from halobench.surgery.plan import SurgeryPlan

        plan = SurgeryPlan.for_model(
            config,
            mixer=self.mixer,
            keep=keep,
            mixer_options=self.mixer_options,
            softmax_options={**self.softmax_options, "rope": not self.hype},
        )
        layers = len(plan.layers)
        if len(plan.kept) == layers:
            raise UserError(
                f"all {layers} layers would stay attention, which leaves nothing to convert; keep fewer layers, and "
                "use a recurrent mixer (see `halobench mixers`)"
            )
        if keep and not plan.kept:
            raise UserError(f"keep={keep} of {layers} layers is less than one; write --keep 1, or --keep 0 for none")
        return plan

    def tokens(self) -> int:
        """Training tokens of the whole recipe."""
        return self.align.tokens + self.distil.tokens + self.finetune.tokens


def recipe_names() -> list[str]:
    """The recipes shipped with the package."""
    names = (Path(p.name).stem for p in files("halobench").joinpath("recipes").iterdir() if p.name.endswith(".yaml"))
    return sorted(n for n in names if not n.startswith("teacher-"))


def load_recipe(name: str, overrides: list[str]) -> Recipe:
    """The recipe called `name`, or in the file `name`, with the overrides of the command line."""
    path = Path(name)
    if path.suffix not in (".yaml", ".yml"):
        if name not in recipe_names():
            raise unknown_name("recipe", name, [*recipe_names(), "a .yaml file"])
        path = Path(str(files("halobench").joinpath("recipes", f"{name}.yaml")))
    return from_dict(Recipe, apply_overrides(read_yaml(path), overrides), f"recipe {path.name}")
