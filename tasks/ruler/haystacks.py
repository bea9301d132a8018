"""Statements hidden in filler: RULER's eight needle tasks and variable tracking.

Filler is RULER's noise sentence, other needles, or essays. In place of Paul Graham's essays, which are not free, stands
the package's held-out text (novels and pages in the public domain), begun at a random sentence and wrapped around, so
that no context is too long for it. What whole lines or sentences leave over is filled by the end of one more, first in
the context. Statements stand where RULER has them: in noise and among needles before lines drawn at random, no two
before the same; in essays at some of forty depths from the start to the end, each at the boundary nearest to its own
(RULER counts sentences, this counts tokens). A key of the filler is never one that is asked for.

Variable tracking is RULER's of 2025, with every statement on a line of its own and a worked example drawn for each
sample; lm-eval's port keeps the form of 2024 (statements between the noise's lines, "assgined", one example for all).
Two repairs: the prompt does not end with a space (a tokenizer would make a token of it that no answer can follow), nor
has the example two in that place; and where the context is short, the example takes a quarter of it and no more. An
example with fewer lines of noise than statements has several before one line.
"""

from __future__ import annotations

import re
import string
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache, partial
from itertools import count, islice
from textwrap import wrap
from typing import TYPE_CHECKING, Literal

import numpy as np

from halobench.tasks.ruler.contract import RulerPrompt
from halobench.tasks.ruler.fitting import CHARACTERS_PER_TOKEN, Gauge, NoRoom, fit, most_units
from halobench.tasks.ruler.words import Kind, distinct

if TYPE_CHECKING:
    from pathlib import Path

    from transformers import PreTrainedTokenizerBase

NOISE = "The grass is green. The sky is blue. The sun is yellow. Here we go. There and back again."
NEEDLE = "One of the special magic {values} for {key} is: {value}."
OPENING_ONE = (
    "A special magic {value} is hidden within the following text. Make sure to memorize it. "
    "I will quiz you about the {value} afterwards.\n"
)
OPENING_MANY = (
    "Some special magic {values} are hidden within the following text. Make sure to memorize it. "
    "I will quiz you about the {values} afterwards.\n"
)
QUESTION_ONE = (
    "\nWhat is the special magic {value} for {query} mentioned in the provided text? "
    "The special magic {value} for {query} mentioned in the provided text is"
)
QUESTION_MANY = (
    "\nWhat are all the special magic {values} for {query} mentioned in the provided text? "
    "The special magic {values} for {query} mentioned in the provided text are"
)
LONGEST = 200
SPARE_SENTENCES = 16
SURPLUS = 1.1  # a whole text takes fewer tokens than its pieces: filler for so much more than its room is enough
DEPTHS = np.round(np.linspace(0, 100, num=40)) / 100

TRACK_OPENING = "Memorize and track the chain(s) of variable assignment hidden in the following text.\n\n"
TRACK_QUESTION = (
    "\nQuestion: Find all variables that are assigned the value {value} in the text above."
    " Answer: According to the chain(s) of variable assignment in the text above, {count} variables are assigned"
    " the value {value}, they are:"
)
HOPS = 4
EXAMPLE_TOKENS = 500


Measure = Callable[[Sequence[str]], np.ndarray]  # tokens of each piece
Places = Callable[[np.ndarray], list[int]]  # from where units end (in tokens, 0 first) to the units behind statements


@dataclass(frozen=True)
class Filler:
    """Units in their order, and how many tokens each takes with the glue that joins it to what stands before.

    spare: more of the kind, whose end fills what whole units leave over.
    """

    glue: str
    units: Sequence[str]
    sizes: np.ndarray
    spare: str


def noise(gauge: Gauge, room: int) -> Filler:
    """RULER's noise sentence, as often as fits `room` tokens and more."""
    size = (gauge.size("\n".join([NOISE] * 9)) - gauge.size(NOISE)) / 8
    count = 2 + int(SURPLUS * room / size)
    return Filler("\n", [NOISE] * count, np.full(count, size), "\n".join([NOISE] * 3))


def drawn(measure: Measure, glue: str, lines: Iterator[str], spare: str, room: int) -> Filler:
    """Lines from the first until they take more than `room` tokens."""
    units: list[str] = []
    sizes: list[int] = []
    missing = SURPLUS * room
    while missing > 0 or not units:
        each = sum(sizes) / len(sizes) if sizes else missing
        fresh = list(islice(lines, 1 + int(missing / max(1.0, each))))
        more = measure([glue + line for line in fresh]).tolist()
        units, sizes, missing = units + fresh, sizes + more, missing - sum(more)
    return Filler(glue, units, np.asarray(sizes), spare)


def at_depths(depths: Sequence[float]) -> Places:
    """The boundaries nearest to depths from 0 (start) to 1, ascending."""
    return lambda ends: [int(np.abs(ends - depth * ends[-1]).argmin()) for depth in depths]


def scattered(count: int, most: int, rng: np.random.Generator) -> Places:
    """So many of up to `most` units at random, none twice, whatever number is used; evenly where there are too few."""
    rank = rng.random(most)

    def places(ends: np.ndarray) -> list[int]:
        units = len(ends) - 1
        if units < count:
            return [number * units // count for number in range(count)]
        return sorted(np.argpartition(rank[:units], count - 1)[:count].tolist())

    return places


class Hidden:
    """A draft of filler with statements in it.

    Any number of the filler's units is used, from the first on; behind the patch, which is filler too. places: before
    which unit each statement stands.
    """

    def __init__(
        self, gauge: Gauge, head: str, tail: str, filler: Filler, statements: Sequence[str], places: Places,
        least: int = 1,
    ) -> None:  # fmt: skip
        self.head, self.tail, self.glue, self.units, self.spare = head, tail, filler.glue, filler.units, filler.spare
        self.statements, self._places = statements, places
        self.least, self.most = least, len(filler.units)
        self.ends = np.cumsum([0, *filler.sizes.tolist()])
        self.fixed = len(gauge.opening) + gauge.size(head + self.glue.join(statements) + tail)

    def estimate(self, units: int) -> float:
        """Tokens of what does not change, and of the units."""
        return self.fixed + float(self.ends[units])

    def places(self, units: int) -> list[int]:
        """Before which of so many units each statement stands, ascending."""
        return self._places(self.ends[: units + 1])

    def _parts(self, units: int) -> tuple[list[str], list[str]]:
        """What stands before the patch's place, and behind it."""
        places = self.places(units)
        first = sum(place == 0 for place in places)
        behind, start = [], 0
        for place, statement in zip(places[first:], self.statements[first:], strict=True):
            behind += [*self.units[start:place], statement]
            start = place
        return list(self.statements[:first]), behind + list(self.units[start:units])

    def compose(self, units: int, patch: str = "") -> str:
        """The whole text."""
        before, behind = self.seam(units)
        return before + patch + behind

    def seam(self, units: int) -> tuple[str, str]:
        """What surrounds the patch."""
        before, behind = self._parts(units)
        return self.head + "".join(part + self.glue for part in before), self.glue.join(behind) + self.tail

    def patches(self, units: int, gap: int) -> list[str]:
        """Ends of the spare filler, each a character longer than the one before."""
        longest = min(len(self.spare), CHARACTERS_PER_TOKEN * (gap + 2))
        starts = (len(self.spare) - size for size in range(1, longest + 1))
        return [self.spare[start:] + self.glue for start in starts if not self.spare[start].isspace()]

    def depth(self, units: int, patch_tokens: int, statement: int) -> float:
        """The share of the filler that stands before a statement."""
        place = self.places(units)[statement]
        before = float(self.ends[place]) + (patch_tokens if place else 0)
        return round(before / (float(self.ends[units]) + patch_tokens), 4)


@lru_cache
def essay_sentences() -> tuple[str, ...]:
    """The held-out text's sentences, white space made single: split behind a stop that ends no short form or initial.

    Those beyond LONGEST characters count as several, so that depths are fine and short contexts have room.
    """
    from halobench.assets import TEXT_HELDOUT, TEXT_LONG
    from halobench.tasks.text import read_jsonl

    texts = (" ".join(document.text.split()) for path in (TEXT_LONG, TEXT_HELDOUT) for document in read_jsonl(path))
    sentences = (part for text in texts for part in re.split(r"(?<=[a-z]{3}[.!?]) (?=[A-Z\"“])", text))
    return tuple(
        piece
        for sentence in sentences
        for piece in wrap(sentence, LONGEST, break_long_words=False, break_on_hyphens=False)
    )


@dataclass(frozen=True, kw_only=True)
class NeedleKind:
    """A needle task: the filler, what keys and values are, how many keys, how many values of each, how many asked."""

    filler: Literal["noise", "essay", "needle"]
    key: Kind = "words"
    value: Kind = "numbers"
    keys: int = 1
    values: int = 1
    asked: int = 1


class NeedleBuilder:
    """Prompts of one needle task."""

    answer_tokens = 128
    any_reference = False

    def __init__(self, kind: NeedleKind, tokenizer: PreTrainedTokenizerBase, data_dir: Path | None, seed: int) -> None:
        self.kind, self.gauge = kind, Gauge(tokenizer)

    def build(self, room: int, length: int, index: int, rng: np.random.Generator) -> RulerPrompt:
        """See contract.Builder."""
        kind = self.kind
        keys, values = distinct(kind.key, rng), distinct(kind.value, rng)
        facts = [(key, next(values)) for key in islice(keys, kind.keys) for _ in range(kind.values)]
        asked = list(dict.fromkeys(key for key, _ in facts))
        asked = [asked[i] for i in rng.permutation(len(asked))[: kind.asked].tolist()]
        order = rng.permutation(len(facts)).tolist()
        head, tail = self._frame(asked)
        needles = [NEEDLE.format(values=kind.value, key=facts[i][0], value=facts[i][1]) for i in order]
        filler = self._filler(room, keys, values, rng)
        depths = np.sort(rng.choice(DEPTHS, size=len(needles), replace=False)).tolist()
        essay = kind.filler == "essay"
        places = at_depths(depths) if essay else scattered(len(needles), len(filler.units), rng)
        draft = Hidden(self.gauge, head, tail, filler, needles, places)
        fitted = fit(self.gauge, draft, room)
        references = tuple(value for wanted in asked for key, value in facts if key == wanted)
        depth = None
        if len(references) == 1:
            place = next(p for p, i in enumerate(order) if facts[i][0] == asked[0])
            depth = draft.depth(fitted.units, self.gauge.size(fitted.patch), place)
        return RulerPrompt(text=fitted.text, ids=fitted.ids, references=references, depth=depth)

    def _frame(self, asked: Sequence[str]) -> tuple[str, str]:
        """What stands before the context, and behind it."""
        kind = self.kind
        query = asked[0] if len(asked) == 1 else f"{', '.join(asked[:-1])}, and {asked[-1]}"
        one = kind.asked * kind.values == 1
        opening, question = (OPENING_ONE, QUESTION_ONE) if one else (OPENING_MANY, QUESTION_MANY)
        names = {"value": kind.value[:-1], "values": kind.value, "query": query}
        return opening.format(**names), question.format(**names)

    def _filler(self, room: int, keys: Iterator[str], values: Iterator[str], rng: np.random.Generator) -> Filler:
        """Filler of the task's kind for `room` tokens; `keys` and `values` are such as no needle that counts has."""
        if self.kind.filler == "noise":
            return noise(self.gauge, room)
        if self.kind.filler == "needle":
            pairs = zip(keys, values, strict=False)
            lines = (NEEDLE.format(values=self.kind.value, key=key, value=value) for key, value in pairs)
            spare = "\n".join(islice(lines, 3))
            return drawn(self.gauge.sizes, "\n", lines, spare, room)
        sentences = essay_sentences()
        start = int(rng.integers(len(sentences)))
        forward = (sentences[(start + i) % len(sentences)] for i in count())
        spare = " ".join(sentences[(start - i) % len(sentences)] for i in range(SPARE_SENTENCES, 0, -1))
        return drawn(self.gauge.known_sizes, " ", forward, spare, room)


niah_single_1 = partial(NeedleBuilder, NeedleKind(filler="noise"))
niah_single_2 = partial(NeedleBuilder, NeedleKind(filler="essay"))
niah_single_3 = partial(NeedleBuilder, NeedleKind(filler="essay", value="uuids"))
niah_multikey_1 = partial(NeedleBuilder, NeedleKind(filler="essay", keys=4))
niah_multikey_2 = partial(NeedleBuilder, NeedleKind(filler="needle"))
niah_multikey_3 = partial(NeedleBuilder, NeedleKind(filler="needle", key="uuids", value="uuids"))
niah_multivalue = partial(NeedleBuilder, NeedleKind(filler="essay", values=4))
niah_multiquery = partial(NeedleBuilder, NeedleKind(filler="essay", keys=4, asked=4))


class TrackingBuilder:
    """Prompts of variable tracking: one chain of five variables in noise, behind a worked example."""

    answer_tokens = 30
    any_reference = False

    def __init__(self, tokenizer: PreTrainedTokenizerBase, data_dir: Path | None, seed: int) -> None:
        self.gauge = Gauge(tokenizer)

    def build(self, room: int, length: int, index: int, rng: np.random.Generator) -> RulerPrompt:
        """See contract.Builder."""
        first, second = (str(number) for number in rng.choice(np.arange(10_000, 100_000), size=2, replace=False))
        example = self._example(min(EXAMPLE_TOKENS, length // 4), first, rng)
        names, statements = _chain(second, 5, rng)
        head, tail = example + TRACK_OPENING, TRACK_QUESTION.format(value=second, count=HOPS + 1)
        filler = noise(self.gauge, room)
        places = scattered(len(statements), len(filler.units), rng)
        draft = Hidden(self.gauge, head, tail, filler, statements, places)
        fitted = fit(self.gauge, draft, room)
        return RulerPrompt(text=fitted.text, ids=fitted.ids, references=tuple(names))

    def _example(self, budget: int, value: str, rng: np.random.Generator) -> str:
        """A question with its answer, with as much noise as fits `budget` tokens."""
        names, statements = _chain(value, 3, rng)
        tail = f"{TRACK_QUESTION.format(value=value, count=HOPS + 1)} {' '.join(names)}\n\n"
        filler = noise(self.gauge, budget)
        places = scattered(len(statements), len(filler.units), rng)
        draft = Hidden(self.gauge, TRACK_OPENING, tail, filler, statements, places, least=0)
        try:
            return most_units(self.gauge, draft, budget).text
        except NoRoom:
            return draft.compose(0)


def _chain(value: str, letters: int, rng: np.random.Generator) -> tuple[list[str], list[str]]:
    """Names of variables that all come to have `value`, and the assignments in order."""
    names: list[str] = []
    while len(names) < HOPS + 1:
        name = "".join(rng.choice(list(string.ascii_uppercase), size=letters).tolist())
        names += [name] if name not in names else []
    hops = [f"VAR {later} = VAR {earlier} " for earlier, later in zip(names[:-1], names[1:], strict=True)]
    return names, [f"VAR {names[0]} = {value}", *hops]
