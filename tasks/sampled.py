"""What a long-context task promises: numbered samples, each scored by itself, so that work can stop and go on anywhere.

A sample is one context with one or more questions. Sample i of a task at a length is the same on every machine and
whatever else was asked for, so what an interrupted evaluation has scored need not be scored again, and two models are
compared on the same questions.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

if TYPE_CHECKING:
    from transformers import PreTrainedModel


@dataclass(frozen=True, kw_only=True)
class Scored:
    """One sample.

    values: by metric, one number a question; the first metric is the headline, from 0 to 1, that an early stop looks
    at. depths: where each answer stands in the context, 0 (start) to 1; None where it has no one place. prompt_tokens:
    the longest prompt with its answer room. tokens: what the model read; tokens_plain: what it would have read had
    every question been a prompt of its own. truncated: prompts cut short.
    """

    values: dict[str, list[float]]
    depths: list[float] | None
    prompt_tokens: int
    tokens: int
    tokens_plain: int
    truncated: int


class SampledTask(Protocol):
    """A task of a suite for one tokenizer and one seed; bound to no model.

    Optional attributes, for the estimate and for what is left out: `shortest`, the shortest length it has room at;
    `answer_tokens`, the most tokens a model says to a sample, and `batch_tokens`, of the prompts it answers together;
    and for the record `ran`, what the model decoded with.
    """

    suite: str
    name: str

    def sample_tokens(self, length: int) -> int:
        """Tokens a model reads, about, for one sample of `length` tokens: what an estimate of the time is made from."""

    def score(self, model: PreTrainedModel, length: int, indices: Sequence[int]) -> list[Scored]:
        """The samples `indices` at a context of `length` tokens, in that order."""
