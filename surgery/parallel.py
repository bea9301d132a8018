"""Several processes that share the sequences of every batch: which ones are mine, and the sum of our gradients."""

from __future__ import annotations

import os
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor, nn


@dataclass(frozen=True)
class Team:
    """This process's place among those that train together."""

    rank: int = 0
    size: int = 1

    @staticmethod
    def join() -> Team:
        """Joins the processes that torchrun or accelerate started (by their environment), or stands alone."""
        size = int(os.environ.get("WORLD_SIZE", "1"))
        if size == 1:
            return Team()
        if torch.cuda.is_available():
            torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", "0")))
        if not dist.is_initialized():
            dist.init_process_group("nccl" if torch.cuda.is_available() else "gloo")
        return Team(dist.get_rank(), size)

    @property
    def leads(self) -> bool:
        """Whether this process writes files and speaks."""
        return self.rank == 0

    def share(self, count: int) -> range:
        """The places, among `count` sequences of a batch, that are this process's."""
        return range(self.rank, count, self.size)

    def sum_gradients(self, parameters: list[nn.Parameter], totals: Tensor) -> Tensor:
        """Sums gradients over all processes in place, in one message; returns the summed `totals` (1-D)."""
        if self.size == 1:
            return totals
        for p in parameters:
            if p.grad is None:
                p.grad = torch.zeros_like(p)
        gradients = [p.grad for p in parameters if p.grad is not None]
        flat = torch.cat([totals.to(gradients[0]), *(g.flatten() for g in gradients)])
        dist.all_reduce(flat)
        start = len(totals)
        for g in gradients:
            g.copy_(flat[start : start + g.numel()].view_as(g))
            start += g.numel()
        return flat[: len(totals)]

    def wait(self) -> None:
        """Returns when every process has come here."""
        if self.size > 1:
            dist.barrier()
