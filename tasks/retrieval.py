"""Needles, key-value lists and the needle grid as sampled tasks: a sample is one haystack with all of its questions."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from functools import cached_property
from typing import TYPE_CHECKING

import numpy as np

from halobench.tasks.needle import (
    Haystack,
    ListConfig,
    NeedleConfig,
    draw_facts,
    insert_facts,
    make_list,
    plant,
    score_each,
    sentence_ends,
)
from halobench.tasks.sampled import Scored
from halobench.tasks.scoring import special_prefix

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

GRID_DEPTHS = 13
_SHORT = 2048  # tokens of a haystack that shows how long the questions are


class RetrievalTask(ABC):
    """A task whose samples are haystacks.

    Args:
        filler: token ids of held-out text, which wraps around.
        seed: sample i at a length is decided by it.
        device: where inputs go; the model's own by default.
    """

    suite: str
    name: str

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase,
        filler: np.ndarray,
        *,
        seed: int,
        device: str | torch.device | None = None,
    ) -> None:
        self.tokenizer, self.filler, self.seed, self.device = tokenizer, filler, seed, device

    @abstractmethod
    def haystack(self, length: int, index: int) -> Haystack:
        """Sample `index` at `length` tokens."""

    def sample_tokens(self, length: int) -> int:
        """See SampledTask; the haystack once and its questions, as long as those of a short haystack."""
        short = self.haystack(min(length, _SHORT), 0)
        return length - short.length + len(short.context) + sum(map(len, [*short.questions, *short.answers]))

    def score(self, model: PreTrainedModel, length: int, indices: Sequence[int]) -> list[Scored]:
        """See SampledTask."""
        return score_each(model, [self.haystack(length, index) for index in indices], device=self.device)


class NeedleTask(RetrievalTask):
    """Facts at sentence boundaries of real text, spread over the depth: `build_haystacks`."""

    suite = "niah"

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase,
        filler: np.ndarray,
        *,
        seed: int,
        config: NeedleConfig | None = None,
        device: str | torch.device | None = None,
    ) -> None:
        super().__init__(tokenizer, filler, seed=seed, device=device)
        self.config = config or NeedleConfig()
        self.name = f"multikey-{self.config.keys_per_haystack}"

    @cached_property
    def _boundaries(self) -> np.ndarray:
        return sentence_ends(self.tokenizer, self.filler)

    def haystack(self, length: int, index: int) -> Haystack:
        return plant(self.tokenizer, self.filler, self._boundaries, length, index, self.seed, self.config)


class ListTask(RetrievalTask):
    """JSON objects of words and numbers: `build_lists`."""

    suite, name = "kv", "keyvalue"
    config = ListConfig()

    def haystack(self, length: int, index: int) -> Haystack:
        return make_list(self.tokenizer, self.filler, length, index, self.seed, self.config)


class GridTask(RetrievalTask):
    """Thirteen facts at exactly spaced depths of real text, 0, 1/12, ... 1, each asked for: a column of a heat map.

    The text is read once for all depths. A depth is the share of the text that stands before the fact, exact to half a
    token, in the middle of a sentence where it falls so. All thirteen are in the haystack when one is asked for, which
    is harder than a haystack with that one alone.
    """

    suite, name = "grid", f"depths-{GRID_DEPTHS}"
    config = NeedleConfig(keys_per_haystack=GRID_DEPTHS)

    def haystack(self, length: int, index: int) -> Haystack:
        rng = np.random.default_rng((self.seed, length, index, 19))
        opening = special_prefix(self.tokenizer)
        drawn = draw_facts(self.tokenizer, rng, self.config)
        room = drawn.room(length, len(opening))
        start = int(rng.integers(len(self.filler)))
        text = np.take(self.filler, np.arange(start, start + room), mode="wrap")
        places = [round(i * room / (GRID_DEPTHS - 1)) for i in range(GRID_DEPTHS)]
        context, _ = insert_facts(opening, text, drawn.facts, places)
        depths = [round(i / (GRID_DEPTHS - 1), 4) for i in range(GRID_DEPTHS)]
        return Haystack(context, [q for q, _ in drawn.pairs], [a for _, a in drawn.pairs], depths)
