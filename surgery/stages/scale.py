"""The scale a of s_t = log_a(t + a): found after training, on text longer than the training length (HyPE)."""

from __future__ import annotations

import time
from dataclasses import dataclass
from typing import Any, Protocol

import torch

from halobench.kernels.chunked_loss import cross_entropy
from halobench.progress import Progress
from halobench.surgery.heads import final_hidden, unembed
from halobench.surgery.planted import Mixture


class ScaleSearch(Protocol):
    """What the search is told; see the recipe."""

    @property
    def candidates(self) -> list[float]: ...

    @property
    def length(self) -> int: ...

    @property
    def sequences(self) -> int: ...


@dataclass(frozen=True)
class FoundScale:
    """The best a, the mean loss (nats per weighted token) of each candidate, and the cost."""

    best: float
    losses: dict[str, float]
    tokens: int
    seconds: float


@torch.inference_mode()
def search_scale(model: Any, data: Mixture, config: ScaleSearch, device: str) -> FoundScale:
    """Tries each candidate a on the same long training sequences and takes the one with the lowest loss."""
    started = time.monotonic()
    sequences = [data.sequence(10**6 + i, config.length + 1) for i in range(config.sequences)]
    losses: dict[str, float] = {}
    with Progress("scale", len(config.candidates), unit="values", every=10.0) as progress:
        for a in config.candidates:
            model.set_logits_scale(a)
            total = weight = 0.0
            for sequence in sequences:
                tokens = torch.from_numpy(sequence.tokens)[None].to(device)
                weights = torch.from_numpy(sequence.weights)[1:].float().to(device)
                hidden = final_hidden(model, tokens[:, :-1]).flatten(0, 1)
                for start in range(0, len(hidden), 1024):
                    part = slice(start, start + 1024)
                    total += float(cross_entropy(unembed(model, hidden[part]), tokens[0, 1:][part], weights[part]))
                weight += float(weights.sum())
            losses[f"{a:g}"] = total / weight
            progress.advance(1, f"a = {a:g}: loss {total / weight:.4f}")
    best = min(config.candidates, key=lambda a: losses[f"{a:g}"])
    tokens_used = len(config.candidates) * config.sequences * config.length
    return FoundScale(best, losses, tokens_used, time.monotonic() - started)
