"""HALO's score, and the recall drop that its paper calls Jet-Nemotron: both rank single-layer replacements."""

from __future__ import annotations

import numpy as np

from halobench.surgery.selection.contract import Need, Question, Ranking, membership, order, top
from halobench.surgery.selection.evidence import Evidence

RESAMPLES = 400


def halo_scores(recall: np.ndarray, csr: np.ndarray, eps: float, cap: float | None) -> np.ndarray:
    """s_i = (max_j R_j - R_i) / (max_j C_j - C_i + eps), the maxima over replaced models (arXiv 2601.22156, section 3).

    The paper has eps 1e-6 and no cap. The denominator is a difference within noise, and the layer with the largest C
    always comes first: the method's known fault, kept here because this is the faithful form. The released code has eps
    1e-10 and a `cap` of 50, which ties layers where the metrics are not accuracies.
    """
    scores = (recall.max(-1, keepdims=True) - recall) / (csr.max(-1, keepdims=True) - csr + eps)
    return scores if cap is None else np.minimum(scores, cap)


class _OfReplacements:
    """Shared by selectors whose score is a function of R_i and C_i: bootstrap over samples gives the uncertainty."""

    name: str
    label: str
    needs: Need = "sweep"

    def _score(self, recall: np.ndarray, csr: np.ndarray, teacher: np.ndarray) -> np.ndarray:
        raise NotImplementedError

    def rank(self, question: Question) -> Ranking:
        """See Selector."""
        evidence: Evidence = question.require(self.name)
        scores = self._score(evidence.recall, evidence.csr, np.array([evidence.teacher_recall]))
        drawn = evidence.resamples(RESAMPLES, question.seed)
        resampled = None if drawn is None else self._score(drawn[0], drawn[1], drawn[2][:, None])
        return Ranking(
            method=self.name,
            label=self.label,
            layers=top(scores, question.keep),
            ranking=order(scores),
            scores=[float(s) for s in scores],
            stderr=None if resampled is None else [float(s) for s in resampled.std(0, ddof=1)],
            membership=None if resampled is None else membership(resampled, question.keep),
            cost_tokens=evidence.tokens,
        )


class Halo(_OfReplacements):
    """Keep layers whose loss costs much recall for little commonsense."""

    name = "halo"
    label = "HALO"
    paper = "https://arxiv.org/abs/2601.22156"

    def __init__(self, eps: float = 1e-6, cap: float | None = None) -> None:
        self.eps, self.cap = eps, cap

    def _score(self, recall: np.ndarray, csr: np.ndarray, teacher: np.ndarray) -> np.ndarray:
        return halo_scores(recall, csr, self.eps, self.cap)


class RecallDrop(_OfReplacements):
    """s_i = R_teacher - R_i: what HALO's paper runs under the name Jet-Nemotron, whose own search it is not."""

    name = "jet-nemotron"
    label = "recall drop"
    paper = "https://arxiv.org/abs/2508.15884"

    def _score(self, recall: np.ndarray, csr: np.ndarray, teacher: np.ndarray) -> np.ndarray:
        return teacher - recall
