"""Selectors that look at no model: even spacing, one end or both, chance, and layers given by hand."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass, replace
from typing import ClassVar

import numpy as np

from halobench.errors import UserError
from halobench.surgery.plan import kept_layers
from halobench.surgery.selection.contract import Need, Prices, Question, Ranking
from halobench.surgery.selection.uncertainty import ranked


class _Fixed(ABC):
    needs: ClassVar[frozenset[Need]] = frozenset()

    @abstractmethod
    def _choose(self, question: Question) -> list[int]:
        """The layers to keep."""

    def price(self, prices: Prices) -> int:
        """Nothing is measured."""
        return 0

    def rank(self, question: Question) -> Ranking:
        """See Selector. Scores are 1 for kept layers and 0 for the others."""
        layers = self._choose(question)
        scores = np.isin(np.arange(question.layers), layers).astype(float)
        return ranked(self, replace(question, keep=len(layers)), scores, None, 0)


@dataclass(frozen=True, kw_only=True)
class Even(_Fixed):
    """Evenly spaced layers: the last of each of `keep` equal parts (3, 7, 11, ... for a quarter).

    The phase matters, and papers differ in it: with stride, the layers are offset, offset + stride, ... instead.

    stride: distance between kept layers. offset: the first of them, 0 unless given.
    """

    name: ClassVar[str] = "even"
    label: ClassVar[str] = "even"
    paper: ClassVar[str] = "https://arxiv.org/abs/2408.15237"

    stride: int | None = None
    offset: int | None = None

    def __post_init__(self) -> None:
        if self.stride is None and self.offset is not None:
            raise UserError(f"the option offset of even is {self.offset} without a stride; give both, or neither")
        if (self.stride is not None and self.stride < 1) or (self.offset or 0) < 0:
            raise UserError(f"even has stride {self.stride} and offset {self.offset}; 1 and 0 are the least")

    def _choose(self, question: Question) -> list[int]:
        if self.stride is None:
            return kept_layers(question.keep, question.layers)
        layers = list(range(self.offset or 0, question.layers, self.stride))
        if len(layers) != question.keep:
            raise UserError(
                f"even with stride {self.stride} and offset {self.offset or 0} gives {len(layers)} of "
                f"{question.layers} layers, and --keep is {question.keep}; change one of them"
            )
        return layers


@dataclass(frozen=True, kw_only=True)
class LatterHalf(_Fixed):
    """Evenly spaced in the second half, layers L/2 to L-1: the last of each of `keep` equal parts of it."""

    name: ClassVar[str] = "latter-half"
    label: ClassVar[str] = "latter half"
    paper: ClassVar[str] = "https://arxiv.org/abs/2601.22156"

    def _choose(self, question: Question) -> list[int]:
        start = question.layers // 2
        if question.keep > question.layers - start:
            raise UserError(
                f"latter-half has {question.layers - start} of {question.layers} layers to choose from, and --keep is "
                f"{question.keep}; keep fewer, or use even"
            )
        return [start + i for i in kept_layers(question.keep, question.layers - start)]


@dataclass(frozen=True, kw_only=True)
class FirstLast(_Fixed):
    """The first ceil(keep/2) layers and the last floor(keep/2)."""

    name: ClassVar[str] = "first-last"
    label: ClassVar[str] = "first and last"
    paper: ClassVar[str] = ""

    def _choose(self, question: Question) -> list[int]:
        last = question.keep // 2
        return [*range(question.keep - last), *range(question.layers - last, question.layers)]


@dataclass(frozen=True, kw_only=True)
class Random(_Fixed):
    """`keep` layers by chance: what choosing well must beat.

    seed: of the draw; the question's unless given.
    """

    name: ClassVar[str] = "random"
    label: ClassVar[str] = "random"
    paper: ClassVar[str] = ""

    seed: int | None = None

    def __post_init__(self) -> None:
        if self.seed is not None and self.seed < 0:
            raise UserError(f"the option seed of random is {self.seed}; it must be 0 or more")

    def _choose(self, question: Question) -> list[int]:
        rng = np.random.default_rng(question.seed if self.seed is None else self.seed)
        return sorted(int(i) for i in rng.choice(question.layers, question.keep, replace=False))


@dataclass(frozen=True, kw_only=True)
class Given(_Fixed):
    """The layers of `--layers`, however many they are."""

    name: ClassVar[str] = "given"
    label: ClassVar[str] = "given"
    paper: ClassVar[str] = ""

    def _choose(self, question: Question) -> list[int]:
        layers = question.given
        if layers is None:
            raise UserError("the selector `given` needs layers: write --layers 2,7")
        if len(set(layers)) != len(layers) or not all(0 <= i < question.layers for i in layers):
            raise UserError(f"layers {list(layers)} must be different numbers from 0 to {question.layers - 1}")
        return sorted(layers)
