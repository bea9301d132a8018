"""LightTransfer: layers that look at the first and the latest tokens only are lazy, and need no full attention."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from halobench.surgery.selection.contract import Need, Prices, Question, Ranking
from halobench.surgery.selection.draws import drawn, layer_scores
from halobench.surgery.selection.evidence import TEXT
from halobench.surgery.selection.uncertainty import ranked


@dataclass(frozen=True, kw_only=True)
class LightTransfer:
    """s_i = -(share of layer i's attention that falls on the first and the most recent tokens), in the teacher.

    The paper puts streaming attention in the lazy layers' place; here they become the run's mixer. One prefill of the
    teacher gives the scores of all layers.
    """

    name: ClassVar[str] = "lighttransfer"
    label: ClassVar[str] = "LightTransfer"
    paper: ClassVar[str] = "https://arxiv.org/abs/2410.13846"
    needs: ClassVar[frozenset[Need]] = frozenset({"text"})

    def price(self, prices: Prices) -> int:
        """The teacher once, on held-out text."""
        return prices.text

    def rank(self, question: Question) -> Ranking:
        """See Selector."""
        evidence = question.require(self.name)
        local = layer_scores(evidence, "replaced", TEXT, "local_attention", "text")
        draws = drawn(evidence, "replaced", TEXT, "local_attention", question.seed)
        cost = evidence.cost("replaced", TEXT) // (question.layers + 1)  # of teacher and replacements, the teacher's
        return ranked(self, question, -local, None if draws is None else -draws[0], cost)
