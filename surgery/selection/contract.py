"""What a layer selector is given and what it answers."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal, Protocol

import numpy as np

from halobench.errors import UserError
from halobench.surgery.selection.evidence import Evidence

Need = Literal["nothing", "sweep", "restored"]


@dataclass(frozen=True, kw_only=True)
class Question:
    """Which `keep` of `layers` layers stay softmax? `evidence` is there when the selector needs it."""

    layers: int
    keep: int
    seed: int = 0
    evidence: Evidence | None = None
    given: tuple[int, ...] | None = None

    def __post_init__(self) -> None:
        if not 0 <= self.keep <= self.layers:
            raise UserError(f"--keep {self.keep} is out of range: the model has {self.layers} layers")

    def require(self, method: str) -> Evidence:
        """The evidence, or an error that says how to get it."""
        if self.evidence is None:
            raise UserError(f"{method} needs scores: give a run with an aligned checkpoint, or --scores FILE")
        return self.evidence


@dataclass(frozen=True, kw_only=True)
class Ranking:
    """A selector's answer.

    layers: the kept layers, ascending, 0-based. ranking: all layers, best first. scores: one per layer, higher is kept
    first. stderr: of each score.
    membership: share of bootstrap resamples in which each layer is kept. cost_tokens: spent to get the scores.
    """

    method: str
    label: str
    layers: list[int]
    ranking: list[int]
    scores: list[float]
    stderr: list[float] | None
    membership: list[float] | None
    cost_tokens: int

    def to_json(self) -> dict[str, Any]:
        """The form `halobench select --json` prints."""
        return {k: v for k, v in vars(self).items() if k != "method"}


class Selector(Protocol):
    """A way to choose the layers that stay softmax. `paper` is an address; `needs` says which evidence it reads."""

    name: str
    label: str
    paper: str
    needs: Need

    def rank(self, question: Question) -> Ranking:
        """Answers `question`."""
        ...


def order(scores: np.ndarray) -> list[int]:
    """All layers, the largest score first; of equal scores the lower layer goes first."""
    return [int(i) for i in np.argsort(-scores, kind="stable")]


def top(scores: np.ndarray, keep: int) -> list[int]:
    """The `keep` layers with the largest scores, ascending."""
    return sorted(order(scores)[:keep])


def membership(resampled: np.ndarray, keep: int) -> list[float]:
    """Share of resamples (rows) in which each layer (column) is among the `keep` best."""
    counts = np.zeros(resampled.shape[1])
    for row in resampled:
        counts[top(row, keep)] += 1
    return [float(c) for c in counts / len(resampled)]
