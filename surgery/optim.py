"""Optimisers and learning-rate schedules of the stages: AdamW as in the paper, Muon for the embedded models."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn

from halobench.errors import UserError
from halobench.surgery.anatomy import attention_modules
from halobench.surgery.parallel import like, whole

_IN: dict[str, Callable[[float], bool]] = {
    "from 0 on": lambda x: 0 <= x < math.inf,
    "above 0": lambda x: x > 0,
    "above 0 and at most 1": lambda x: 0 < x <= 1,
    "from 0 to below 1": lambda x: 0 <= x < 1,
}


@dataclass(frozen=True, kw_only=True)
class OptimConfig:
    """How a stage's parameters move.

    `rate` is AdamW's peak learning rate and `matrix_rate`, when given, hands every weight matrix but the embeddings to
    Muon (momentum with orthogonalised updates) at that rate. Rates follow one schedule: linear warm-up over
    `warmup_steps`, then `schedule` down to `final` times the peak. "wsd" holds the peak and decays over the last
    `decay` share of the stage. `rest_rate`, when given, is AdamW's for what is no token mixing (neither attention nor
    what took its place), as in KL-LS.
    """

    rate: float
    final: float = 0.01
    schedule: Literal["cosine", "constant", "wsd"] = "cosine"
    decay: float = 0.2
    warmup_steps: int = 50
    matrix_rate: float | None = None
    rest_rate: float | None = None
    beta1: float = 0.9
    beta2: float = 0.95
    weight_decay: float = 0.0
    clip: float = 1.0

    def __post_init__(self) -> None:
        if self.matrix_rate is not None and self.rest_rate is not None:
            raise UserError("optim has a matrix_rate (Muon) and a rest_rate (AdamW in two parts); give one of them")
        ranges = {
            "from 0 on": ("rate", "final", "warmup_steps", "matrix_rate", "rest_rate", "weight_decay"),
            "above 0": ("clip",),
            "above 0 and at most 1": ("decay",),
            "from 0 to below 1": ("beta1", "beta2"),
        }
        for allowed, names in ranges.items():
            for name in names:
                value = getattr(self, name)
                if value is not None and not _IN[allowed](value):
                    raise UserError(f"optim.{name} is {value}; it must be {allowed}")


def rate_factor(config: OptimConfig, step: int, steps: int) -> float:
    """The multiple of the peak rate at `step` (from 0) of `steps`."""
    if step < config.warmup_steps:
        return (step + 1) / config.warmup_steps
    if config.schedule == "constant":
        return 1.0
    if config.schedule == "wsd":
        start = steps * (1 - config.decay)
        share = max(0.0, (step - start) / max(steps - start, 1))
        return 1 - (1 - config.final) * share
    share = (step - config.warmup_steps) / max(steps - config.warmup_steps, 1)
    return config.final + (1 - config.final) * 0.5 * (1 + math.cos(math.pi * min(share, 1.0)))


def table_ids(module: nn.Module) -> frozenset[int]:
    """Ids of the parameters that are tables rather than maps: token embedding and unembedding, tied or not."""
    tables: list[nn.Module] = [m for m in module.modules() if isinstance(m, nn.Embedding)]
    head = getattr(module, "get_output_embeddings", lambda: None)()
    return frozenset(id(p) for m in [*tables, *([head] if head is not None else [])] for p in m.parameters())


def mixing_ids(module: nn.Module) -> frozenset[int]:
    """Ids of the parameters of a language model's attention and of the mixers in its place.

    Raises:
        UserError: the module is no decoder; then it has no rest that could have another rate.
    """
    model: Any = getattr(module, "backbone", module)
    if not hasattr(model, "get_decoder"):
        raise UserError("optim.rest_rate is for stages that train a whole model, not mixers alone; take it out")
    return frozenset(id(p) for part in attention_modules(model).values() for p in part.parameters())


class Optimizer:
    """AdamW, with Muon for the matrices when the configuration asks for it, behind one face.

    Args:
        parameters: (name, parameter) pairs that train; their order decides that of the saved state.
        config: see OptimConfig.
        module: that they belong to; it tells tables (which stay on AdamW) and token mixing from the rest.
    """

    def __init__(self, parameters: Iterable[tuple[str, nn.Parameter]], config: OptimConfig, module: nn.Module) -> None:
        self.config = config
        self.parameters = [p for _, p in parameters]
        tables = table_ids(module)
        maps = [p for p in self.parameters if p.ndim == 2 and id(p) not in tables]
        matrices = maps if config.matrix_rate is not None else []
        chosen = {id(p) for p in matrices}
        others = [p for p in self.parameters if id(p) not in chosen]
        groups = [(others, config.rate)]
        if config.rest_rate is not None:
            mixing = mixing_ids(module)
            apart = [p for p in others if id(p) not in mixing]
            groups = [([p for p in others if id(p) in mixing], config.rate), (apart, config.rest_rate)]
        betas = (config.beta1, config.beta2)
        self.parts: list[tuple[torch.optim.Optimizer, float]] = []
        for group, rate in groups:
            if group:
                adam = torch.optim.AdamW(group, lr=rate, betas=betas, weight_decay=config.weight_decay, fused=True)
                self.parts.append((adam, rate))
        if matrices and config.matrix_rate is not None:
            muon = torch.optim.Muon(matrices, lr=config.matrix_rate, weight_decay=config.weight_decay, momentum=0.95)
            self.parts.append((muon, config.matrix_rate))

    def step(self, factor: float) -> None:
        """One update at `factor` times the peak rates; gradients are cleared after it."""
        for optimizer, rate in self.parts:
            for group in optimizer.param_groups:
                group["lr"] = rate * factor
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)

    def state(self, keep: bool = True) -> dict[str, Tensor]:
        """The moments as flat named tensors on the CPU, whole, fit for a safetensors file.

        Args:
            keep: False gives nothing, from a process that only takes part in gathering what is sharded.
        """
        flat: dict[str, Tensor] = {}
        for part, (optimizer, _) in enumerate(self.parts):
            for index, slots in optimizer.state_dict()["state"].items():
                for slot, value in slots.items():
                    tensor = whole(torch.as_tensor(value))
                    if keep:
                        flat[f"{part}.{index}.{slot}"] = tensor.contiguous().cpu()
        return flat

    def load_state(self, flat: dict[str, Tensor]) -> None:
        """Restores what `state` gave."""
        for part, (optimizer, _) in enumerate(self.parts):
            state = optimizer.state_dict()
            parameters = [p for group in optimizer.param_groups for p in group["params"]]
            slots: dict[int, dict[str, Tensor]] = {}
            for name, value in flat.items():
                owner, index, slot = name.split(".", 2)
                if int(owner) == part:
                    parameter = parameters[int(index)]
                    sharded = value.shape == parameter.shape and value.ndim > 0
                    slots.setdefault(int(index), {})[slot] = like(parameter, value) if sharded else value
            state["state"] = slots
            optimizer.load_state_dict(state)
