"""SMART: the most sensitive layers stay, spread nearly evenly from one end of the model to the other."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import ClassVar

import numpy as np

from halobench.errors import UserError
from halobench.surgery.selection.contract import Need, Prices, Question, Ranking
from halobench.surgery.selection.draws import drawn, layer_scores
from halobench.surgery.selection.evidence import TEXT
from halobench.surgery.selection.uncertainty import SURE, ranked, with_layers


def spread_sets(scores: np.ndarray, keep: int, slack: int, ends: bool) -> np.ndarray:
    """For each row of `scores` (rows, L), the `keep` layers of largest total whose gaps are near L / keep.

    Neighbours are between floor(L/keep) - slack (at least 1) and ceil(L/keep) + slack layers apart; with `ends`, one of
    the first ceil(L/keep) layers and one of the last is kept. The last layer of each of `keep` equal parts always
    satisfies this, so there is an answer. Exact: best[k, i] = s_i + max over gaps g of best[k-1, i-g].

    Returns:
        (rows, keep) layers, ascending; of sets with the same total, one with the smaller gaps at its end.
    """
    rows, layers = scores.shape
    if keep == 0:
        return np.zeros((rows, 0), dtype=int)
    part = -(-layers // keep)
    gaps = range(max(1, layers // keep - slack), part + slack + 1)
    best = np.where(np.arange(layers) < (part if ends else layers), scores, -np.inf)
    came = np.zeros((keep, rows, layers), dtype=int)
    for k in range(1, keep):
        reach = np.full((len(gaps), rows, layers), -np.inf)
        for place, gap in enumerate(gaps):
            reach[place, :, gap:] = best[:, : max(layers - gap, 0)]
        came[k] = np.arange(layers) - np.array(gaps)[reach.argmax(0)]
        best = scores + reach.max(0)
    last = np.where(np.arange(layers) >= (layers - part if ends else 0), best, -np.inf).argmax(1)
    chosen = [last]
    for k in range(keep - 1, 0, -1):
        chosen.append(came[k][np.arange(rows), chosen[-1]])
    return np.stack(chosen[::-1], axis=1)


@dataclass(frozen=True, kw_only=True)
class Smart:
    """The set of largest total sensitivity among near-uniform ones (Zebra-Llama's; after secondary reading).

    s_i = KL(teacher || all-linear student) - KL(teacher || that student with softmax restored in layer i), on held-out
    text. A layer's membership is the share of resamples whose best set holds it.

    slack: how many layers a gap may differ from the even one. ends: keep one layer near each end of the model.
    """

    name: ClassVar[str] = "smart"
    label: ClassVar[str] = "SMART"
    paper: ClassVar[str] = "https://arxiv.org/abs/2505.17272"
    needs: ClassVar[frozenset[Need]] = frozenset({"restored"})

    slack: int = 1
    ends: bool = True

    def __post_init__(self) -> None:
        if self.slack < 0:
            raise UserError(f"the option slack of smart is {self.slack}; it must be 0 or more")

    def price(self, prices: Prices) -> int:
        """The all-linear student and every candidate, on held-out text."""
        return (prices.layers + 1) * prices.text

    def rank(self, question: Question) -> Ranking:
        """See Selector."""
        evidence = question.require(self.name)
        restored = layer_scores(evidence, "restored", TEXT, "kl", "text")
        scores = evidence.base("restored", TEXT, "kl") - restored
        draws = drawn(evidence, "restored", TEXT, "kl", question.seed, with_base=True)
        gained = None if draws is None else draws[1][:, None] - draws[0]
        answer = ranked(self, question, scores, gained, evidence.cost("restored", TEXT))
        kept = [int(i) for i in spread_sets(scores[None], question.keep, self.slack, self.ends)[0]]
        answer = with_layers(answer, kept)
        if gained is None:
            return answer
        sets = spread_sets(gained, question.keep, self.slack, self.ends)
        share = np.bincount(sets.flatten(), minlength=question.layers) / len(sets)
        unsure = [i for i, p in enumerate(share) if (p < SURE if i in kept else p > 1 - SURE)]
        return replace(answer, membership=[float(p) for p in share], tied=unsure)
