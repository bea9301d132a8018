"""Prompts of an exact length: how many units of filler fit, and the piece that fills what they leave over.

Token counts of pieces are only ever a guess (tokenizers merge across seams); the count of the whole text decides.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import islice
from typing import TYPE_CHECKING, Protocol

import numpy as np

from halobench.tasks.scoring import encode, special_prefix

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

SEAM = 80  # characters on either side of a seam that may decide how it is tokenised
REMEMBERED = 65536
SLACK = 4096  # a gap of one token in so many is left: to close it would be to tokenise the whole text again
CHARACTERS_PER_TOKEN = 8  # more than any tokenizer reaches on English: how much text is surely enough for some tokens


class NoRoom(Exception):  # noqa: N818
    """Not even the least prompt fits; `needed` is what it takes, in tokens."""

    def __init__(self, needed: int) -> None:
        super().__init__(f"{needed} tokens are needed")
        self.needed = needed


class Gauge:
    """Counts tokens with one tokenizer; `opening` is what it puts before every text."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase) -> None:
        self.tokenizer = tokenizer
        self.opening = special_prefix(tokenizer)
        self._known: dict[str, int] = {}

    def ids(self, text: str) -> list[int]:
        """A prompt's token ids, the opening included."""
        return [*self.opening, *encode(self.tokenizer, [text])[0]]

    def size(self, text: str) -> int:
        """Tokens of one piece by itself."""
        return int(self.sizes([text])[0])

    def sizes(self, texts: Sequence[str]) -> np.ndarray:
        """Tokens of each piece by itself: (pieces,)."""
        return np.array([len(ids) for ids in encode(self.tokenizer, texts)], dtype=np.int64)

    def known_sizes(self, texts: Sequence[str]) -> np.ndarray:
        """The same for pieces of a kind that come again; the first REMEMBERED are tokenised once."""
        new = [text for text in dict.fromkeys(texts) if text not in self._known]
        fresh = dict(zip(new, self.sizes(new).tolist(), strict=True))
        self._known.update(islice(fresh.items(), max(0, REMEMBERED - len(self._known))))
        known = {**self._known, **fresh} if len(self._known) >= REMEMBERED else self._known
        return np.array([known[text] for text in texts], dtype=np.int64)


class Draft(Protocol):
    """A prompt whose number of units is still open, from `least` to `most`."""

    least: int
    most: int

    def estimate(self, units: int) -> float:
        """Tokens of the prompt, about; grows with the units."""

    def compose(self, units: int, patch: str = "") -> str:
        """The text; `patch` goes in as it is, at the one place for it."""

    def seam(self, units: int) -> tuple[str, str]:
        """The text right before and right behind the place of the patch."""

    def patches(self, units: int, gap: int) -> Sequence[str]:
        """Patches of growing size, up to `gap` tokens and more where there is that much."""


@dataclass(frozen=True)
class Fitted:
    """A prompt: its text, its token ids, and what it was made of."""

    text: str
    ids: list[int]
    units: int
    patch: str = ""


def fit(gauge: Gauge, draft: Draft, room: int) -> Fitted:
    """The prompt of `room` tokens, or the nearest below that the units and patches of `draft` give; never one above.

    From SLACK tokens on, one that lacks a token in so many is near enough.

    Raises NoRoom when the fewest units are too many.
    """
    whole = most_units(gauge, draft, room)
    best, enough = whole, room - room // SLACK
    for units in (whole.units, whole.units - 1):  # a gap that is too small for any patch is wide enough one unit back
        if len(best.ids) >= enough or units < draft.least:
            break
        bare = whole if units == whole.units else _compose(gauge, draft, units)
        patched = _patched(gauge, draft, bare, room, enough)
        best = max(best, patched, key=lambda fitted: len(fitted.ids))
    return best


def _compose(gauge: Gauge, draft: Draft, units: int, patch: str = "") -> Fitted:
    text = draft.compose(units, patch)
    return Fitted(text, gauge.ids(text), units, patch)


def most_units(gauge: Gauge, draft: Draft, room: int) -> Fitted:
    """The prompt with the most units that fit, by what the guesses say once they are scaled to a whole text's count."""
    low, high, scale = draft.least - 1, draft.most + 1, 1.0
    best: Fitted | None = None
    needed = 0
    while high - low > 1:
        units = min(max(_guess(draft, room / scale), low + 1), high - 1)
        made = _compose(gauge, draft, units)
        scale = len(made.ids) / max(1.0, draft.estimate(units))
        if len(made.ids) > room:
            high, needed = units, len(made.ids)
            continue
        low, best = units, made
        if units < draft.most and draft.estimate(units + 1) * scale > room:
            break
    if best is None:
        raise NoRoom(needed)
    return best


def _guess(draft: Draft, room: float) -> int:
    """The most units whose estimate is within `room`; `draft.least` when there are none."""
    low, high = draft.least, draft.most
    while low < high:
        middle = (low + high + 1) // 2
        low, high = (middle, high) if draft.estimate(middle) <= room else (low, middle - 1)
    return low


def _patched(gauge: Gauge, draft: Draft, bare: Fitted, room: int, enough: int) -> Fitted:
    """`bare` with the patch that fills it up: measured at the seam, proven on the whole text, corrected a few times."""
    gap = room - len(bare.ids)
    pieces = draft.patches(bare.units, gap)
    before, behind = draft.seam(bare.units)
    before, behind = before[-SEAM:], behind[:SEAM]
    alone = gauge.size(before + behind)
    known: dict[int, int] = {}

    def added(index: int) -> int:
        if index not in known:
            known[index] = gauge.size(before + pieces[index] + behind) - alone
        return known[index]

    best, target = bare, gap
    tried: set[int] = set()
    while pieces and len(tried) < 4:
        low, high = -1, len(pieces) - 1
        while low < high:
            middle = (low + high + 1) // 2
            low, high = (middle, high) if added(middle) <= target else (low, middle - 1)
        near = [i for i in range(max(0, low - 6), min(len(pieces), low + 7)) if added(i) <= target and i not in tried]
        if not near:
            break
        choice = max(near, key=added)
        tried.add(choice)
        made = _compose(gauge, draft, bare.units, pieces[choice])
        if len(best.ids) < len(made.ids) <= room:
            best = made
        if enough <= len(made.ids) <= room:
            break
        target = gap - (len(made.ids) - len(bare.ids) - added(choice))
    return best
