"""Words to be counted: RULER's common words (cwe) and frequent coded words (fwe).

cwe has ten common words among others in a numbered list, behind one worked example. RULER repeats them 30 times to 3
from 4096 tokens on, and 6 times to 1 below; where that leaves no room for as many other words as common ones, the
ratio falls by the steps of RATIOS until it does, down to 2 to 1. The list ends with one word more, of the size that
fills the length. Once single words have run out, the others are pairs (adjective-noun), as the needle tasks' keys;
RULER changes to another word list.

fwe has coded words whose frequencies follow a Zipf law with exponent 2, the first rank being dots; a few more dots at
its end fill the length. In both, the places of the words are drawn for each sample; RULER shuffles all by one seed.
"""

from __future__ import annotations

import math
import string
from collections.abc import Sequence
from itertools import islice
from typing import TYPE_CHECKING

import numpy as np

from halobench.tasks.ruler.contract import RulerPrompt
from halobench.tasks.ruler.fitting import Gauge, NoRoom, fit
from halobench.tasks.ruler.words import compounds, word_list

if TYPE_CHECKING:
    from pathlib import Path

    from transformers import PreTrainedTokenizerBase

COMMON = 10
LONG = 4096  # RULER's numbers change here
RATIOS = ((30, 3), (20, 2), (10, 1), (6, 1), (5, 1), (4, 1), (3, 1), (2, 1))
SHORT_RATIO = RATIOS.index((6, 1))
CWE_OPENING = (
    "Below is a numbered list of words. In these words, some appear more often than others. "
    "Memorize the ones that appear most often.\n"
)
CWE_QUESTION = (
    "\nQuestion: What are the 10 most common words in the above list?"
    " Answer: The top 10 words that appear most often in the list are:"
)
FWE_OPENING = (
    "Read the following coded text and track the frequency of each coded word. "
    "Find the three most frequently appeared coded words. "
)
FWE_QUESTION = (
    "\nQuestion: Do not provide any explanation. Please ignore the dots '....'. "
    "What are the three most frequently appeared words in the above coded text?"
    " Answer: According to the coded text above, the three most frequently appeared words are:"
)
DOTS = "..."
LETTERS = 6
SPARE_WORDS = 256
LEAST_ENTRY = 2  # tokens of a number and its word, in any tokenizer


def _numbered(words: Sequence[str]) -> str:
    return " ".join(f"{number}. {word}" for number, word in enumerate(words, 1))


class WordList:
    """A draft of a numbered list: the common words, and as many entries of the others as units."""

    def __init__(
        self, gauge: Gauge, head: str, common: Sequence[str], others: Sequence[str], least: int,
        spare: Sequence[str], rng: np.random.Generator,
    ) -> None:  # fmt: skip
        self.head, self.common, self.others, self.spare = head, common, others, spare
        self.least, self.most = least, len(others)
        self.order = rng.random(len(common) + len(others))
        self.gauge = gauge
        sizes = gauge.known_sizes([f" {word}" for word in [*dict.fromkeys(common), *others]])
        once = len(dict.fromkeys(common))
        repeats = len(common) // once
        digits = gauge.sizes([f" {'1' * (place + 1)}." for place in range(7)])
        numbers = np.cumsum([0, *(digits[len(str(i + 1)) - 1] for i in range(len(self.order)))])
        entries = np.cumsum([int(sizes[:once].sum()) * repeats, *sizes[once:]])
        self.fixed = len(gauge.opening) + gauge.size(head + CWE_QUESTION)
        self.ends = entries + numbers[len(common) :]

    def estimate(self, units: int) -> float:
        """Tokens of the frame and of the list."""
        return self.fixed + float(self.ends[units])

    def compose(self, units: int, patch: str = "") -> str:
        """The whole text; an entry keeps its place among the others whatever their number."""
        words = [*self.common, *self.others[:units]]
        order = np.argsort(self.order[: len(words)], kind="stable").tolist()
        return self.head + _numbered([words[i] for i in order]) + patch + CWE_QUESTION

    def seam(self, units: int) -> tuple[str, str]:
        """What surrounds the last entry."""
        return self.compose(units).removesuffix(CWE_QUESTION), CWE_QUESTION

    def patches(self, units: int, gap: int) -> list[str]:
        """One more entry, with spare words from small to large."""
        entries = [f" {len(self.common) + units + 1}. {word}" for word in self.spare]
        return [entries[i] for i in np.argsort(self.gauge.sizes(entries), kind="stable").tolist()]


class CommonWords:
    """Prompts of cwe."""

    answer_tokens = 120
    any_reference = False

    def __init__(self, tokenizer: PreTrainedTokenizerBase, data_dir: Path | None, seed: int) -> None:
        self.gauge = Gauge(tokenizer)

    def build(self, room: int, length: int, index: int, rng: np.random.Generator) -> RulerPrompt:
        """See contract.Builder."""
        short = length < LONG
        shown, example = _pick(rng, 20 if short else 40)
        frequent, rare = (3, 1) if short else (10, 3)
        text = _numbered(rng.permutation([*shown * frequent, *example * rare]).tolist())
        head = f"{CWE_OPENING}{text}{CWE_QUESTION} {_numbered(shown)}\n{CWE_OPENING}"
        common, others = _pick(rng, None)
        pairs = compounds(rng)
        seen = {*common, *others}
        spare = [*others[-SPARE_WORDS:], *(pair for pair in islice(pairs, SPARE_WORDS) if pair not in seen)]
        seen.update(spare)
        others = others[:-SPARE_WORDS]
        wanted = room // 4 + COMMON
        others += [p for p in dict.fromkeys(islice(pairs, max(0, wanted - len(others)))) if p not in seen]
        state = int(rng.integers(2**63))
        for frequent, rare in RATIOS[SHORT_RATIO if short else 0 :]:
            if LEAST_ENTRY * COMMON * (frequent + rare) > room and (frequent, rare) != RATIOS[-1]:
                continue
            entries = [word for word in others[: wanted // rare + COMMON] for _ in range(rare)]
            order = np.random.default_rng(state)
            draft = WordList(self.gauge, head, common * frequent, entries, COMMON * rare, spare, order)
            try:
                fitted = fit(self.gauge, draft, room)
            except NoRoom as none:
                needed = none.needed
            else:
                return RulerPrompt(text=fitted.text, ids=fitted.ids, references=tuple(common))
        raise NoRoom(needed)


def _pick(rng: np.random.Generator, count: int | None) -> tuple[list[str], list[str]]:
    """So many different words (None: all): the common ones, and the others."""
    words = rng.permutation(word_list("noun", "adjective", "verb"))[:count].tolist()
    return words[:COMMON], words[COMMON:]


class CodedText:
    """A draft of a coded text; its units are the number that every word's share is taken of."""

    def __init__(self, gauge: Gauge, vocabulary: Sequence[str], most: int, seed: int) -> None:
        self.vocabulary, self.seed = vocabulary, seed
        self.shares = np.arange(1, len(vocabulary) + 1) ** -2.0 / (math.pi**2 / 6)
        # The fourth rank is asked for and the fifth is not: from here on they never come equally often.
        self.least, self.most = math.ceil(1 / (self.shares[3] - self.shares[4])), most
        self.sizes = gauge.sizes([f" {word}" for word in vocabulary])
        self.fixed = len(gauge.opening) + gauge.size(FWE_OPENING + FWE_QUESTION)

    def counts(self, units: int) -> np.ndarray:
        """How often each word comes."""
        return np.floor(units * self.shares).astype(np.int64)

    def estimate(self, units: int) -> float:
        """Tokens of the frame and of all words."""
        return self.fixed + float(self.counts(units) @ self.sizes)

    def compose(self, units: int, patch: str = "") -> str:
        """The whole text."""
        places = np.repeat(np.arange(len(self.vocabulary)), self.counts(units))
        order = np.random.default_rng((self.seed, units)).permutation(places)
        return FWE_OPENING + " ".join(self.vocabulary[i] for i in order.tolist()) + patch + FWE_QUESTION

    def seam(self, units: int) -> tuple[str, str]:
        """What surrounds the last dots."""
        return self.compose(units).removesuffix(FWE_QUESTION), FWE_QUESTION

    def patches(self, units: int, gap: int) -> list[str]:
        """More and more dots."""
        return [f" {DOTS}" * count for count in range(1, gap + 1)]


class FrequentWords:
    """Prompts of fwe."""

    answer_tokens = 50
    any_reference = False

    def __init__(self, tokenizer: PreTrainedTokenizerBase, data_dir: Path | None, seed: int) -> None:
        self.gauge = Gauge(tokenizer)

    def build(self, room: int, length: int, index: int, rng: np.random.Generator) -> RulerPrompt:
        """See contract.Builder."""
        count = max(6, (length - self.answer_tokens) // 50)
        words: dict[str, None] = {}
        while len(words) < count:
            letters = rng.choice(list(string.ascii_lowercase), size=(count, LETTERS)).tolist()
            words.update(dict.fromkeys("".join(row) for row in letters))
        vocabulary = [DOTS, *list(words)[1:count]]
        draft = CodedText(self.gauge, vocabulary, 100 + 2 * room, int(rng.integers(2**31)))
        fitted = fit(self.gauge, draft, room)
        return RulerPrompt(text=fitted.text, ids=fitted.ids, references=tuple(vocabulary[1:4]))
