"""What a RULER task is made by: a builder of numbered prompts that fill a given room."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

import numpy as np

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


@dataclass(frozen=True, kw_only=True)
class RulerPrompt:
    """One prompt with what is right.

    ids: token ids of `text` behind the tokenizer's opening. references: the strings looked for in the answer.
    depth: where the answer stands in the context, 0 (start) to 1; None where it has no one place.
    """

    text: str
    ids: list[int]
    references: tuple[str, ...]
    depth: float | None = None


class Builder(Protocol):
    """Makes the prompts of one task with one tokenizer.

    answer_tokens: RULER's room for the answer. any_reference: whether one of the references is enough (question
    answering) or the score is the share of them that was found.
    """

    answer_tokens: int
    any_reference: bool

    def build(self, room: int, length: int, index: int, rng: np.random.Generator) -> RulerPrompt:
        """Prompt `index` at a context of `length`, in `room` tokens or a few less. Raises fitting.NoRoom."""


MakeBuilder = Callable[["PreTrainedTokenizerBase", Path | None, int], Builder]
