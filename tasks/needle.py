"""Planted retrieval for evaluation: needles in real text and key-value lists, with exact token counts.

The words are the evaluation half of `surgery/planted.py`'s nouns, and no sentence or layout here occurs in training.
The filler wraps around, so a haystack is never shorter than asked, and nothing is ever truncated.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import islice, pairwise
from typing import TYPE_CHECKING, Literal

import numpy as np

from halobench.errors import UserError
from halobench.progress import Progress
from halobench.surgery.planted import nouns
from halobench.tasks.sampled import Scored
from halobench.tasks.scoring import Prompt, Tail, check_context, encode, score_prompts, special_prefix

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

# RULER's wording, cut so that four facts and a question fit 128 tokens of a small vocabulary.
NEEDLE = " The magic number for {key} is: {value}."
QUESTION = "\nWhat is the magic number for {key}? The magic number for {key} is:"
LIST_OPENING, LIST_ROW, LIST_QUESTION = '\n{{"numbers": {{', ' "{key}": {value},', ' "{key}":'
LIST_CLOSING = "}}\nOnce more: {"


@dataclass(frozen=True, kw_only=True)
class NeedleConfig:
    """keys_per_haystack: facts hidden. value_digits: of each number. questions: about all facts or one of them."""

    keys_per_haystack: int = 4
    value_digits: int = 5
    questions: Literal["all", "one"] = "all"


@dataclass(frozen=True, kw_only=True)
class ListConfig:
    """questions: keys asked of each list. value_digits: length of each number."""

    questions: int = 8
    value_digits: int = 5


@dataclass(frozen=True)
class Haystack:
    """One context with its questions.

    context: token ids (time,). questions, answers: token ids of each. depths: where each answer stands, 0 (start) to 1.
    """

    context: np.ndarray
    questions: list[list[int]]
    answers: list[list[int]]
    depths: list[float]

    @property
    def prompt_sizes(self) -> list[int]:
        """Tokens of the context with each question and answer."""
        return [len(self.context) + len(q) + len(a) for q, a in zip(self.questions, self.answers, strict=True)]

    @property
    def length(self) -> int:
        """Tokens of the context with its longest question and answer."""
        return max(self.prompt_sizes)


@dataclass(frozen=True)
class RetrievalScores:
    """One entry a question, in the order of the haystacks.

    correct: 1.0 where the greedy answer is exactly right. logprob: log-likelihood of the answer, over all its tokens.
    haystack: the index of its haystack (a cluster). depth: 0 to 1. tokens_processed: tokens run; tokens_plain: tokens
    that separate prompts would have taken. truncated: questions whose prompt the model was not given whole.
    """

    correct: np.ndarray
    logprob: np.ndarray
    haystack: np.ndarray
    depth: np.ndarray
    tokens_processed: int
    tokens_plain: int
    truncated: int


def build_haystacks(
    tokenizer: PreTrainedTokenizerBase,
    filler_tokens: np.ndarray,
    length: int,
    count: int,
    seed: int,
    config: NeedleConfig | None = None,
) -> list[Haystack]:
    """`count` haystacks of real text with facts at sentence boundaries, spread evenly over the depth and jittered.

    The context with the longest question and answer is exactly `length` tokens. Raises UserError when `length` has no
    room for the facts.
    """
    config = config or NeedleConfig()
    boundaries = sentence_ends(tokenizer, filler_tokens)
    return [plant(tokenizer, filler_tokens, boundaries, length, i, seed, config) for i in range(count)]


@dataclass(frozen=True)
class Facts:
    """What is hidden and what is asked of it: token ids of each fact, and of each (question, answer)."""

    facts: list[list[int]]
    pairs: list[tuple[list[int], list[int]]]
    asked: list[int]

    def room(self, length: int, opening: int) -> int:
        """Tokens of text that make the longest prompt exactly `length`; raises UserError when there is no room."""
        taken = opening + sum(map(len, self.facts)) + max(len(q) + len(a) for q, a in self.pairs)
        number = len(self.facts)
        if length - taken < number:
            raise UserError(f"length {length} has no room for {number} facts and a question; use {taken + 8 * number}")
        return length - taken


def draw_facts(tokenizer: PreTrainedTokenizerBase, rng: np.random.Generator, config: NeedleConfig) -> Facts:
    """Facts about nouns that differ, with random numbers."""
    number = config.keys_per_haystack
    keys = [str(key) for key in rng.choice(nouns("eval"), size=number, replace=False)]
    values = [_number(rng, config.value_digits) for _ in keys]
    facts = encode(tokenizer, [NEEDLE.format(key=k, value=v) for k, v in zip(keys, values, strict=True)])
    asked = list(range(number)) if config.questions == "all" else [int(rng.integers(number))]
    pairs = encode_pairs(tokenizer, [(QUESTION.format(key=keys[i]), f" {values[i]}") for i in asked])
    return Facts(facts, pairs, asked)


def plant(
    tokenizer: PreTrainedTokenizerBase,
    filler: np.ndarray,
    boundaries: np.ndarray,
    length: int,
    index: int,
    seed: int,
    config: NeedleConfig,
) -> Haystack:
    """Haystack number `index` of `build_haystacks`; `boundaries` are the `sentence_ends` of the filler."""
    rng = np.random.default_rng((seed, length, index, 11))
    opening = special_prefix(tokenizer)
    drawn = draw_facts(tokenizer, rng, config)
    room = drawn.room(length, len(opening))
    start = int(rng.integers(len(filler)))
    text = np.take(filler, np.arange(start, start + room), mode="wrap")
    allowed = _boundaries_within(boundaries, len(filler), start, room)
    places: list[int] = []
    number = len(drawn.facts)
    for i in range(number):
        wanted = (i + rng.random()) / number * room
        places.append(max([*places[-1:], _nearest(allowed, wanted)]))
    context, starts = insert_facts(opening, text, drawn.facts, places)
    depths = [round(starts[i] / len(context), 4) for i in drawn.asked]
    return Haystack(context, [q for q, _ in drawn.pairs], [a for _, a in drawn.pairs], depths)


def insert_facts(
    opening: Sequence[int], text: np.ndarray, facts: Sequence[Sequence[int]], places: Sequence[int]
) -> tuple[np.ndarray, list[int]]:
    """The context with each fact before the token of `text` at its place (ascending), and where each fact begins."""
    parts, starts, last, used = [np.asarray(opening)], [], 0, len(opening)
    for fact, place in zip(facts, places, strict=True):
        starts.append(used + place - last)
        parts += [text[last:place], np.asarray(fact)]
        used, last = starts[-1] + len(fact), place
    return np.concatenate([*parts, text[last:]]).astype(np.int64), starts


def build_lists(
    tokenizer: PreTrainedTokenizerBase,
    filler_tokens: np.ndarray,
    length: int,
    count: int,
    seed: int,
    config: ListConfig | None = None,
) -> list[Haystack]:
    """`count` JSON objects of words and numbers that fill `length` tokens, with questions about keys at spread depths.

    What the rows leave over is filled with text before the object. Same exactness as `build_haystacks`.
    """
    config = config or ListConfig()
    return [make_list(tokenizer, filler_tokens, length, i, seed, config) for i in range(count)]


def make_list(
    tokenizer: PreTrainedTokenizerBase, filler: np.ndarray, length: int, index: int, seed: int, config: ListConfig
) -> Haystack:
    """List number `index` of `build_lists`."""
    rng, opening = np.random.default_rng((seed, length, index, 13)), special_prefix(tokenizer)
    keys, values, rows = _rows(tokenizer, length, rng, config)
    head, tail = encode(tokenizer, [LIST_OPENING.format(), LIST_CLOSING])
    ends = np.cumsum([len(row) for row in rows])
    # The keys that are asked decide how long the longest question is, and so how many rows fit: fewer until they do.
    fixed = len(opening) + len(head) + len(tail)
    number = len(rows)
    while True:
        edges = np.arange(config.questions + 1) * number // config.questions
        asked = [int(rng.integers(low, high)) for low, high in pairwise(edges)]
        pairs = encode_pairs(tokenizer, [(LIST_QUESTION.format(key=keys[i]), f" {values[i]}") for i in asked])
        room = length - fixed - max(len(q) + len(a) for q, a in pairs)
        fitting = int(np.searchsorted(ends, room, side="right"))
        if fitting < config.questions:
            raise UserError(f"length {length} has no room for a list of {config.questions} rows; use a longer one")
        if number <= fitting:
            break
        number = fitting
    start = int(rng.integers(len(filler)))
    before = np.take(filler, np.arange(start, start + room - int(ends[number - 1])), mode="wrap")
    context = np.concatenate([opening, before, head, *rows[:number], tail]).astype(np.int64)
    first = len(opening) + len(before) + len(head)
    depths = [round((first + int(ends[i]) - len(rows[i])) / len(context), 4) for i in asked]
    return Haystack(context, [q for q, _ in pairs], [a for _, a in pairs], depths)


def encode_pairs(
    tokenizer: PreTrainedTokenizerBase, pairs: Sequence[tuple[str, str]]
) -> list[tuple[list[int], list[int]]]:
    """Ids of each beginning and of what its ending adds, tokenised together if that leaves the beginning as it is."""
    firsts = encode(tokenizer, [first for first, _ in pairs])
    wholes = encode(tokenizer, [first + second for first, second in pairs])
    alone = encode(tokenizer, [second for _, second in pairs])
    return [(f, w[len(f) :] if w[: len(f)] == f else a) for f, w, a in zip(firsts, wholes, alone, strict=True)]


def _number(rng: np.random.Generator, digits: int) -> str:
    return str(rng.integers(10 ** (digits - 1), 10**digits))


def _rows(
    tokenizer: PreTrainedTokenizerBase, length: int, rng: np.random.Generator, config: ListConfig
) -> tuple[list[str], list[str], list[list[int]]]:
    """Keys, values and token ids of more rows than fit `length` tokens."""
    keys: list[str] = []
    values: list[str] = []
    rows: list[list[int]] = []
    supply = _distinct_keys(rng, pairs=length // 6 > len(nouns("eval")))
    while sum(map(len, rows)) < length:
        fresh = list(islice(supply, max(config.questions, length // 40)))
        numbers = [_number(rng, config.value_digits) for _ in fresh]
        rows += encode(tokenizer, [LIST_ROW.format(key=k, value=v) for k, v in zip(fresh, numbers, strict=True)])
        keys, values = keys + fresh, values + numbers
    return keys, values, rows


def _distinct_keys(rng: np.random.Generator, *, pairs: bool) -> Iterator[str]:
    """Nouns in random order, none twice; pairs of nouns when asked for, or when single ones have run out."""
    words = nouns("eval")
    if not pairs:
        yield from (str(word) for word in rng.permutation(words))
    seen = set()
    while True:
        for first, second in rng.integers(len(words), size=(256, 2)).tolist():
            if (first, second) not in seen:
                seen.add((first, second))
                yield f"{words[first]} {words[second]}"


def sentence_ends(tokenizer: PreTrainedTokenizerBase, filler: np.ndarray) -> np.ndarray:
    """Places in `filler` that stand between two sentences: behind a full stop and before white space."""
    if len(filler) < 2:
        raise UserError(f"the filler has {len(filler)} tokens; give held-out text")
    known, inverse = np.unique(np.asarray(filler), return_inverse=True)
    names = [str(name) for name in tokenizer.convert_ids_to_tokens([int(i) for i in known])]
    closing = np.array([re.search(r"[.!?][\"')]?$", name) is not None for name in names])
    opening = np.array([name[:1] in tuple("ĠĊč▁ \n") for name in names])
    return np.flatnonzero(closing[inverse[:-1]] & opening[inverse[1:]]) + 1


def _boundaries_within(boundaries: np.ndarray, size: int, start: int, room: int) -> np.ndarray:
    """The boundaries of a wrapped window, counted from its start, ascending."""
    laps = np.arange(start // size, (start + room) // size + 1)
    places = (boundaries[None, :] + laps[:, None] * size).ravel() - start
    return places[(places > 0) & (places < room)]


def _nearest(places: np.ndarray, wanted: float) -> int:
    if not len(places):
        return int(wanted)
    after = int(np.searchsorted(places, wanted))
    near = places[max(0, after - 1) : after + 1]
    return int(near[np.argmin(np.abs(near - wanted))])


def score_haystacks(
    model: PreTrainedModel,
    haystacks: Sequence[Haystack],
    *,
    batch_tokens: int = 16384,
    chunk: int = 4096,
    device: str | torch.device | None = None,
    progress: Progress | None = None,
) -> RetrievalScores:
    """Asks every question of every haystack; a haystack is read once, and its state used for all of its questions.

    `correct` needs no generation: a greedy decoder's answer is the given one exactly when each answer token is the most
    likely one behind the question and the answer tokens before it (by induction over the tokens), which is what one
    forward over question and answer shows.
    """
    samples = score_each(model, haystacks, batch_tokens=batch_tokens, chunk=chunk, device=device, progress=progress)
    return RetrievalScores(
        correct=np.concatenate([s.values["accuracy"] for s in samples]),
        logprob=np.concatenate([s.values["answer_logprob"] for s in samples]),
        haystack=np.repeat(np.arange(len(haystacks)), [len(h.questions) for h in haystacks]),
        depth=np.concatenate([h.depths for h in haystacks]),
        tokens_processed=sum(s.tokens for s in samples),
        tokens_plain=sum(s.tokens_plain for s in samples),
        truncated=sum(s.truncated for s in samples),
    )


def score_each(
    model: PreTrainedModel,
    haystacks: Sequence[Haystack],
    *,
    batch_tokens: int = 16384,
    chunk: int = 4096,
    device: str | torch.device | None = None,
    progress: Progress | None = None,
) -> list[Scored]:
    """`score_haystacks`, one sample a haystack. A prompt is truncated when the model was given fewer of its tokens."""
    check_context(model, max(haystack.length for haystack in haystacks))
    prompts = [
        Prompt(h.context, tuple(Tail([*q, *a], len(q)) for q, a in zip(h.questions, h.answers, strict=True)))
        for h in haystacks
    ]
    scores = score_prompts(model, prompts, batch_tokens=batch_tokens, chunk=chunk, device=device, progress=progress)
    return [
        Scored(
            values={"accuracy": scores.greedy[i].tolist(), "answer_logprob": scores.logprob[i].tolist()},
            depths=haystack.depths,
            prompt_tokens=haystack.length,
            tokens=int(scores.read[i]),
            tokens_plain=int(scores.given[i].sum()),
            truncated=int((scores.given[i] < haystack.prompt_sizes).sum()),
        )
        for i, haystack in enumerate(haystacks)
    ]
