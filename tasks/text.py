"""Builds the text shipped with the package, once: the training sample, held-out documents and continuation items.

The sources are folders of gzipped JSON lines with fields `id` and `text`. Everything is chosen by a hash of the
document's id, and written without time stamps, so that building again gives the same bytes.
"""

from __future__ import annotations

import gzip
import hashlib
import io
import json
import re
import zlib
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from halobench.errors import UserError
from halobench.files import atomic_path

TRAIN_BYTES = 1_350_000  # compressed, half novels and half pages
LONG_SHARE = 0.74  # of each held-out novel, from its start; what follows it becomes short held-out documents
PIECE_CHARACTERS = 10_000
FREE_MODERN = ("digitalgov/", "18f/")  # the parts that are in the public domain
NOVEL_PREFIX = "eltec/"

_END = re.compile(r"[.!?][\"”’)]?(?= (?=[\"“‘(]?[A-Z]))")
_ABBREVIATION = re.compile(
    r"(?:\b(?:Mr|Mrs|Ms|Dr|St|Messrs|Esq|Prof|Capt|Col|Gen|Lieut|Jr|Sr|Rev|Hon|No|vs|Inc|Co|Mt|Sec)|\b[A-Z]|e\.g|i\.e)\.$"
)


@dataclass(frozen=True)
class Document:
    """One text with a name that says where it comes from."""

    id: str
    text: str

    @property
    def kind(self) -> str:
        """What the text is: "novel" or "modern"."""
        return "novel" if self.id.startswith(NOVEL_PREFIX) else "modern"


def read_jsonl(path: Path) -> list[Document]:
    """The documents in gzipped JSON lines, in file order."""
    if not path.exists():
        raise UserError(f"{path} does not exist; give the folder that holds the text sources")
    with gzip.open(path, "rt", encoding="utf-8") as file:
        rows = [json.loads(line) for line in file if line.strip()]
    return [Document(row["id"], row["text"]) for row in rows]


def write_jsonl(rows: Iterable[dict], path: Path) -> int:
    """Writes gzipped JSON lines with no time stamp or name inside; returns the bytes written."""
    buffer = io.BytesIO()
    with gzip.GzipFile(filename="", fileobj=buffer, mode="wb", compresslevel=9, mtime=0) as file:
        for row in rows:
            file.write((json.dumps(row, ensure_ascii=False) + "\n").encode())
    with atomic_path(path) as temporary:
        temporary.write_bytes(buffer.getvalue())
    return len(buffer.getvalue())


def build_sample(source_dir: Path, out_dir: Path, seed: int = 0) -> dict[str, int]:
    """Writes train, heldout and heldout_long (.jsonl.gz) to `out_dir`; returns the compressed bytes of each.

    train: whole novels and pages up to half of TRAIN_BYTES each. heldout_long: the first part of each held-out novel,
    for haystacks and long windows. heldout: short documents, public-domain pages and pieces of the novels' ends.
    """
    novels = read_jsonl(source_dir / "novels_pd.train.jsonl.gz")
    pages = read_jsonl(source_dir / "usgov_cc0.train.jsonl.gz")
    train = [*_fill(novels, TRAIN_BYTES // 2, seed), *_fill(pages, TRAIN_BYTES // 2, seed)]
    modern = [d for d in read_jsonl(source_dir / "modern.heldout.jsonl.gz") if d.id.startswith(FREE_MODERN)]
    long: list[Document] = []
    pieces: list[Document] = []
    for novel in read_jsonl(source_dir / "novels_pd.heldout_long.jsonl.gz"):
        cut = _paragraph_end(novel.text, round(len(novel.text) * LONG_SHARE))
        long.append(Document(novel.id, novel.text[:cut].rstrip()))
        pieces += _pieces(Document(novel.id, novel.text[cut:].strip()))
    files = {"train": train, "heldout": [*modern, *pieces], "heldout_long": long}
    return {name: _write(_shuffled(documents, seed), out_dir / f"{name}.jsonl.gz") for name, documents in files.items()}


def _write(documents: Iterable[Document], path: Path) -> int:
    return write_jsonl(({"id": d.id, "text": d.text} for d in documents), path)


def _shuffled(documents: Sequence[Document], seed: int) -> list[Document]:
    return sorted(documents, key=lambda d: hashlib.sha256(f"{seed}:{d.id}".encode()).digest())


def _fill(documents: Sequence[Document], budget: int, seed: int) -> Iterator[Document]:
    """Whole documents in hashed order, leaving out each that would compress to more than what is left of `budget`."""
    packer = zlib.compressobj(9)
    written = 0
    for document in _shuffled(documents, seed):
        trial = packer.copy()
        fresh = trial.compress(json.dumps({"id": document.id, "text": document.text}, ensure_ascii=False).encode())
        if written + len(fresh) + len(trial.copy().flush()) <= budget:
            packer, written = trial, written + len(fresh)
            yield document


def _paragraph_end(text: str, place: int) -> int:
    """The paragraph break nearest after `place`, or the end of the text."""
    found = text.find("\n\n", place)
    return len(text) if found < 0 else found


def _pieces(document: Document) -> Iterator[Document]:
    start, number = 0, 0
    while start < len(document.text):
        end = _paragraph_end(document.text, min(start + PIECE_CHARACTERS, len(document.text)))
        if len(document.text) - end < PIECE_CHARACTERS // 2:
            end = len(document.text)
        yield Document(f"{document.id}/{number:02d}", document.text[start:end].strip())
        start, number = end, number + 1


@dataclass(frozen=True)
class _Place:
    """A sentence boundary: the text before it, and the words that follow it."""

    document: str
    context: str
    following: str


def build_continuations(heldout: Path, out: Path, *, count: int = 600, seed: int = 0) -> int:
    """Writes `count` four-way choices of the true continuation, half novels and half modern text; returns the bytes.

    A context is 250 to 400 characters and ends with a sentence; the true continuation is what follows, 80 to 120
    characters of whole words in the same paragraph. The three others begin a sentence elsewhere in text of the same
    kind and are as near in length as can be had. Fields: context, choices (4), label, source (the document's id).
    """
    rng = np.random.default_rng(seed)
    documents = read_jsonl(heldout)
    rows: list[dict] = []
    for kind in ("modern", "novel"):
        places = [place for d in documents if d.kind == kind for place in _places(d, rng)]
        if len(places) < max(4, count // 2):
            raise UserError(f"{heldout} gives {len(places)} {kind} passages; {count // 2} items need more text")
        chosen = rng.choice(len(places), size=count // 2, replace=False)
        rows += [_item(places, int(index), rng) for index in chosen]
    return write_jsonl((rows[i] for i in rng.permutation(len(rows))), out)


def _places(document: Document, rng: np.random.Generator) -> Iterator[_Place]:
    """Passages of a document that do not overlap: each context starts behind the previous continuation."""
    text, start = document.text, 0
    for match in _END.finditer(text):
        end = match.end()
        if end - start < 250 or _ABBREVIATION.search(text[max(start, end - 10) : end]):
            continue
        following = _whole_words(text[end + 1 :].split("\n", 1)[0], int(rng.integers(80, 121)))
        if following is None:
            continue
        yield _Place(document.id, _tail(text[start:end], 400), following)
        start = end + 1 + len(following)


def _whole_words(paragraph: str, length: int) -> str | None:
    """The first words of a paragraph, at most `length` characters; None when that leaves fewer than 80."""
    if len(paragraph) > length:
        paragraph = paragraph[: length + 1].rpartition(" ")[0]
    paragraph = paragraph.rstrip()
    return paragraph if len(paragraph) >= 80 else None


def _tail(text: str, length: int) -> str:
    """The end of `text`, at most `length` characters, beginning with a whole word."""
    if len(text) > length:
        text = text[-length:]
        text = text[re.search(r"\s", text).end() :] if re.search(r"\s", text) else text  # type: ignore[union-attr]
    return text.strip()


def _item(places: Sequence[_Place], index: int, rng: np.random.Generator) -> dict:
    truth = places[index]
    others = [p for p in rng.permutation(len(places))[:48] if p != index and places[p].following != truth.following]
    others.sort(key=lambda p: abs(len(places[p].following) - len(truth.following)))
    label = int(rng.integers(4))
    choices = [places[p].following for p in others[:3]]
    choices.insert(label, truth.following)
    return {"context": truth.context, "choices": choices, "label": label, "source": truth.document}
