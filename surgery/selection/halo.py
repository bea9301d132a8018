"""HALO's score, and the recall drop that its paper calls Jet-Nemotron: both rank single-layer replacements."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

import numpy as np

from halobench.errors import UserError
from halobench.surgery.selection.contract import Need, Prices, Question, Ranking
from halobench.surgery.selection.draws import drawn, layer_scores
from halobench.surgery.selection.evidence import Evidence
from halobench.surgery.selection.uncertainty import ranked


def halo_scores(
    recall: np.ndarray, csr: np.ndarray, eps: float, cap: float | None, floor: float | None = None
) -> np.ndarray:
    """s_i = (max_j R_j - R_i) / (max_j C_j - C_i + eps), the maxima over replaced models (arXiv 2601.22156, section 3).

    Args:
        recall, csr: R and C, (..., layers).
        eps: the paper has 1e-6, the released code 1e-10.
        cap: largest score allowed; the released code has 50, which ties layers where the metrics are not accuracies.
        floor: where given, the denominator is max(max_j C_j - C_i, floor, eps) instead.
    """
    lost = csr.max(-1, keepdims=True) - csr
    below = lost + eps if floor is None else np.maximum(lost, max(floor, eps))
    scores = (recall.max(-1, keepdims=True) - recall) / below
    return scores if cap is None else np.minimum(scores, cap)


def noise_floor(csr: np.ndarray, resampled: np.ndarray | None) -> float:
    """How large a commonsense loss must be to be more than noise.

    Args:
        csr: C_i, (layers,).
        resampled: the same on bootstrap samples, (resamples, layers), or None.

    Returns:
        The median over layers of the standard error of C_best - C_i, both on the same questions; without samples, the
        median over layers of C_best - C_i itself.
    """
    best = int(csr.argmax())
    others = np.arange(len(csr)) != best
    if not others.any():
        return 0.0
    if resampled is None:
        return float(np.median(csr[best] - csr[others]))
    return float(np.median((resampled[:, [best]] - resampled[:, others]).std(0, ddof=1)))


def _recall(evidence: Evidence) -> np.ndarray:
    return layer_scores(evidence, "replaced", evidence.recall_tasks, evidence.recall_metric, "recall")


@dataclass(frozen=True, kw_only=True)
class Halo:
    """Keep layers whose loss costs much recall for little commonsense.

    eps, cap: see halo_scores; the defaults are the paper's, the released code has 1e-10 and 50.
    denominator: "plain" as in the paper. Its gap is a difference within noise, and the layer with the largest C always
        comes first, whatever its recall. "floored" replaces gaps below noise_floor by that floor.
    """

    name: ClassVar[str] = "halo"
    label: ClassVar[str] = "HALO"
    paper: ClassVar[str] = "https://arxiv.org/abs/2601.22156"
    needs: ClassVar[frozenset[Need]] = frozenset({"recall", "csr"})

    eps: float = 1e-6
    cap: float | None = None
    denominator: Literal["plain", "floored"] = "plain"

    def __post_init__(self) -> None:
        if not 1e-30 <= self.eps < float("inf"):
            raise UserError(f"the option eps of halo is {self.eps}; it must be 1e-30 or more, as 1e-6 is")
        if self.cap is not None and not self.cap > 0:
            raise UserError(f"the option cap of halo is {self.cap}; it must be above 0, as 50 is, or null for none")

    def price(self, prices: Prices) -> int:
        """Teacher and every single replacement, on recall and commonsense."""
        return (prices.layers + 1) * (prices.recall + prices.csr)

    def rank(self, question: Question) -> Ranking:
        """See Selector."""
        evidence = question.require(self.name)
        tasks, metric = evidence.csr_tasks, evidence.csr_metric
        recall, csr = _recall(evidence), layer_scores(evidence, "replaced", tasks, metric, "csr")
        recalls = drawn(evidence, "replaced", evidence.recall_tasks, evidence.recall_metric, question.seed)
        csrs = drawn(evidence, "replaced", tasks, metric, question.seed + 1)  # other items, so other draws
        floor = None if self.denominator == "plain" else noise_floor(csr, None if csrs is None else csrs[0])
        draws = None
        if recalls is not None and csrs is not None:
            draws = halo_scores(recalls[0], csrs[0], self.eps, self.cap, floor)
        cost = evidence.cost("replaced", [*evidence.recall_tasks, *tasks])
        return ranked(self, question, halo_scores(recall, csr, self.eps, self.cap, floor), draws, cost)


@dataclass(frozen=True, kw_only=True)
class RecallDrop:
    """s_i = R_teacher - R_i: what HALO's paper runs under the name Jet-Nemotron, whose own search is `postnas`."""

    name: ClassVar[str] = "jet-nemotron"
    label: ClassVar[str] = "recall drop"
    paper: ClassVar[str] = "https://arxiv.org/abs/2601.22156"
    needs: ClassVar[frozenset[Need]] = frozenset({"recall"})

    def price(self, prices: Prices) -> int:
        """Teacher and every single replacement, on recall."""
        return (prices.layers + 1) * prices.recall

    def rank(self, question: Question) -> Ranking:
        """See Selector."""
        evidence = question.require(self.name)
        tasks, metric = evidence.recall_tasks, evidence.recall_metric
        recall = _recall(evidence)
        draws = drawn(evidence, "replaced", tasks, metric, question.seed, with_base=True)
        lost = None if draws is None else draws[1][:, None] - draws[0]
        return ranked(self, question, evidence.teacher_recall - recall, lost, evidence.cost("replaced", tasks))
