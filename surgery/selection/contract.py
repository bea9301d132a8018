"""What a layer selector is given and what it answers."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, Literal, Protocol

from halobench.errors import UserError
from halobench.mixers.contract import Mixer
from halobench.surgery.planted import Mixture
from halobench.surgery.selection.evidence import Evidence

# What a selector reads. Of the teacher with each layer replaced in turn: "recall", commonsense ("csr"), held-out
# "text". Of the all-linear student with each layer restored: its KL on text, as it is ("restored") or after training
# ("redistilled"). Or the "workbench", on which it measures sets of layers itself.
Need = Literal["recall", "csr", "text", "restored", "redistilled", "workbench"]


@dataclass(frozen=True)
class Measured:
    """What a task found: per metric the values of independent samples, and the tokens it took."""

    samples: dict[str, list[float]]
    tokens: int


class Workbench(Protocol):
    """The aligned mixers and the tasks, for selectors that search whole sets of layers or train something small.

    Attributes:
        layers: of the teacher.
        teacher: frozen, in evaluation mode.
        mixers: the aligned mixer of each layer, frozen. `training_mixers` gives copies that may train.
        prompt: tokens of the recipe's recall prompts. hype: whether the conversion takes positions out of kept layers.
        folder: where a selector may keep what it would not like to do twice.
    """

    layers: int
    teacher: Any
    mixers: dict[int, Mixer]
    device: str
    folder: Path
    seed: int
    prompt: int
    hype: bool

    def measure(
        self,
        kept: Sequence[int],
        task: str,
        *,
        length: int | None = None,
        samples: int | None = None,
        hype: bool = False,
        mixers: dict[int, Mixer] | None = None,
    ) -> Measured:
        """The student with softmax in `kept` and mixers elsewhere, nothing trained, on the first samples of a task.

        What was measured is kept: asking again costs nothing.

        Args:
            task: "needles" and "lists" (metrics answer_logprob, accuracy), "continuation" (margin, acc, acc_norm) or
                "text" (kl, in nats per token to the teacher).
            length: tokens of a prompt; the recipe's by default.
            samples: how many; the recipe's by default. The same ones every time.
            hype: take the positions out of the kept layers, as the conversion will.
            mixers: others in place of the aligned ones.
        """
        ...

    def data(self, planted: float) -> Mixture:
        """Training sequences, that share of which is planted retrieval (answers have the weight ANSWER_WEIGHT)."""
        ...

    def training_mixers(self) -> dict[int, Mixer]:
        """Copies of the aligned mixers, in fp32 and training mode."""
        ...


@dataclass(frozen=True, kw_only=True)
class Prices:
    """Tokens that evidence costs, known before it is gathered.

    recall, csr, text: one model measured on the recall tasks, on commonsense, on held-out text (KL and hidden errors).
    restore: training of one re-distilled candidate. prompt: one recall prompt.
    """

    layers: int
    keep: int
    recall: int
    csr: int
    text: int
    restore: int
    prompt: int


@dataclass(frozen=True, kw_only=True)
class Question:
    """Which `keep` of `layers` layers stay softmax? Evidence and workbench are there when the selector needs them."""

    layers: int
    keep: int
    seed: int = 0
    evidence: Evidence | None = None
    given: tuple[int, ...] | None = None
    workbench: Workbench | None = None

    def __post_init__(self) -> None:
        if not 0 <= self.keep <= self.layers:
            raise UserError(f"--keep {self.keep} is out of range: the model has {self.layers} layers")

    def require(self, method: str) -> Evidence:
        """The evidence, or an error that says how to get it."""
        if self.evidence is None:
            raise UserError(f"{method} needs scores: give a run with an aligned checkpoint, or --scores FILE")
        return self.evidence

    def require_workbench(self, method: str) -> Workbench:
        """The workbench, or an error that says how to get one."""
        if self.workbench is None:
            raise UserError(
                f"{method} measures models itself: give a run with an aligned checkpoint in place of scores"
            )
        return self.workbench


@dataclass(frozen=True, kw_only=True)
class Ranking:
    """A selector's answer.

    layers: the kept layers, ascending, 0-based. ranking: all layers, best first. scores: one per layer, higher is kept
    first. stderr, interval: of each score (95%). membership: share of bootstrap resamples in which each layer is kept.
    stability: mean Kendall tau between the ranking and those of resamples. tied: layers on both sides of the cut that
    the evidence cannot tell apart. cost_tokens, seconds: spent to get the scores.
    """

    method: str
    label: str
    layers: list[int]
    ranking: list[int]
    scores: list[float]
    stderr: list[float] | None = None
    interval: list[tuple[float, float]] | None = None
    membership: list[float] | None = None
    stability: float | None = None
    tied: list[int] | None = None
    cost_tokens: int = 0
    seconds: float = 0.0

    def to_json(self) -> dict[str, Any]:
        """The form `halobench select --json` prints."""
        return {k: v for k, v in vars(self).items() if k != "method"}


class Selector(Protocol):
    """A way to choose the layers that stay softmax: a frozen dataclass whose fields are its options.

    paper: an address.
    """

    name: ClassVar[str]
    label: ClassVar[str]
    paper: ClassVar[str]

    @property
    def needs(self) -> frozenset[Need]:
        """What it reads; a class attribute will do."""
        ...

    def price(self, prices: Prices) -> int:
        """Tokens it will cost, before it runs."""
        ...

    def rank(self, question: Question) -> Ranking:
        """Answers `question`."""
        ...
