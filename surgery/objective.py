"""What a stage brings to the training loop: the module that trains, and its loss."""

from __future__ import annotations

from abc import ABC, abstractmethod

import torch
from torch import Tensor, nn


class Objective(ABC):
    """What a stage trains and how it is judged.

    name: of the stage, for messages. module: what trains (its parameters that ask for gradients); with its persistent
    buffers it is what a checkpoint holds. frozen: other models the loss reads, such as the teacher; they are neither
    wrapped nor sharded nor saved. ceiling: the loss (nats a token) of a student that knows nothing, above which a first
    step is refused; None where there is no such number. idle: some of what trains may take no part in some steps, by
    chance, so that a missing gradient is no fault.
    """

    name: str
    module: nn.Module
    frozen: tuple[nn.Module, ...] = ()
    ceiling: float | None = None
    idle: bool = False

    @abstractmethod
    def loss(self, tokens_BT: Tensor, weights_BT: Tensor) -> tuple[Tensor, Tensor]:
        """(sum of the loss, sum of the weights it is divided by) of a micro-batch."""


class LossModule(nn.Module):
    """An objective as the module that DDP and FSDP2 wrap: called with a micro-batch, it gives the loss.

    Only what trains is registered in it. `share` multiplies both sums: 0 for a pass that a process makes only because
    the others still have sequences.
    """

    def __init__(self, objective: Objective, precision: str) -> None:
        super().__init__()
        self.trains = objective.module
        self._loss, self._bf16 = objective.loss, precision == "bf16"

    def forward(self, tokens_BT: Tensor, weights_BT: Tensor, share: float) -> tuple[Tensor, Tensor]:
        """See Objective.loss."""
        with torch.autocast(tokens_BT.device.type, torch.bfloat16, enabled=self._bf16):
            loss, weight = self._loss(tokens_BT, weights_BT)
        return loss * share, weight * share
