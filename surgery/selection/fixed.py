"""Selectors that look at no model: even spacing, chance, and layers given by hand."""

from __future__ import annotations

import numpy as np

from halobench.errors import UserError
from halobench.surgery.plan import kept_layers
from halobench.surgery.selection.contract import Need, Question, Ranking


class _Fixed:
    name: str
    label: str
    needs: Need = "nothing"

    def _choose(self, question: Question) -> list[int]:
        raise NotImplementedError

    def rank(self, question: Question) -> Ranking:
        """See Selector. Scores are 1 for kept layers and 0 for the others."""
        layers = self._choose(question)
        return Ranking(
            method=self.name,
            label=self.label,
            layers=layers,
            ranking=[*layers, *(i for i in range(question.layers) if i not in layers)],
            scores=[float(i in layers) for i in range(question.layers)],
            stderr=None,
            membership=None,
            cost_tokens=0,
        )


class Even(_Fixed):
    """The last layer of each of `keep` equal parts (3, 7, 11, ... for a quarter), as most hybrids place theirs.

    The phase matters, and papers differ in it.
    """

    name = "even"
    label = "even"
    paper = "https://arxiv.org/abs/2408.15237"

    def _choose(self, question: Question) -> list[int]:
        return list(kept_layers(question.keep, question.layers))


class Random(_Fixed):
    """`keep` layers drawn with the seed: what choosing well must beat."""

    name = "random"
    label = "random"
    paper = "https://arxiv.org/abs/2601.22156"

    def _choose(self, question: Question) -> list[int]:
        rng = np.random.default_rng(question.seed)
        return sorted(int(i) for i in rng.choice(question.layers, question.keep, replace=False))


class Given(_Fixed):
    """The layers of `--layers`."""

    name = "given"
    label = "given"
    paper = ""

    def _choose(self, question: Question) -> list[int]:
        layers = question.given
        if layers is None:
            raise UserError("the selector `given` needs layers: write --layers 2,7")
        if len(set(layers)) != len(layers) or not all(0 <= i < question.layers for i in layers):
            raise UserError(f"layers {list(layers)} must be different numbers from 0 to {question.layers - 1}")
        return sorted(layers)
