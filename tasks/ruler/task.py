"""Scoring a model on a RULER task: greedy answers, and the strings that must be in them."""

from __future__ import annotations

import re
import zlib
from collections.abc import Sequence
from functools import cached_property
from typing import TYPE_CHECKING

import numpy as np

from halobench.errors import UserError
from halobench.tasks.generation import generate, stop_tokens
from halobench.tasks.ruler.contract import Builder, RulerPrompt
from halobench.tasks.ruler.fitting import NoRoom
from halobench.tasks.sampled import Scored
from halobench.tasks.scoring import check_context, encode

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

TRIALS = 16  # prompts that show what the shortest length is; a twentieth is added for others
PLENTY = 2  # a length of so many times what one prompt needs has room for every one
SUITE = "ruler"


def readable(answer: str) -> str:
    """An answer as RULER looks at it: without space around it, and every control character a new line."""
    return re.sub(r"[\x00-\x1f]", "\n", answer.strip()).strip()


def found(answer: str, references: Sequence[str]) -> float:
    """The share of references that an answer contains, in whatever case: RULER's string_match_all."""
    text = readable(answer).lower()
    return sum(reference.lower() in text for reference in references) / len(references)


def found_any(answer: str, references: Sequence[str]) -> float:
    """1.0 where an answer contains one of the references, in whatever case: RULER's string_match_part."""
    return float(found(answer, references) > 0)


class RulerTask:
    """One RULER task for one tokenizer and seed (see sampled.SampledTask)."""

    suite = SUITE

    def __init__(
        self,
        name: str,
        tokenizer: PreTrainedTokenizerBase,
        builder: Builder,
        *,
        seed: int,
        device: str | torch.device | None = None,
        batch_tokens: int = 16384,
    ) -> None:
        self.name, self.tokenizer, self.builder, self.seed = name, tokenizer, builder, seed
        self.device, self.batch_tokens = device, batch_tokens
        self.ran: dict[str, str] = {}

    @property
    def answer_tokens(self) -> int:
        """RULER's room for an answer, in tokens: the most that are generated for one sample."""
        return self.builder.answer_tokens

    def _rng(self, length: int, index: int) -> np.random.Generator:
        return np.random.default_rng((self.seed, length, index, zlib.crc32(self.name.encode())))

    def _needed(self, index: int) -> int:
        """Tokens of the least prompt like sample `index`, without its answer."""
        try:
            self.builder.build(0, 0, index, self._rng(0, index))
        except NoRoom as none:
            return none.needed
        return 0

    @cached_property
    def _plenty(self) -> int:
        return PLENTY * (self._needed(0) + self.answer_tokens)

    @cached_property
    def shortest(self) -> int:
        """The shortest context that has room for the task, found by trying; a multiple of 16."""
        needed = max(self._needed(index) for index in range(TRIALS))
        return -(-(21 * needed // 20 + self.answer_tokens) // 16) * 16

    def prompt(self, length: int, index: int) -> RulerPrompt:
        """Sample `index` at a context of `length` tokens, the answer's room among them.

        Raises UserError where the task has no room.
        """
        shortest = 0 if length >= self._plenty else self.shortest
        if length >= shortest:
            try:
                return self.builder.build(length - self.answer_tokens, length, index, self._rng(length, index))
            except NoRoom as none:  # a sample that needs more than any of those tried
                shortest = none.needed + self.answer_tokens
        raise UserError(
            f"length {length} has no room for RULER's {self.name} in this model's tokens; "
            f"use {shortest} or more, or leave the task out"
        )

    def sample_tokens(self, length: int) -> int:
        """Tokens read for one sample, at most; an answer that is complete early makes it fewer."""
        return length

    def score(self, model: PreTrainedModel, length: int, indices: Sequence[int]) -> list[Scored]:
        """The samples `indices`, in that order; as many at once as the batch's tokens allow.

        An answer ends at the model's own end, at RULER's number of tokens, or once it contains all that is asked for
        (from then on the score cannot change). Where there is one reference, `answer_logprob` is its log-likelihood
        behind the prompt.
        """
        check_context(model, length)
        together = max(1, self.batch_tokens // length)
        groups = [indices[i : i + together] for i in range(0, len(indices), together)]
        return [scored for group in groups for scored in self._score(model, length, group)]

    def _score(self, model: PreTrainedModel, length: int, indices: Sequence[int]) -> list[Scored]:
        prompts = [self.prompt(length, index) for index in indices]
        single = all(len(p.references) == 1 for p in prompts) and not self.builder.any_reference
        continuations = [f" {p.references[0]}" for p in prompts] if single else []
        match = found_any if self.builder.any_reference else found

        def score_of(row: int, tokens: Sequence[int]) -> float:
            return match(str(self.tokenizer.decode(list(tokens), skip_special_tokens=True)), prompts[row].references)

        answers = generate(
            model, [p.ids for p in prompts], self.answer_tokens,
            stop=stop_tokens(model, self.tokenizer), finished=lambda row, tokens: score_of(row, tokens) == 1.0,
            references=encode(self.tokenizer, continuations) if single else None,
            batch_tokens=self.batch_tokens, device=self.device, ran=self.ran,
        )  # fmt: skip
        results = []
        for row, (prompt, answer) in enumerate(zip(prompts, answers, strict=True)):
            values = {"score": [score_of(row, answer.tokens)]}
            if answer.logprob is not None:
                values["answer_logprob"] = [answer.logprob]
            results.append(
                Scored(
                    values=values,
                    depths=None if prompt.depth is None else [prompt.depth],
                    prompt_tokens=len(prompt.ids) + self.answer_tokens,
                    tokens=answer.read + answer.reference_read,
                    tokens_plain=answer.read,
                    truncated=int(answer.prompt_tokens != len(prompt.ids)),
                )
            )
        return results
