"""Models of known shapes with random weights: speed and memory do not depend on weights, so nothing is downloaded."""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from halobench.errors import UserError, unknown_name
from halobench.planning import shape_names, teacher_config
from halobench.records import ModelCard
from halobench.units import format_bytes

if TYPE_CHECKING:
    import torch
    from transformers import PretrainedConfig, PreTrainedModel

PREFIX = "preset:"
SEED = 0
NOTE = "random weights: speed and memory are those of the shape, and nothing else is meant by them"
_BLOCK = 1_000_003  # random numbers that fill every matrix, again and again; a prime, so that no two rows are alike
_SPREAD = 0.02


@dataclass(frozen=True, kw_only=True)
class ReleasedHybrid:
    """A HypeNet as released (arXiv 2601.22156): its teacher's shape, softmax layers and the base of their scaling.

    tied: whether the embedding is the output projection as well.
    """

    teacher: str
    kept: tuple[int, ...]
    scale_base: float
    tied: bool = True


RELEASED = {
    "hypenet-2b": ReleasedHybrid(teacher="qwen3-1.7b", kept=(2, 3, 6, 8, 9, 21, 25), scale_base=500.0),
    "hypenet-5b": ReleasedHybrid(teacher="qwen3-4b", kept=(0, 1, 7, 14, 15, 22, 24, 31, 33), scale_base=600.0),
    "hypenet-9b": ReleasedHybrid(teacher="qwen3-8b", kept=(1, 2, 4, 6, 7, 10, 24, 33, 34), scale_base=900.0),
}


def preset_names() -> list[str]:
    """Every shape that has a name."""
    return sorted([*shape_names(), *RELEASED])


def preset_of(name: str) -> str | None:
    """The preset that `name` stands for, or None: "preset:NAME", or NAME alone where no folder is called so.

    In place of NAME there may be a model's config.json, or the folder it is in.

    Raises:
        UserError: a preset by its prefix that there is not.
    """
    if not name.startswith(PREFIX):
        return name if name in preset_names() and not Path(name).exists() else None
    preset = name.removeprefix(PREFIX)
    if preset not in preset_names() and not Path(preset).expanduser().exists():
        raise unknown_name("preset", preset, [*preset_names(), "a config.json"])
    return preset


def preset_config(preset: str) -> PretrainedConfig:
    """The configuration of a preset, of a config.json or of a model folder; hybrids have a plan in it."""
    from halobench.surgery import HybridConfig, SurgeryPlan
    from halobench.surgery.checkpoint import load_config

    if preset in RELEASED:
        released = RELEASED[preset]
        source = teacher_config(released.teacher)
        source.tie_word_embeddings = released.tied
        scaled = {"logits_scale_base": released.scale_base}
        return HybridConfig.of(
            source, SurgeryPlan.for_model(source, "lightning", keep=list(released.kept), softmax_options=scaled)
        )
    return teacher_config(preset) if preset in shape_names() else load_config(Path(preset).expanduser())


def empty_preset(preset: str, dtype: torch.dtype) -> PreTrainedModel:
    """The model on the meta device: shapes alone."""
    import torch
    from transformers import AutoModelForCausalLM

    from halobench.surgery.anatomy import honour_caps

    with torch.device("meta"):
        model: Any = AutoModelForCausalLM.from_config(preset_config(preset), dtype=dtype)
    return honour_caps(model).eval()


def check_room(models: list[PreTrainedModel], names: list[str], device: torch.device) -> None:
    """Refuses models whose weights do not fit into what is free."""
    from halobench.tasks.machine import available_bytes

    needed = sum(parameter.nbytes for model in models for parameter in model.parameters())
    there = available_bytes(device)
    if needed > there:
        raise UserError(
            f"{' and '.join(names)}: the weights need {format_bytes(needed)}, and {format_bytes(there)} are free on "
            f"{device.type}; choose a smaller shape, or --dtype bf16"
        )


def fill(model: PreTrainedModel, device: torch.device) -> PreTrainedModel:
    """Puts a model from the meta device on `device`, with seeded random matrices, norms of ones and biases of zeros."""
    import torch

    from halobench.surgery.hybrid import HybridForCausalLM

    source: Any = model.backbone if isinstance(model, HybridForCausalLM) else model
    model.to_empty(device=device)
    model.tie_weights()
    source.tie_weights()
    for module in model.modules():
        if module._buffers:  # tables of RoPE: transformers knows how to make them anew
            source._init_weights(module)
    random = torch.randn(_BLOCK, generator=torch.Generator().manual_seed(SEED)) * _SPREAD
    random = random.to(device, model.dtype)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.ndim < 2:
                parameter.fill_(1.0 if name.endswith("weight") else 0.0)
                continue
            for part in parameter.view(-1).split(_BLOCK):
                part.copy_(random[: part.numel()])
    return model


def preset_card(preset: str, model: PreTrainedModel) -> ModelCard:
    """The card of a model with random weights: its name says so."""
    config: Any = model.config
    released = RELEASED.get(preset)
    named = preset if preset in preset_names() else Path(preset).resolve().name
    plan = config.surgery_plan() if config.model_type == "halobench_hybrid" else None
    softmax = [layer for layer in plan.layers if layer.mixer == "softmax"] if plan else []
    mixers = {layer.mixer for index, layer in enumerate(plan.layers) if index not in plan.kept} if plan else set()
    described = json.dumps(config.to_dict(), sort_keys=True, default=str)
    return ModelCard(
        name=f"{named} (random weights)",
        path=f"{PREFIX}{preset}",
        hash=hashlib.sha256(described.encode()).hexdigest()[:16],
        layers=config.num_hidden_layers,
        parameters=sum(parameter.numel() for parameter in model.parameters()),
        teacher=f"{released.teacher if released else named} (random weights)",
        mixer=", ".join(sorted(mixers)) or None,
        kept=list(plan.kept) if plan else None,
        positions="hype" if softmax and not any(layer.options["rope"] for layer in softmax) else "rope",
    )
