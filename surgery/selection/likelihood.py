"""Selectors by likelihood: how much one replaced layer costs, in nats, on answers or on held-out text."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from halobench.surgery.selection.contract import Need, Prices, Question, Ranking
from halobench.surgery.selection.draws import drawn, layer_scores
from halobench.surgery.selection.evidence import TEXT
from halobench.surgery.selection.uncertainty import ranked

ANSWER = "answer_logprob"


@dataclass(frozen=True, kw_only=True)
class AnswerLikelihood:
    """s_i = NLL_i - NLL_teacher of the answers to recall questions with layer i replaced (arXiv 2606.27791).

    The paper lets the answer tokens attend in full and replaces the layer for the prompt alone; here the layer is
    replaced for both, as in the rest of the sweep.
    """

    name: ClassVar[str] = "nll"
    label: ClassVar[str] = "answer NLL"
    paper: ClassVar[str] = "https://arxiv.org/abs/2606.27791"
    needs: ClassVar[frozenset[Need]] = frozenset({"recall"})

    def price(self, prices: Prices) -> int:
        """Teacher and every single replacement, on recall."""
        return (prices.layers + 1) * prices.recall

    def rank(self, question: Question) -> Ranking:
        """See Selector."""
        evidence = question.require(self.name)
        tasks = evidence.recall_tasks
        logprob = layer_scores(evidence, "replaced", tasks, ANSWER, "recall")
        scores = evidence.base("replaced", tasks, ANSWER) - logprob
        draws = drawn(evidence, "replaced", tasks, ANSWER, question.seed, with_base=True)
        lost = None if draws is None else draws[1][:, None] - draws[0]
        return ranked(self, question, scores, lost, evidence.cost("replaced", tasks))


@dataclass(frozen=True, kw_only=True)
class KlDrop:
    """s_i = KL(teacher || teacher with layer i replaced) on held-out text, in nats a token.

    The mirror image of KL-LS (a layer taken from the teacher, not given back to the student); that paper has it as an
    ablation.
    """

    name: ClassVar[str] = "kl-drop"
    label: ClassVar[str] = "KL drop"
    paper: ClassVar[str] = "https://arxiv.org/abs/2512.20569"
    needs: ClassVar[frozenset[Need]] = frozenset({"text"})

    def price(self, prices: Prices) -> int:
        """Teacher and every single replacement, on held-out text."""
        return (prices.layers + 1) * prices.text

    def rank(self, question: Question) -> Ranking:
        """See Selector."""
        evidence = question.require(self.name)
        kl = layer_scores(evidence, "replaced", TEXT, "kl", "text")
        draws = drawn(evidence, "replaced", TEXT, "kl", question.seed)
        return ranked(self, question, kl, None if draws is None else draws[0], evidence.cost("replaced", TEXT))
