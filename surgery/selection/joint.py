"""Our own selector: searches whole sets of layers on the aligned student, judged as the finished hybrid will be.

Scores of single layers cannot see that layers replace one another, and all are taken with positions in place and at the
training length. Here a set is judged with its positions taken out already, by the log-likelihood of answers to longer
recall prompts, while text, read with positions in place, stays near what the all-linear student makes of it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from halobench.errors import UserError
from halobench.surgery.selection.contract import Need, Prices, Question, Ranking, Workbench
from halobench.surgery.selection.uncertainty import RESAMPLES, ranked, with_layers

Set = frozenset[int]


@dataclass(frozen=True, kw_only=True)
class Joint:
    """Greedy additions, then exchanges of one kept layer for another, nothing trained.

    samples: recall prompts each set is judged on. beyond: how many times the recipe's recall length they are.
    exchanges: passes over all exchanges after the greedy part; it ends earlier when none helps.
    bound: a set's KL to the teacher on text may exceed the all-linear student's by this share; sequences: measured on.
        Positions are in place for it: what their removal costs on text, training mends, and a layer that retrieves
        can be the one that it costs most.
    hype: take the positions out of the kept layers; None: where the conversion will.
    """

    samples: int = 3
    beyond: int = 2
    exchanges: int = 1
    bound: float = 0.25
    sequences: int = 2
    hype: bool | None = None

    name: ClassVar[str] = "joint"
    label: ClassVar[str] = "joint"
    paper: ClassVar[str] = ""
    needs: ClassVar[frozenset[Need]] = frozenset({"workbench"})

    def __post_init__(self) -> None:
        if min(self.samples, self.beyond, self.sequences) < 1 or self.exchanges < 0 or self.bound < 0:
            raise UserError("joint: samples, beyond and sequences must be 1 or more, exchanges and bound not negative")

    def price(self, prices: Prices) -> int:
        """Tokens of the sets that will be judged when every exchange is tried."""
        layers, keep = prices.layers, prices.keep
        sets = sum(layers - size for size in range(keep))
        sets += self.exchanges * max(0, keep * (layers - keep) - (layers - keep))  # the last additions are known
        return sets * self.samples * self.beyond * prices.prompt + (keep + 2) * self.sequences * prices.prompt

    def rank(self, question: Question) -> Ranking:
        """See Selector. A kept layer's score is what the best judged set without it lacks (nats an answer); another
        layer's is minus what the best judged set with it lacks.
        """
        search = _Search(self, question.require_workbench(self.name))
        best = search.run(question.keep)
        sets = [kept for kept in search.judged if len(kept) == len(best) and (kept == best or search.within(kept))]
        table = np.array([search.judged[kept] for kept in sets])  # (sets, samples)
        scores = _scores(table.mean(1), sets, best, question.layers)
        picks = np.random.default_rng(question.seed).integers(self.samples, size=(RESAMPLES, self.samples))
        drawn = None
        if self.samples > 1:
            drawn = np.stack([_scores(table[:, pick].mean(1), sets, None, question.layers) for pick in picks])
        answer = ranked(self, question, scores, drawn, search.tokens)
        return with_layers(answer, sorted(best))


class _Search:
    """One search and what it has measured. judged: by set, the answer log-likelihood of each prompt."""

    def __init__(self, options: Joint, bench: Workbench) -> None:
        self.options, self.bench = options, bench
        self.hype = bench.hype if options.hype is None else options.hype
        self.judged: dict[Set, list[float]] = {}
        self.text: dict[Set, float] = {}
        self.tokens = 0

    def run(self, keep: int) -> Set:
        """The best set of `keep` layers that was found within the bound."""
        best: Set = frozenset()
        for _ in range(keep):
            best = self._first_within([best | {layer} for layer in range(self.bench.layers) if layer not in best])
        for _ in range(self.options.exchanges):
            others = [layer for layer in range(self.bench.layers) if layer not in best]
            found = self._first_within([best, *(best - {out} | {into} for out in sorted(best) for into in others)])
            if found == best:
                break
            best = found
        self._recall(best)
        return best

    def within(self, kept: Set) -> bool:
        """Whether text allows a set; one whose text was not measured was never passed over."""
        return self.text.get(kept, 0.0) <= self._limit()

    def _limit(self) -> float:
        return self._kl(frozenset()) * (1 + self.options.bound)

    def _first_within(self, sets: Sequence[Set]) -> Set:
        """Of `sets`, the one with the best recall whose text is within the bound; the best text when none is."""
        ordered = sorted(sets, key=lambda kept: -self._recall(kept))
        within = (kept for kept in ordered if self._kl(kept) <= self._limit())
        return next(within, None) or min(ordered, key=self._kl)

    def _recall(self, kept: Set) -> float:
        if kept not in self.judged:
            options = self.options
            found = self.bench.measure(
                sorted(kept), "needles", length=options.beyond * self.bench.prompt, samples=options.samples,
                hype=self.hype,
            )  # fmt: skip
            self.judged[kept] = found.samples["answer_logprob"]
            self.tokens += found.tokens
        return float(np.mean(self.judged[kept]))

    def _kl(self, kept: Set) -> float:
        if kept not in self.text:
            options = self.options
            found = self.bench.measure(sorted(kept), "text", length=self.bench.prompt, samples=options.sequences)
            self.text[kept] = float(np.mean(found.samples["kl"]))
            self.tokens += found.tokens
        return self.text[kept]


def _scores(values: np.ndarray, sets: Sequence[Set], best: Set | None, layers: int) -> np.ndarray:
    """Scores of all layers when the sets have these values; `best` None: the set with the highest value.

    A layer that no judged set lacks (or has) stands beyond all others.
    """
    chosen = best if best is not None else sets[int(np.argmax(values))]
    top = float(values[list(sets).index(chosen)])
    beyond = float(np.ptp(values)) + 1.0
    scores = np.empty(layers)
    for layer in range(layers):
        kept = layer in chosen
        rivals = [v for v, members in zip(values, sets, strict=True) if (layer in members) != kept]
        gap = max(0.0, top - max(rivals)) if rivals else beyond
        scores[layer] = gap if kept else -gap
    return scores
