"""The dry run behind `halobench plan`: everything that follows from shapes alone, on the meta device."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from difflib import get_close_matches
from pathlib import Path
from typing import TYPE_CHECKING, Any

from halobench.assets import SHAPES
from halobench.budget import Budget, Fit, fit
from halobench.config import to_dict
from halobench.costs import DecoderCosts, attention_costs, backbone_of, mixer_costs
from halobench.errors import UserError
from halobench.models import resolve
from halobench.recipe import Recipe, TokenBudget

if TYPE_CHECKING:
    from transformers import PretrainedConfig, PreTrainedModel

    from halobench.mixers.contract import Mixer
    from halobench.mixers.view import AttentionView
    from halobench.surgery.hybrid import HybridForCausalLM
    from halobench.surgery.loop import LoopConfig
    from halobench.surgery.plan import SurgeryPlan

ASSUMED_FLOPS = 300e12
ASSUMPTION = f"one H200 at {ASSUMED_FLOPS / 1e12:.0f} TFLOP/s (an estimate), backward counted as twice forward"


@dataclass(frozen=True, kw_only=True)
class LayerRow:
    """One layer. attention: the teacher's, in words. becomes: a mixer's name, or "keep" for the teacher's own.

    parameters: of the token mixer; copied of them start as the teacher's, new ones do not.
    """

    layer: int
    attention: str
    becomes: str
    parameters: int
    copied: int
    new: int


@dataclass(frozen=True, kw_only=True)
class MixerParts:
    """What one kind of mixer takes from the teacher and what it adds, by the names of its parts."""

    mixer: str
    label: str
    layers: list[int]
    copied: list[str]
    new: list[str]


@dataclass(frozen=True, kw_only=True)
class MemoryRow:
    """Cache bytes after `length` tokens, batch 1, bf16: the teacher's KV, the hybrid's KV, and its recurrent state."""

    length: int
    teacher: int
    kv: int
    state: int


@dataclass(frozen=True, kw_only=True)
class FlopsRow:
    """Floating-point operations at `length`: of decoding the next token, and of reading a prompt of that length."""

    length: int
    teacher_token: float
    hybrid_token: float
    teacher_prompt: float
    hybrid_prompt: float


@dataclass(frozen=True, kw_only=True)
class StageRow:
    """A training stage of the recipe; hours as `Drawn.assumption` says."""

    stage: str
    tokens: int
    hours: float


@dataclass(frozen=True, kw_only=True)
class Drawn:
    """The whole dry run; `halobench plan --json` prints these fields under these names.

    kept: the layers that stay softmax attention. chosen: they were named; otherwise they are evenly spaced for the sake
    of the tables, and the recipe's selector decides after alignment. mixers: one entry for each kind of mixer.
    teacher_active, hybrid_active: matrix elements that multiply one token (of experts only those visited, and not the
    embedding's look-up). budget: the answer to --budget, with the budget itself; null without one.
    """

    teacher: str
    recipe: str
    mixer: str
    kept: list[int]
    chosen: bool
    layers: list[LayerRow]
    mixers: list[MixerParts]
    teacher_parameters: int
    hybrid_parameters: int
    teacher_active: int
    hybrid_active: int
    memory: list[MemoryRow]
    flops: list[FlopsRow]
    stages: list[StageRow]
    tokens: TokenBudget
    assumption: str
    budget: Fit | None

    def to_json(self) -> dict[str, Any]:
        """Plain data."""
        return to_dict(self)


def shape_names() -> list[str]:
    """The teachers whose configurations ship with the package."""
    return sorted(path.stem for path in SHAPES.glob("*.json"))


def teacher_config(teacher: str) -> PretrainedConfig:
    """The configuration of a shape that ships with the package, a config file, a model folder or a hub name."""
    from halobench.surgery import HybridConfig
    from halobench.surgery.checkpoint import load_config

    given = Path(teacher).expanduser()
    if teacher in shape_names():
        config = load_config(SHAPES / f"{teacher}.json")
    elif given.suffix == ".json" and given.is_file():
        config = load_config(given)
    elif teacher == "tiny" or given.exists() or teacher.count("/") == 1:
        config = load_config(resolve(teacher))
    else:
        near = get_close_matches(teacher, shape_names(), n=1, cutoff=0.5)
        hint = f"did you mean {near[0]!r}? " if near else ""
        raise UserError(
            f"teacher {teacher!r} not found; {hint}give a model folder, its config.json, a hub name (owner/name), "
            f"`tiny`, or a shape: {', '.join(shape_names())}"
        )
    if isinstance(config, HybridConfig):
        raise UserError(f"teacher {teacher!r} is a hybrid already; plan for the model it was made from")
    return config


def draw_up(
    teacher: str, recipe: Recipe, given: tuple[int, ...] | None, lengths: list[int], budget: Budget | None = None
) -> Drawn:
    """What the recipe would make of the teacher. No weights are read.

    Args:
        teacher: what `teacher_config` takes.
        given: the layers to keep; otherwise the recipe's `keep` says how many, or the budget how many it allows.
        lengths: context lengths of the memory and FLOPs tables.

    Raises:
        UserError: the teacher is not one that can be converted, or the layers kept make no plan.
    """
    import torch
    from transformers import AutoModelForCausalLM

    from halobench.surgery import transplant
    from halobench.surgery.anatomy import describe

    config = teacher_config(teacher)
    views = describe(config)
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
        answer = None if budget is None else _fitting(budget, recipe, views)
        keep = answer.keep if answer is not None else (list(given) if given else recipe.keep)
        plan = recipe.plan(config, keep)
        student = transplant(model, plan)
    mixers = student.mixer_modules()
    before, after = _costs(model, student, views)
    return Drawn(
        teacher=teacher,
        recipe=recipe.name,
        mixer=recipe.mixer,
        kept=list(plan.kept),
        chosen=given is not None,
        layers=[_row(view, mixers.get(index)) for index, view in enumerate(views)],
        mixers=_parts(mixers, len(views)),
        teacher_parameters=_count(model),
        hybrid_parameters=_count(student),
        teacher_active=before.active,
        hybrid_active=after.active,
        memory=[_memory(length, before, after, plan) for length in lengths],
        flops=[_flops(length, before, after) for length in lengths],
        stages=_stages(recipe, before, after, plan),
        tokens=recipe.tokens(len(views)),
        assumption=ASSUMPTION,
        budget=answer,
    )


def attention_kind(view: AttentionView) -> str:
    """A layer's attention in words: "32 heads of 128, 8 KV, RoPE, QK-norm"."""
    words = [f"{view.num_heads} heads of {view.head_dim}"]
    if view.num_kv_heads != view.num_heads:
        words.append(f"{view.num_kv_heads} KV")
    turned = view.rotary_dim if view.rope else 0
    words.append("no RoPE" if not turned else "RoPE" if turned == view.head_dim else f"RoPE on {turned}")
    extras = {
        "QK-norm": view.q_norm is not None or view.k_norm is not None,
        "biases": any(b is not None for b in (view.q_bias, view.k_bias, view.v_bias, view.o_bias)),
        f"window {view.sliding_window}": view.sliding_window is not None,
        "soft-cap": view.soft_cap is not None,
        "clip": view.clip is not None,
        "sinks": view.sinks is not None,
    }
    return ", ".join([*words, *(word for word, there in extras.items() if there)])


def _fitting(budget: Budget, recipe: Recipe, views: list[AttentionView]) -> Fit:
    """The budget's answer: each layer is built both ways, for teachers whose layers differ."""
    from halobench.mixers import MIXERS
    from halobench.mixers.contract import build_mixer

    options = {**recipe.softmax_options, "rope": not recipe.hype}
    kv = [build_mixer(MIXERS.get("softmax"), view, options) for view in views]
    states = [build_mixer(MIXERS.get(recipe.mixer), view, recipe.mixer_options) for view in views]
    sizes = [[mixer_costs(mixer).cache(budget.length) for mixer in mixers] for mixers in (kv, states)]
    return fit(budget, *sizes)


def _costs(
    model: PreTrainedModel, student: HybridForCausalLM, views: list[AttentionView]
) -> tuple[DecoderCosts, DecoderCosts]:
    """Of the teacher and of the hybrid. A layer left untouched costs in both what its view says."""
    backbone = backbone_of(model, views)
    teacher = DecoderCosts(backbone=backbone, layers=[attention_costs(view) for view in views])
    mixers = student.mixer_modules()
    layers = [mixer_costs(mixers[i]) if i in mixers else layer for i, layer in enumerate(teacher.layers)]
    return teacher, DecoderCosts(backbone=backbone, layers=layers)


def _row(view: AttentionView, mixer: Mixer | None) -> LayerRow:
    if mixer is None:
        copied, new, becomes = view.parameters, 0, "keep"
    else:
        copied, new = (sum(p.numel() for p in own) for own in (mixer.copied_parameters(), mixer.new_parameters()))
        becomes = mixer.name
    return LayerRow(
        layer=view.layer_index,
        attention=attention_kind(view),
        becomes=becomes,
        parameters=copied + new,
        copied=copied,
        new=new,
    )


def _parts(mixers: dict[int, Mixer], layers: int) -> list[MixerParts]:
    """Each kind of mixer once; layers whose mixers hold other parts (a norm the teacher lacks there) are told apart."""
    found: dict[tuple[str, str, tuple[str, ...], tuple[str, ...]], list[int]] = {}
    for index in range(layers):
        if index not in mixers:
            found.setdefault(("keep", "the teacher's own attention", ("all",), ()), []).append(index)
            continue
        mixer = mixers[index]
        fresh = {id(parameter) for parameter in mixer.new_parameters()}
        named = [(name.split(".")[0], id(parameter) in fresh) for name, parameter in mixer.named_parameters()]
        copied, new = (tuple(dict.fromkeys(name for name, is_new in named if is_new == kind)) for kind in (False, True))
        found.setdefault((mixer.name, mixer.label, copied, new), []).append(index)
    return [
        MixerParts(mixer=name, label=label, layers=where, copied=list(copied), new=list(new))
        for (name, label, copied, new), where in found.items()
    ]


def _memory(length: int, teacher: DecoderCosts, hybrid: DecoderCosts, plan: SurgeryPlan) -> MemoryRow:
    others = [index for index in range(len(plan.layers)) if index not in plan.kept]
    return MemoryRow(
        length=length,
        teacher=teacher.cache(length),
        kv=hybrid.cache(length, plan.kept),
        state=hybrid.cache(length, others),
    )


def _flops(length: int, teacher: DecoderCosts, hybrid: DecoderCosts) -> FlopsRow:
    return FlopsRow(
        length=length,
        teacher_token=teacher.token(length),
        hybrid_token=hybrid.token(length),
        teacher_prompt=teacher.prompt(length),
        hybrid_prompt=hybrid.prompt(length),
    )


def _stages(recipe: Recipe, teacher: DecoderCosts, hybrid: DecoderCosts, plan: SurgeryPlan) -> list[StageRow]:
    """Alignment trains a recurrent mixer in every layer, the kept ones too, beside the teacher's own forward pass."""
    recurrent = [index for index in range(len(plan.layers)) if index not in plan.kept]
    share = len(plan.layers) / len(recurrent)
    per_token: dict[str, Callable[[int], float]] = {
        "align": lambda n: teacher.training_token(n) + 3 * share * hybrid.mixing_token(n, recurrent),
        "distil": lambda n: teacher.training_token(n) + 3 * hybrid.training_token(n),
        "finetune": lambda n: 3 * hybrid.training_token(n),
    }
    rows = []
    for stage, cost in per_token.items():
        config: LoopConfig = getattr(recipe, stage)
        flops = config.tokens * sum(cost(n) for n in config.lengths) / len(config.lengths)
        rows.append(StageRow(stage=stage, tokens=config.tokens, hours=flops / ASSUMED_FLOPS / 3600))
    return rows


def _count(model: Any) -> int:
    return sum(parameter.numel() for parameter in model.parameters())
