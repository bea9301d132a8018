"""From scores and their resamples to a ranking that says how sure it is, and how far two rankings agree."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np

from halobench.surgery.selection.contract import Question, Ranking

RESAMPLES = 400
SURE = 0.95  # share of resamples in which one layer must beat another to be told apart from it


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


def ranked(selector: Any, question: Question, scores: np.ndarray, drawn: np.ndarray | None, cost: int) -> Ranking:
    """The ranking by `scores` (layers,), with what `drawn` (resamples, layers) says of its uncertainty."""
    answer: dict[str, Any] = {}
    if drawn is not None:
        low, high = np.quantile(drawn, [0.025, 0.975], axis=0)
        answer = {
            "stderr": [float(s) for s in drawn.std(0, ddof=1)],
            "interval": [(float(a), float(b)) for a, b in zip(low, high, strict=True)],
            "membership": membership(drawn, question.keep),
            "stability": float(np.mean([kendall_tau(scores, row) for row in drawn])),
            "tied": tied(scores, drawn, question.keep),
        }
    return Ranking(
        method=selector.name,
        label=selector.label,
        layers=top(scores, question.keep),
        ranking=order(scores),
        scores=[float(s) for s in scores],
        cost_tokens=cost,
        **answer,
    )


def with_layers(answer: Ranking, kept: list[int]) -> Ranking:
    """`answer` of a selector that chose a set (`kept`, ascending) and not the best scores; the set is ranked first."""
    rest = [layer for layer in answer.ranking if layer not in kept]
    return replace(answer, layers=kept, ranking=[*(layer for layer in answer.ranking if layer in kept), *rest])


def summary(rankings: list[Ranking]) -> dict[str, Any]:
    """Several answers as plain data: each by its method, and how far they agree."""
    methods = {answer.method: answer.to_json() for answer in rankings}
    return {"methods": methods, "agreement": {"methods": list(methods), **agreement(rankings)}}


def tied(scores: np.ndarray, drawn: np.ndarray, keep: int) -> list[int]:
    """Kept layers that do not beat some layer left out in SURE of the resamples, and those layers, ascending."""
    kept = top(scores, keep)
    left = [i for i in range(len(scores)) if i not in kept]
    found: set[int] = set()
    for i in kept:
        for j in left:
            wins = (drawn[:, i] > drawn[:, j]).mean() + 0.5 * (drawn[:, i] == drawn[:, j]).mean()
            if wins < SURE:
                found |= {i, j}
    return sorted(found)


def kendall_tau(first: np.ndarray, second: np.ndarray) -> float:
    """Kendall's tau-b of two score vectors: 1 the same order, -1 the reverse; 0 when either is constant."""
    a, b = (np.sign(x[:, None] - x[None, :])[np.triu_indices(len(x), 1)] for x in (first, second))
    norm = np.sqrt(np.abs(a).sum() * np.abs(b).sum())
    return float((a * b).sum() / norm) if norm else 0.0


def agreement(rankings: list[Ranking]) -> dict[str, list[list[float]]]:
    """Between every two rankings: Kendall's tau of the scores, and how many kept layers they share."""

    def matrix(compare: Any) -> list[list[float]]:
        return [[float(compare(a, b)) for b in rankings] for a in rankings]

    return {
        "tau": matrix(lambda a, b: kendall_tau(_places(a), _places(b))),
        "overlap": matrix(lambda a, b: len(set(a.layers) & set(b.layers))),
    }


def _places(ranking: Ranking) -> np.ndarray:
    """Minus each layer's place in the ranking; what a selector does not order (equal scores) is equal."""
    scores = np.array(ranking.scores)
    return scores if len(set(ranking.scores)) < len(scores) else -np.argsort(np.array(ranking.ranking)).astype(float)
