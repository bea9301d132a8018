"""The words of RULER's prompts: common nouns, adjectives and verbs, and keys made of them."""

from __future__ import annotations

import uuid
from collections.abc import Iterator
from functools import lru_cache
from importlib.resources import files
from typing import Literal

import numpy as np

Kind = Literal["words", "numbers", "uuids"]
NUMBER_DIGITS = 7


@lru_cache
def word_list(*parts: Literal["noun", "adjective", "verb"]) -> tuple[str, ...]:
    """All words of these parts of speech, each once, in alphabetic order."""
    folder = files("wonderwords").joinpath("assets")
    lines = [line.strip() for part in parts for line in folder.joinpath(f"{part}list.txt").read_text().split("\n")]
    return tuple(sorted({line for line in lines if line}))


def compounds(rng: np.random.Generator) -> Iterator[str]:
    """Random keys of the form adjective-noun, of which there are six million."""
    adjectives, nouns = word_list("adjective"), word_list("noun")
    while True:
        firsts, seconds = rng.integers(len(adjectives), size=256), rng.integers(len(nouns), size=256)
        yield from (f"{adjectives[a]}-{nouns[n]}" for a, n in zip(firsts.tolist(), seconds.tolist(), strict=True))


def _numbers(rng: np.random.Generator) -> Iterator[str]:
    while True:
        yield from map(str, rng.integers(10 ** (NUMBER_DIGITS - 1), 10**NUMBER_DIGITS, size=256).tolist())


def _uuids(rng: np.random.Generator) -> Iterator[str]:
    while True:
        yield str(uuid.UUID(bytes=rng.bytes(16), version=4))


def distinct(kind: Kind, rng: np.random.Generator) -> Iterator[str]:
    """Keys or values of a kind, at random, none twice."""
    seen: set[str] = set()
    for text in {"words": compounds, "numbers": _numbers, "uuids": _uuids}[kind](rng):
        if text not in seen:
            seen.add(text)
            yield text
