"""KL-LS: softmax restored in one layer of the all-linear student; the layers that bring it nearest the teacher stay."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

from halobench.surgery.selection.contract import Need, Prices, Question, Ranking
from halobench.surgery.selection.draws import drawn, layer_scores
from halobench.surgery.selection.evidence import TEXT
from halobench.surgery.selection.uncertainty import ranked


@dataclass(frozen=True, kw_only=True)
class KlRestore:
    """s_i = -KL(teacher || student with softmax in layer i alone), so that the lowest KL comes first.

    budget: "redistilled" as in the paper: each candidate is trained by KL before it is scored, and the score is the
        training loss it ends with (`train_kl`; the KL on held-out text where the scores lack it). "none" scores the
        aligned student as it is, on held-out text.

    The uncertainty is that of held-out text in both: how far the KL moves with the text it is measured on. It does not
    hold the noise of training.
    """

    name: ClassVar[str] = "kl-ls"
    label: ClassVar[str] = "KL-LS"
    paper: ClassVar[str] = "https://arxiv.org/abs/2512.20569"

    budget: Literal["redistilled", "none"] = "redistilled"

    @property
    def needs(self) -> frozenset[Need]:
        """Candidates trained, or as they are."""
        return frozenset({"redistilled" if self.budget == "redistilled" else "restored"})

    def price(self, prices: Prices) -> int:
        """Every candidate trained and measured; untrained, the all-linear student and every candidate measured."""
        if self.budget == "redistilled":
            return prices.layers * (prices.restore + prices.text)
        return (prices.layers + 1) * prices.text

    def rank(self, question: Question) -> Ranking:
        """See Selector."""
        evidence = question.require(self.name)
        part: Literal["redistilled", "restored"] = "redistilled" if self.budget == "redistilled" else "restored"
        entries = evidence.redistilled if part == "redistilled" else []
        trained = bool(entries) and all("train_kl" in entry.scores.get("text", {}) for entry in entries)
        kl = layer_scores(evidence, part, TEXT, "train_kl" if trained else "kl", "text")
        draws = drawn(evidence, part, TEXT, "kl", question.seed)
        noisy = None if draws is None else draws[0] - draws[0].mean(0) + kl if trained else draws[0]
        cost = evidence.cost(part, list(evidence.costs.get(part, {})))
        return ranked(self, question, -kl, None if noisy is None else -noisy, cost)
