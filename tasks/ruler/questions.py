"""Questions among documents: RULER's qa_1 (SQuAD) and qa_2 (HotpotQA), from files in a data folder.

A sample's question is one whose documents fit the length; which come, and in what order, is drawn by the seed. Where
all fit, sample i asks the same question at every length: lengths are compared on paired questions, and the samples of
several lengths are no more questions than those of one.

Other documents fill the context: first those of the same article (SQuAD) or question (HotpotQA), then any, and from
the start again once all are used; the last is cut where the length is full. Unlike RULER, the documents are shuffled
anew for each sample (there the right one always stands in the same place); of a HotpotQA question's ten pages only
those that support the answer are in every prompt, and its distractors come first among the others (RULER has all ten
in all, which a thousand tokens have no room for); and questions whose answer is in none of their documents, as
HotpotQA's yes and no, are left out.
"""

from __future__ import annotations

import gzip
import json
import zlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from halobench.errors import UserError
from halobench.tasks.ruler.contract import RulerPrompt
from halobench.tasks.ruler.fitting import CHARACTERS_PER_TOKEN, Gauge, fit

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

INSTRUCTION = (
    "Answer the question based on the given documents. Only give me the answer and do not output any other words.\n\n"
)
OPENING = f"{INSTRUCTION}The following are given documents.\n\n"
QUESTION = f"\n\n{INSTRUCTION}Question: {{query}} Answer:"
SQUAD_FILES = ("ruler_babilong/squad_v2.0.dev.json.gz", "dev-v2.0.json")
HOTPOT_FILES = ("hotpot_dev_distractor_v1.json",)
SCARCE, TRIED = 8, 64  # one question in so many must fit a length, once so many are tried
ONE_MORE = 16  # tokens that another document is worth beginning for


@dataclass(frozen=True, kw_only=True)
class Asked:
    """A question, its answers, the documents (by index) that it needs, and those that are about the same."""

    query: str
    answers: tuple[str, ...]
    needed: tuple[int, ...]
    related: tuple[int, ...]


@dataclass(frozen=True)
class Library:
    """Questions, and the documents they are asked about."""

    questions: list[Asked]
    documents: list[str]


def read_squad(path: Path) -> Library:
    """The answerable questions of a file in the form of SQuAD 2.0's dev-v2.0.json."""
    with _reading(path, "SQuAD 2.0's dev-v2.0.json") as data:
        articles = [article["paragraphs"] for article in data["data"]]
        number = _numbered(p["context"] for article in articles for p in article)
        questions = []
        for article in articles:
            others = dict.fromkeys(number[p["context"]] for p in article)
            for paragraph in article:
                own = number[paragraph["context"]]
                related = tuple(i for i in others if i != own)
                for row in paragraph["qas"]:
                    answers = () if row["is_impossible"] else (answer["text"] for answer in row["answers"])
                    questions += _asked(row["question"], answers, (paragraph["context"],), (own,), related)
    return Library(questions, list(number))


def read_hotpot(path: Path) -> Library:
    """The questions of a file in the form of HotpotQA's hotpot_dev_distractor_v1.json."""
    with _reading(path, "HotpotQA's hotpot_dev_distractor_v1.json") as data:
        number = _numbered(_page(*page) for row in data for page in row["context"])
        questions = []
        for row in data:
            titles = {title for title, _ in row["supporting_facts"]}
            pages = [(_page(*page), page[0] in titles) for page in row["context"]]
            needed = tuple(page for page, supports in pages if supports)
            related = tuple(number[page] for page, supports in pages if not supports)
            answer = () if row["answer"] in ("yes", "no") else (row["answer"],)
            questions += _asked(row["question"], answer, needed, tuple(number[page] for page in needed), related)
    return Library(questions, list(number))


def _page(title: str, sentences: Sequence[str]) -> str:
    return f"{title}\n{''.join(sentences)}"


def _numbered(texts: Iterator[str]) -> dict[str, int]:
    return {text: i for i, text in enumerate(sorted(set(texts)))}


def _asked(
    query: str, answers: Any, texts: Sequence[str], needed: tuple[int, ...], related: tuple[int, ...]
) -> list[Asked]:
    """The question, if one of its answers is in the texts."""
    found = tuple(dict.fromkeys(a for a in answers if a and any(a in text for text in texts)))
    return [Asked(query=query, answers=found, needed=needed, related=related)] if found else []


class _reading:  # noqa: N801
    """Opens a JSON file, gzipped or not; what is missing in it becomes one line."""

    def __init__(self, path: Path, form: str) -> None:
        self.path, self.form = path, form

    def __enter__(self) -> Any:
        try:
            opener: Callable[..., Any] = gzip.open if self.path.suffix == ".gz" else open
            with opener(self.path, "rt", encoding="utf-8") as file:
                return json.load(file)
        except (EOFError, OSError, ValueError, zlib.error) as error:
            raise UserError(f"{self.path} cannot be read as JSON ({error}); give {self.form}") from error

    def __exit__(self, kind: type | None, error: BaseException | None, trace: object) -> None:
        if isinstance(error, KeyError | TypeError | ValueError | IndexError):
            raise UserError(f"{self.path} is not in the form of {self.form} ({error!r})") from error


def find_file(names: Sequence[str], data_dir: Path | None) -> Path | None:
    """The first of `names` that is in the data folder."""
    paths = [data_dir / name for name in names] if data_dir is not None else []
    return next((path for path in paths if path.is_file()), None)


class Documents:
    """A draft of numbered documents: those needed, and as many others as units, in an order drawn beforehand."""

    least = 0

    def __init__(
        self, gauge: Gauge, query: str, needed: Sequence[str], others: Sequence[str], spare: str,
        rng: np.random.Generator,
    ) -> None:  # fmt: skip
        self.tail = QUESTION.format(query=query)
        self.documents, self.needed, self.spare = [*needed, *others], len(needed), spare
        self.most = len(others)
        self.order = rng.random(len(self.documents))
        known = list(dict.fromkeys(self.documents))
        size = dict(zip(known, gauge.sizes([_document(10, text) for text in known]).tolist(), strict=True))
        self.ends = np.cumsum([size[text] for text in self.documents])
        self.fixed = len(gauge.opening) + gauge.size(OPENING + self.tail)

    def estimate(self, units: int) -> float:
        """Tokens of the frame and of the documents."""
        return self.fixed + float(self.ends[self.needed + units - 1])

    def _body(self, units: int) -> str:
        order = np.argsort(self.order[: self.needed + units], kind="stable").tolist()
        texts = [_document(number, self.documents[i]) for number, i in enumerate(order, 1)]
        return OPENING + "\n\n".join(texts)

    def compose(self, units: int, patch: str = "") -> str:
        """The whole text."""
        return self._body(units) + patch + self.tail

    def seam(self, units: int) -> tuple[str, str]:
        """What surrounds the last document."""
        return self._body(units), self.tail

    def patches(self, units: int, gap: int) -> list[str]:
        """Beginnings of the spare document, as the last one; few words of it only lengthen the one that is last."""
        opening = " " if gap < ONE_MORE else "\n\n" + _document(self.needed + units + 1, "")
        longest = min(len(self.spare), CHARACTERS_PER_TOKEN * (gap + 2))
        return [opening + self.spare[:size] for size in range(1, longest + 1) if not self.spare[size - 1].isspace()]


def _document(number: int, text: str) -> str:
    return f"Document {number}:\n{text}"


class QuestionBuilder:
    """Prompts of one of the two tasks."""

    answer_tokens = 32
    any_reference = True

    def __init__(
        self,
        read: Callable[[Path], Library],
        names: tuple[str, ...],
        tokenizer: PreTrainedTokenizerBase,
        data_dir: Path | None,
        seed: int,
    ) -> None:
        path = find_file(names, data_dir)
        if path is None:
            raise UserError(missing(names, data_dir))
        self.gauge, self.library = Gauge(tokenizer), read(path)
        if not self.library.questions:
            raise UserError(f"{path} has no question with an answer in its documents; give the whole file")
        self.order = np.random.default_rng((seed, 17)).permutation(len(self.library.questions))
        self._sizes: dict[int, int] = {}
        self._fitting: dict[int, tuple[list[int], int]] = {}

    def build(self, room: int, length: int, index: int, rng: np.random.Generator) -> RulerPrompt:
        """See contract.Builder."""
        asked = self.library.questions[self._question(room, index)]
        documents = self.library.documents
        rest = np.setdiff1d(np.arange(len(documents)), [*asked.needed, *asked.related])
        shuffled = [*rng.permutation(asked.related).tolist(), *rng.permutation(rest).tolist()]
        others: list[str] = []
        characters = CHARACTERS_PER_TOKEN * room
        while characters > 0 and shuffled:
            others.append(documents[int(shuffled[len(others) % len(shuffled)])])
            characters -= len(others[-1])
        long = sorted(rng.permutation(rest)[:64].tolist(), key=lambda i: len(documents[i]))
        spare = documents[int(long[-1])] if long else ""
        needed = [documents[i] for i in asked.needed]
        fitted = fit(self.gauge, Documents(self.gauge, asked.query, needed, others, spare, rng), room)
        return RulerPrompt(text=fitted.text, ids=fitted.ids, references=asked.answers)

    def _question(self, room: int, index: int) -> int:
        """The question of sample `index`: in the drawn order, those whose documents leave room for the rest.

        All of them count where hardly any fits, so that the refusal can say what is needed.
        """
        fitting, tried = self._fitting.get(room, ([], 0))
        order = self.order.tolist()
        while len(fitting) <= index and tried < len(order) and not self._scarce(fitting, tried):
            fitting += [order[tried]] if self._least(order[tried]) <= room else []
            tried += 1
        self._fitting[room] = (fitting, tried)
        pool = order if index >= len(fitting) and self._scarce(fitting, tried) else fitting
        return int(pool[index % len(pool)])

    def _scarce(self, fitting: Sequence[int], tried: int) -> bool:
        return tried >= min(TRIED, len(self.order)) and len(fitting) * SCARCE < tried

    def _least(self, question: int) -> int:
        """Tokens of a question with nothing but the documents it needs."""
        if question not in self._sizes:
            asked = self.library.questions[question]
            texts = [_document(number, self.library.documents[i]) for number, i in enumerate(asked.needed, 1)]
            text = OPENING + "\n\n".join(texts) + QUESTION.format(query=asked.query)
            self._sizes[question] = len(self.gauge.ids(text))
        return self._sizes[question]


def missing(names: Sequence[str], data_dir: Path | None) -> str:
    """Why a task of these files cannot run."""
    where = "no data folder was given" if data_dir is None else f"{data_dir} has none of them"
    return f"needs {' or '.join(names)}, but {where}; give a data folder that has it (--data-dir)"


qa_1 = partial(QuestionBuilder, read_squad, SQUAD_FILES)
qa_2 = partial(QuestionBuilder, read_hotpot, HOTPOT_FILES)
