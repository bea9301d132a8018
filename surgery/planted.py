"""Planted retrieval for training: needles in real filler, key-value lists and tiled repeats.

Models this small learn to retrieve only when dense copying is part of the mixture. Words and sentence templates here
are kept apart from the evaluation's (`tasks/needle.py`): nouns are split in two by a hash, templates are disjoint.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache
from importlib.resources import files
from typing import TYPE_CHECKING, Literal

import numpy as np

from halobench.surgery.windows import TextSource

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

ANSWER_WEIGHT = 4.0
LIST_WEIGHT = 0.25  # random keys and values cannot be predicted where they first stand

TEMPLATES: tuple[tuple[str, str], ...] = (
    (" The secret code of the {key} is {value}.", "\nWhat is the secret code of the {key}? It is {value}."),
    (" Remember that the {key} has the label {value}.", "\nWhich label has the {key}? The label {value}."),
    (" The number of the {key} was {value}.", "\nRecall the number of the {key}: {value}."),
    (" In the register, {key} stands beside {value}.", "\nIn the register, {key} stands beside {value}."),
    (" A note said: {key} is worth {value}.", "\nHow much is {key} worth? It is worth {value}."),
    ("\n{key}: {value}\n", "\n{key}: {value}"),
)
SEPARATORS: tuple[tuple[str, str], ...] = (
    (" = ", "\n"),
    (" -> ", "; "),
    (" is ", ". "),
    (": ", ", "),
    (" | ", "\n"),
    (" got ", ", "),
    (" ", "\n"),
)


@lru_cache
def nouns(split: Literal["train", "eval"]) -> tuple[str, ...]:
    """Common nouns of one lower-case word, half of them for training and the other half for evaluation."""
    text = files("wonderwords").joinpath("assets/nounlist.txt").read_text()
    words = sorted({w for w in text.split("\n") if w.isalpha() and w.islower() and 3 <= len(w) <= 10})
    wanted = 0 if split == "train" else 1
    return tuple(w for w in words if hashlib.sha256(w.encode()).digest()[0] % 2 == wanted)


@dataclass(frozen=True)
class Sequence:
    """One training sequence: token ids (length,), and the weight of each as a target (length,)."""

    tokens: np.ndarray
    weights: np.ndarray


def random_value(rng: np.random.Generator) -> str:
    """Mostly numbers of 3 to 7 digits, now and then a word."""
    if rng.random() < 0.15:
        return str(rng.choice(nouns("train")))
    digits = int(rng.integers(3, 8)) if rng.random() < 0.5 else 5
    return "".join(str(d) for d in rng.integers(0, 10, digits))


# Gives the real text of a sequence when a kind needs it: (length,) token ids.
Filler = Callable[[], np.ndarray]
_TRAINING, _HELD_OUT = 7, 11  # domains of the draw's seed: held-out sequences are never those of training


class Planted:
    """Draws synthetic retrieval sequences; what is drawn depends on the seed and the sequence's index alone.

    Args:
        tokenizer: a fast tokenizer.
        filler: real text around the needles. It may be the text of the mixture itself: at one position either the text
            or a planted sequence is drawn, never both.
        seed: of the draw.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, filler: TextSource, seed: int) -> None:
        self.tokenizer, self.filler, self.seed = tokenizer, filler, seed
        self.kinds: dict[str, tuple[float, Callable[[np.random.Generator, Filler, int], Sequence]]] = {
            "needles": (0.15, self._needles),
            "lists": (0.20, self._lists),
            "repeats": (0.40, self._repeats),
            "separators": (0.25, self._separators),
        }

    def sequence(self, index: int, length: int, position: int) -> Sequence:
        """The `index`-th sequence of `length` tokens; real text in it begins the filler's window at `position`."""
        return self._draw((self.seed, index, _TRAINING), length, lambda: self.filler.window(position, length))

    def held_out(self, index: int, length: int) -> Sequence:
        """The `index`-th sequence that is never trained on, its draw and its real text alike."""
        return self._draw((self.seed, index, _HELD_OUT), length, lambda: self.filler.held_out(index, length))

    def _draw(self, seed: tuple[int, ...], length: int, filler: Filler) -> Sequence:
        rng = np.random.default_rng(seed)
        shares = np.array([share for share, _ in self.kinds.values()])
        kind = list(self.kinds)[int(rng.choice(len(shares), p=shares / shares.sum()))]
        return self.kinds[kind][1](rng, filler, length)

    def _encode(self, texts: list[str]) -> list[list[int]]:
        return self.tokenizer(texts, add_special_tokens=False, verbose=False)["input_ids"]

    def _pairs(self, rng: np.random.Generator, count: int) -> list[tuple[str, str]]:
        """Pairs of distinct keys and their values; keys are single words as long as there are enough."""
        words = nouns("train")
        if count > len(words):
            numbers = rng.choice(len(words) ** 2, size=count, replace=False)
            keys = [f"{words[i // len(words)]} {words[i % len(words)]}" for i in numbers]
            return [(key, random_value(rng)) for key in keys]
        keys = [str(word) for word in rng.choice(words, size=count, replace=False)]
        if rng.random() < 0.25:
            keys = [f"{word} {key}" for word, key in zip(rng.choice(words, size=count), keys, strict=True)]
        return [(key, random_value(rng)) for key in keys]

    def _needles(self, rng: np.random.Generator, filler: Filler, length: int) -> Sequence:
        """One to eight facts inside real text, then questions about them in another order."""
        statement, question = TEMPLATES[int(rng.integers(len(TEMPLATES)))]
        pairs = self._pairs(rng, int(rng.integers(1, max(2, min(8, length // 48) + 1))))
        facts = self._encode([statement.format(key=k, value=v) for k, v in pairs])
        asked = [pairs[i] for i in rng.permutation(len(pairs))]
        before, value, after = question.partition("{value}")
        asks = self._encode([before.format(key=k).rstrip(" ") for k, _ in asked])
        space = " " if before.endswith(" ") else ""
        answers = self._encode([space + v for _, v in asked])
        ends = self._encode([after] * len(asked)) if after else [[]] * len(asked)
        tail = [(ids, w) for q, a, e in zip(asks, answers, ends, strict=True) for ids, w in _ask(q, a, e)]
        room = length - sum(map(len, facts)) - sum(len(ids) for ids, _ in tail)
        text = filler()[: max(room, len(facts))]
        places = np.sort(rng.integers(0, len(text), len(facts)))
        parts: list[tuple[list[int], float]] = []
        last = 0
        for place, fact in zip(places, facts, strict=True):
            parts += [(list(text[last:place]), 1.0), (fact, 1.0)]
            last = int(place)
        return _assemble([*parts, (list(text[last:]), 1.0), *tail], length)

    def _lists(self, rng: np.random.Generator, filler: Filler, length: int) -> Sequence:
        return self._key_values(rng, ": ", "\n", length)

    def _separators(self, rng: np.random.Generator, filler: Filler, length: int) -> Sequence:
        return self._key_values(rng, *SEPARATORS[int(rng.integers(len(SEPARATORS)))], length)

    def _key_values(self, rng: np.random.Generator, between: str, end: str, length: int) -> Sequence:
        """A list of pairs, then the keys again in random order, each with its value as the answer."""
        count = max(2, int(length / 10 * rng.uniform(0.15, 0.6)))
        pairs = self._pairs(rng, count)
        order = [pairs[i] for _ in range(8) for i in rng.permutation(count)][: length // 6]
        glue = " " if between.endswith(" ") else ""
        stem = between.rstrip(" ")
        texts = [f"{k}{between}{v}{end}" for k, v in pairs]
        texts += [f"{k}{stem}" for k, _ in order] + [f"{glue}{v}" for _, v in order] + [end]
        ids = self._encode(texts)
        asks, answers = ids[count : count + len(order)], ids[count + len(order) : -1]
        parts = [(item, LIST_WEIGHT) for item in ids[:count]]
        parts += [part for q, a in zip(asks, answers, strict=True) for part in _ask(q, a, ids[-1], LIST_WEIGHT)]
        return _assemble(parts, length)

    def _repeats(self, rng: np.random.Generator, filler: Filler, length: int) -> Sequence:
        """A segment of text, or of random tokens, tiled to fill the length."""
        period = int(np.exp(rng.uniform(np.log(8), np.log(max(8.0, length * 0.6)))))
        real = rng.random() < 0.5
        segment = filler()[:period] if real else rng.integers(3, len(self.tokenizer), period)
        tokens = np.tile(segment, length // period + 1)[:length]
        weights = np.full(length, 2.0)
        weights[:period] = 1.0 if real else 0.0
        return Sequence(tokens.astype(np.int64), weights)


def _ask(question: list[int], answer: list[int], end: list[int], weight: float = 1.0) -> list[tuple[list[int], float]]:
    return [(question, weight), (answer, ANSWER_WEIGHT), (end, weight)]


def _assemble(parts: list[tuple[list[int], float]], length: int) -> Sequence:
    tokens = np.concatenate([np.asarray(ids, dtype=np.int64) for ids, _ in parts])
    weights = np.concatenate([np.full(len(ids), weight) for ids, weight in parts])
    if len(tokens) < length:  # begin again from the start rather than pad
        repeats = -(-length // len(tokens))
        tokens, weights = np.tile(tokens, repeats), np.tile(weights, repeats)
    return Sequence(tokens[:length], weights[:length])


class Mixture:
    """Text and planted retrieval in a given proportion.

    Args:
        text: packed text.
        planted: synthetic sequences, or None for text alone.
        share: proportion of sequences that are planted, 0 to 1.
        seed: of the choice.
    """

    def __init__(self, text: TextSource, planted: Planted | None, share: float, seed: int) -> None:
        self.text, self.planted, self.share, self.seed = text, planted, share, seed

    def sequence(self, index: int, length: int, position: int) -> Sequence:
        """A training sequence of `length` tokens; the answer depends on the seed and the arguments alone.

        Args:
            index: running number of the sequence, over all stages.
            position: tokens of all sequences before it, over all stages (`length` of each, planted or not).
        """
        if self.planted is not None and self._plants(index, 3):
            return self.planted.sequence(index, length, position)
        return Sequence(self.text.window(position, length), np.ones(length))

    def held_out(self, index: int, length: int) -> Sequence:
        """The `index`-th sequence, from 0, that training never sees; the same share of them is planted."""
        if self.planted is not None and self._plants(index, 5):
            return self.planted.held_out(index, length)
        return Sequence(self.text.held_out(index, length), np.ones(length))

    def _plants(self, index: int, domain: int) -> bool:
        return bool(np.random.default_rng((self.seed, index, domain)).random() < self.share)
