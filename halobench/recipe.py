"""A recipe: one YAML file that says everything a conversion does, from the teacher to the finished hybrid.

A recipe may build on another: `extends: halo-qwen3-1.7b` (a shipped recipe) or `extends: mine.yaml` (a file beside it)
takes over every field but name and summary. Tables are merged field by field, lists and values replace the other's, and
null takes what the other has away.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field, replace
from importlib.resources import files
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from halobench.config import apply_overrides, from_dict, read_yaml
from halobench.errors import UserError, unknown_name
from halobench.kernels.chunked_loss import SoftTargets
from halobench.surgery.loop import LoopConfig
from halobench.surgery.plan import kept_layers
from halobench.units import format_count

if TYPE_CHECKING:
    from transformers import PretrainedConfig

    from halobench.surgery.plan import SurgeryPlan
    from halobench.surgery.stages.distil import Distillation

STAGES = ("align", "select", "distil", "finetune", "scale")
ITEM_TOKENS = 160  # of a commonsense item, its continuations included, for what a selection will cost


@dataclass(frozen=True, kw_only=True)
class AlignConfig(LoopConfig):
    """Stage 1. relative: errors divided by the power of the teacher's output in that layer (see Alignment)."""

    relative: bool = False


@dataclass(frozen=True, kw_only=True)
class DistilConfig(LoopConfig):
    """Stage 2, whose loss is (1 - ce_share) T^2 KL at logits / T + ce_share CE; see Distillation.

    top_k: how many of the teacher's likeliest tokens the KL tells apart; null is the whole vocabulary, as in the paper.
    """

    temperature: float = 1.0
    ce_share: float = 0.0
    top_k: int | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        SoftTargets(temperature=self.temperature, top_k=self.top_k, ce_share=self.ce_share)

    def objective(self, student: Any, teacher: Any, name: str = "distil", *, kernels: str = "auto") -> Distillation:
        """What the stage minimises. The loss has no form of fla's: where that is asked for it picks its own."""
        from halobench.surgery.stages.distil import Distillation

        return Distillation(
            student, teacher, name, temperature=self.temperature, ce_share=self.ce_share, top_k=self.top_k,
            backend="auto" if kernels == "fla" else kernels,
        )  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class SelectConfig:
    """The evidence for layer selection.

    length: of the recall prompts, in tokens. haystacks and items: samples per layer. kl_sequences: for kl-ls.
    restore_tokens: kl-ls re-distils each candidate for this many tokens (0: no candidate can be).
    unit_tokens: of the samples that pass through all layers together; their hidden states are held meanwhile.
    recall_metric, csr_metric: what a selector ranks by; accuracy saturates on small models, likelihoods do not.
    """

    length: int
    haystacks: int
    items: int
    kl_sequences: int
    kl_length: int
    restore_tokens: int = 0
    unit_tokens: int = 16_384
    recall_metric: Literal["answer_logprob", "accuracy"] = "answer_logprob"
    csr_metric: Literal["margin", "acc", "acc_norm"] = "margin"

    def __post_init__(self) -> None:
        for name in ("haystacks", "items", "kl_sequences", "kl_length", "unit_tokens"):
            if getattr(self, name) < 1:
                raise UserError(f"selection.{name} is {getattr(self, name)}; it must be at least 1")


@dataclass(frozen=True, kw_only=True)
class ScaleConfig:
    """Search for a in s_t = log_a(t + a), the scaling of NoPE queries by position, on long held-out documents.

    candidates: all are tried; None is no scaling. lengths: in tokens; the mean over them decides. sequences: at each
    length. refine: how many further values are tried around the best.
    """

    candidates: list[float | None]
    lengths: list[int]
    sequences: int
    refine: int = 0

    def __post_init__(self) -> None:
        bases = [value for value in self.candidates if value is not None]
        if not self.candidates or any(not 1 < value < math.inf for value in bases):
            raise UserError(
                f"scale.candidates is {self.candidates}; give null or numbers above 1, bases of a logarithm"
            )
        if not self.lengths or min(self.lengths) < 2 or self.sequences < 1 or self.refine < 0:
            raise UserError(
                "scale needs lengths of at least 2 tokens, a sequence or more of each, and refine from 0 on"
            )


@dataclass(frozen=True, kw_only=True)
class TokenBudget:
    """Tokens by stage. select: what the recipe's selector reads and trains on, estimated before anything runs."""

    align: int
    select: int
    distil: int
    finetune: int

    @property
    def training(self) -> int:
        """The three stages that make the student, selection left out."""
        return self.align + self.distil + self.finetune

    @property
    def total(self) -> int:
        """All of it."""
        return self.training + self.select

    def __str__(self) -> str:
        parts = {"align": self.align, "select": self.select, "distil": self.distil, "finetune": self.finetune}
        sum_ = " + ".join(f"{name} {format_count(tokens)}" for name, tokens in parts.items() if tokens)
        return f"{sum_} = {format_count(self.total)} tokens"


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """See the module. `keep` is a number of layers or, below 1, a share of them (rounded down, as in the paper).

    summary: what it is, in a line. teacher_layers: of the teacher it is sized for. epochs: how often the text may be
    read. selector_options: by a selector's name, its options.
    """

    name: str
    mixer: str
    keep: int | float
    select: str
    data: str
    align: AlignConfig
    selection: SelectConfig
    distil: DistilConfig
    finetune: LoopConfig
    scale: ScaleConfig | None = None
    summary: str = ""
    teacher_layers: int | None = None
    epochs: int = 1
    seed: int = 0
    hype: bool = True
    mixer_options: dict[str, Any] = field(default_factory=dict)
    softmax_options: dict[str, Any] = field(default_factory=dict)
    selector_options: dict[str, dict[str, Any]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        for stage, config in (("align", self.align), ("distil", self.distil)):
            if config.tokens < 1:
                raise UserError(f"{stage}.tokens is {config.tokens}; of the stages only finetune may have no budget")
        if "rope" in self.softmax_options:
            raise UserError("softmax_options.rope is set by `hype`: with HyPE softmax layers have no positions")
        if not 0 <= self.seed < 2**63:
            raise UserError(f"seed is {self.seed}; it must be from 0 to 2^63")

    def kept_count(self, layers: int) -> int:
        """Softmax layers that stay in a model of `layers`."""
        return len(kept_layers(self.keep, layers))

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

    def tokens(self, layers: int | None = None) -> TokenBudget:
        """The budget of each stage for a teacher of `layers`, by default those of the teacher it is sized for."""
        from halobench.surgery.selection import Prices, make_selector

        layers = self.teacher_layers if layers is None else layers
        if layers is None:
            raise UserError(f"recipe {self.name} does not say `teacher_layers`, on which the cost of selection depends")
        given = self.selection
        prices = Prices(
            layers=layers,
            keep=self.kept_count(layers),
            recall=2 * given.haystacks * given.length,
            csr=given.items * ITEM_TOKENS,
            text=given.kl_sequences * given.kl_length,
            restore=replace(self.distil, tokens=given.restore_tokens).trained_tokens if given.restore_tokens else 0,
            prompt=given.length,
        )
        return TokenBudget(
            align=self.align.tokens,
            select=make_selector(self.select, self.selector_options.get(self.select)).price(prices),
            distil=self.distil.tokens,
            finetune=self.finetune.tokens,
        )


def recipe_names() -> list[str]:
    """The recipes shipped with the package."""
    names = (Path(p.name).stem for p in files("halobench").joinpath("recipes").iterdir() if p.name.endswith(".yaml"))
    return sorted(n for n in names if not n.startswith("teacher-"))


def load_recipe(name: str, overrides: list[str]) -> Recipe:
    """The recipe called `name`, or in the file `name`, with the overrides of the command line."""
    path = _find(name, Path())
    return from_dict(Recipe, apply_overrides(_read(path, ()), overrides), f"recipe {path.name}")


def _find(name: str, beside: Path) -> Path:
    """The file of a shipped recipe, or the file `name`, relative to the folder `beside`."""
    if Path(name).suffix in (".yaml", ".yml"):
        return beside / Path(name).expanduser()
    if name not in recipe_names():
        raise unknown_name("recipe", name, [*recipe_names(), "a .yaml file"])
    return Path(str(files("halobench").joinpath("recipes", f"{name}.yaml")))


def _read(path: Path, above: tuple[Path, ...]) -> dict[str, Any]:
    """The fields in a recipe's file, with those of the recipes it extends; `above`: the files that extend this one."""
    chain = (*above, path.resolve())
    if path.resolve() in above:
        raise UserError(f"recipes extend one another in a circle: {' -> '.join(p.name for p in chain)}; take one out")
    data = read_yaml(path)
    if not isinstance(data, dict):
        raise UserError(f"recipe {path} must be a table of fields, got {type(data).__name__}")
    if "extends" not in data:
        return data
    parent = data.pop("extends")
    if not isinstance(parent, str):
        raise UserError(f"extends in {path.name} must name one recipe or one .yaml file, got {parent!r}")
    base = _read(_find(parent, path.parent), chain)
    return _merge({key: value for key, value in base.items() if key not in ("name", "summary")}, data)


def _merge(base: dict[str, Any], changes: dict[str, Any]) -> dict[str, Any]:
    """`base` with `changes` in it; tables are merged in turn, and None removes."""
    merged = {key: value for key, value in base.items() if changes.get(key, value) is not None}
    for key, value in changes.items():
        if isinstance(value, dict):
            there = base.get(key)
            merged[key] = _merge(there if isinstance(there, dict) else {}, value)
        elif value is not None:
            merged[key] = value
    return merged
