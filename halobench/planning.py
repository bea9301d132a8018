"""The dry run behind `halobench plan`: everything that follows from shapes alone, on the meta device."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from halobench.assets import SHAPES
from halobench.config import to_dict
from halobench.models import resolve
from halobench.recipe import Recipe

if TYPE_CHECKING:
    from transformers import PretrainedConfig

ASSUMED_FLOPS = (
    300e12  # what a well-fed H200 sustains in bf16 training; an estimate, said to be one wherever it is shown
)


@dataclass(frozen=True, kw_only=True)
class LayerRow:
    """One layer of the plan; copied and new are parameters of its token mixer."""

    layer: int
    becomes: str
    parameters: int
    copied: int
    new: int


@dataclass(frozen=True, kw_only=True)
class MemoryRow:
    """Cache bytes at one context length: the teacher's KV, the hybrid's KV and its fixed-size state."""

    length: int
    teacher: int
    kv: int
    state: int


@dataclass(frozen=True, kw_only=True)
class Drawn:
    """The whole dry run. chosen: the layers were given; otherwise they are evenly spaced for the sake of the table."""

    layers: list[LayerRow]
    memory: list[MemoryRow]
    teacher_parameters: int
    hybrid_parameters: int
    stages: list[tuple[str, int, float]]
    chosen: bool

    def to_json(self) -> dict[str, Any]:
        """Plain data."""
        return to_dict(self)


def teacher_config(teacher: str) -> PretrainedConfig:
    """The configuration of a shape that ships with the package, a model folder or a hub name."""
    from halobench.surgery.checkpoint import load_config

    shape = SHAPES / f"{teacher}.json"
    return load_config(shape if shape.exists() else Path(resolve(teacher)))


def draw_up(teacher: str, recipe: Recipe, given: tuple[int, ...] | None, lengths: list[int]) -> Drawn:
    """What the recipe would make of the teacher. No weights are read."""
    import torch
    from transformers import AutoModelForCausalLM

    from halobench.surgery import SurgeryPlan, transplant

    config = teacher_config(teacher)
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
        plan = SurgeryPlan.for_model(
            config,
            mixer=recipe.mixer,
            keep=list(given) if given else recipe.kept_count(config.num_hidden_layers),
            mixer_options=recipe.mixer_options,
            softmax_options={**recipe.softmax_options, "rope": not recipe.hype},
        )
        student = transplant(model, plan)
    mixers = student.mixer_modules()
    rows = []
    for layer, layer_plan in enumerate(plan.layers):
        copied = sum(p.numel() for p in mixers[layer].copied_parameters())
        new = sum(p.numel() for p in mixers[layer].new_parameters())
        rows.append(LayerRow(layer=layer, becomes=layer_plan.mixer, parameters=copied + new, copied=copied, new=new))
    heads = getattr(config, "num_key_value_heads", config.num_attention_heads)
    width = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    per_token = 2 * heads * width * 2 * config.num_hidden_layers
    memory = [
        MemoryRow(
            length=length,
            teacher=per_token * length,
            kv=sum(m.state_bytes(1, length, 2) for i, m in mixers.items() if i in plan.kept),
            state=sum(m.state_bytes(1, length, 2) for i, m in mixers.items() if i not in plan.kept),
        )
        for length in lengths
    ]
    return Drawn(
        layers=rows,
        memory=memory,
        teacher_parameters=_count(model),
        hybrid_parameters=_count(student),
        stages=_stages(recipe, _count(model), sum(r.parameters for r in rows), _count(student)),
        chosen=given is not None,
    )


def _count(module: Any) -> int:
    return sum(p.numel() for p in module.parameters())


def _stages(recipe: Recipe, teacher: int, mixers: int, student: int) -> list[tuple[str, int, float]]:
    """(stage, tokens, hours): 2 operations a parameter forward, 6 forward and backward."""
    per_token = {"align": 2 * teacher + 6 * mixers, "distil": 2 * teacher + 6 * student, "finetune": 6 * student}
    budget = {"align": recipe.align.tokens, "distil": recipe.distil.tokens, "finetune": recipe.finetune.tokens}
    return [(stage, budget[stage], budget[stage] * cost / ASSUMED_FLOPS / 3600) for stage, cost in per_token.items()]
