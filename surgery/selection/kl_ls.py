"""KL-LS: softmax restored in one layer of the all-linear student; the layers that bring it nearest the teacher stay."""

from __future__ import annotations

import numpy as np

from halobench.surgery.selection.contract import Need, Question, Ranking, membership, order, top

RESAMPLES = 400


class KlRestore:
    """Rank by the KL to the teacher that restoring layer i reaches, lowest first; scores are minus that KL.

    The paper re-distils each candidate for 200-600M tokens; the budget is the sweep's setting, and 0 is allowed.
    """

    name = "kl-ls"
    label = "KL-LS"
    paper = "https://arxiv.org/abs/2512.20569"
    needs: Need = "restored"

    def rank(self, question: Question) -> Ranking:
        """See Selector."""
        evidence = question.require(self.name)
        kl, errors = evidence.restored_kl()
        share = None
        if errors is not None:
            noise = np.random.default_rng(question.seed).normal(size=(RESAMPLES, len(kl)))
            share = membership(-(kl + noise * errors), question.keep)
        return Ranking(
            method=self.name,
            label=self.label,
            layers=top(-kl, question.keep),
            ranking=order(-kl),
            scores=[float(-x) for x in kl],
            stderr=None if errors is None else [float(e) for e in errors],
            membership=share,
            cost_tokens=evidence.restored_tokens,
        )
