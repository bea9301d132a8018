"""Documents behind a data source: which files it names, what they hold, their hashes and their token ids.

Every document is read whole and in order. What cannot be read is an error that names the file and the place.
"""

from __future__ import annotations

import gzip
import json
import zlib
from collections.abc import Iterable, Iterator
from functools import cache
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any

import numpy as np

from halobench.assets import TEXT_HELDOUT, TEXT_LONG, TEXT_TRAIN
from halobench.errors import UserError, some
from halobench.progress import say
from halobench.provenance import file_hash

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_SUFFIXES = (".txt", ".jsonl", ".jsonl.gz", ".parquet")
_EMBEDDED = {"sample": TEXT_TRAIN, "sample:heldout": TEXT_HELDOUT, "sample:long": TEXT_LONG}
_BATCH_DOCUMENTS = 256
_BATCH_CHARACTERS = 1 << 22  # a batch of long documents is smaller: memory is bounded by the longest document


def source_files(source: str) -> list[Path] | None:
    """The files behind a local or embedded `source`, sorted by name; None when it can only be a hub name."""
    if source in _EMBEDDED:
        return [_EMBEDDED[source]]
    path = Path(source).expanduser()
    if "*" in path.name and path.parent.is_dir():
        files = sorted(path.parent.glob(path.name))
        if not files:
            raise UserError(f"data source {source!r} matches no file in {path.parent}")
        return [_known(file) for file in files]
    if path.is_dir():
        files = sorted(p for p in path.rglob("*") if p.name.endswith(_SUFFIXES) and p.is_file())
        if not files:
            raise UserError(f"data folder {source} holds no text; files may end in {', '.join(_SUFFIXES)}")
        return files
    if path.is_file():
        return [_known(path)]
    if path.suffix in (".txt", ".jsonl", ".gz", ".parquet") or source.startswith((".", "/", "~")) or not _hub(source):
        raise UserError(
            f"data source {source!r} not found; give a file or folder of text, a hub name (owner/name[:config]) or one "
            f"of {', '.join(_EMBEDDED)}"
        )
    return None


def _known(path: Path) -> Path:
    if not path.name.endswith(_SUFFIXES):
        raise UserError(f"data file {path} is of no known kind; it may end in {', '.join(_SUFFIXES)}")
    return path


def _hub(source: str) -> bool:
    name, _, config = source.partition(":")
    owner, _, dataset = name.partition("/")
    return bool(owner and dataset) and "/" not in dataset + config


def corpus_hashes(source: str) -> list[dict[str, str]]:
    """Provenance of a data source: {"file", "sha256"} of each file, or {"hub": name} of a hub dataset."""
    files = source_files(source)
    if files is None:
        return [{"hub": source}]
    root = Path(source).expanduser()
    names = [str(path.relative_to(root)) if root.is_dir() else path.name for path in files]
    return [{"file": name, "sha256": content_hash(path)} for name, path in zip(names, files, strict=True)]


def content_hash(path: Path) -> str:
    """halobench.provenance.file_hash, read once for as long as the file's size and time stay the same."""
    found = path.stat()
    return _content_hash(path.resolve(), found.st_size, found.st_mtime_ns)


@cache
def _content_hash(path: Path, size: int, changed: int) -> str:
    return file_hash(path)


def read_documents(files: Iterable[Path]) -> Iterator[str]:
    """The documents of `files`, in order: a .txt is one document; JSON lines and Parquet give their field `text`.

    An empty document holds nothing to train on: it is passed over, and one line a file says how many there were.

    Raises:
        UserError: naming the file and the line or row of what cannot be read; or a file in which there is no text.
    """
    for path in files:
        found, empty = 0, []
        for place, text in _records(path):
            if not isinstance(text, str):
                raise UserError(f"{path}, {place}: `text` is {type(text).__name__}, not a string; correct or remove it")
            if not text:
                empty.append(place)
                continue
            found += 1
            yield text
        if not found:
            raise UserError(f"{path} holds no text; fill it or take it out of the data")
        if empty:
            say(f"{path}: {len(empty)} empty documents passed over ({some(empty)})")


def _records(path: Path) -> Iterator[tuple[str, Any]]:
    """(place, text) of every document of a file; the text is unchecked."""
    try:
        if path.name.endswith(".txt"):
            yield "the file", _decoded(path.read_bytes(), path, "")
        elif path.name.endswith(".parquet"):
            yield from _parquet_rows(path)
        else:
            opener: Any = gzip.open if path.name.endswith(".gz") else open
            with opener(path, "rb") as file:
                yield from _json_lines(path, file)
    except (gzip.BadGzipFile, EOFError, zlib.error) as error:
        raise UserError(f"{path} is damaged or not packed by gzip ({error}); fetch or pack it again") from error
    except OSError as error:
        raise UserError(f"{path} cannot be read ({error.strerror or error}); check the file") from error


def _decoded(data: bytes, path: Path, place: str) -> str:
    """`data` as UTF-8 text without a byte-order mark; line ends stay as they are."""
    try:
        text = data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise UserError(
            f"{path}{place} is not UTF-8 text (byte {data[error.start]:#04x} at {error.start:,}); "
            "convert it to UTF-8 or remove it"
        ) from error
    if "\0" in text:
        raise UserError(f"{path}{place} is not text (a zero byte at character {text.index(chr(0)):,}); remove it")
    return text


def _json_lines(path: Path, file: IO[bytes]) -> Iterator[tuple[str, Any]]:
    for number, line in enumerate(file, 1):
        place = f"line {number}"
        text = _decoded(line, path, f", {place}")
        if not text.strip():
            continue
        try:
            found = json.loads(text)["text"]
            if isinstance(found, str):
                found.encode()  # an escape such as \\ud800 is half a character
        except (ValueError, KeyError, TypeError) as error:
            what = "it has no `text`" if isinstance(error, KeyError) else error
            raise UserError(f"{path}, {place}: not a JSON object with a field `text` ({what})") from error
        yield place, found


def _parquet_rows(path: Path) -> Iterator[tuple[str, Any]]:
    import pyarrow
    import pyarrow.parquet

    row = 0
    try:
        with pyarrow.parquet.ParquetFile(path) as file:
            columns = file.schema_arrow.names
            if "text" not in columns:
                raise UserError(f"{path} has no column `text`, only {some(columns)}; rename the one that holds it")
            for batch in file.iter_batches(batch_size=1024, columns=["text"]):
                for text in batch.column("text").to_pylist():
                    row += 1
                    yield f"row {row}", text
    except (pyarrow.ArrowException, UnicodeDecodeError) as error:
        first = str(error).split("\n")[0]
        raise UserError(f"{path} is damaged or not Parquet, after row {row} ({first}); fetch it again") from error


def encode_documents(texts: Iterable[str], tokenizer: PreTrainedTokenizerBase) -> Iterator[np.ndarray]:
    """The token ids of each document followed by EOS (uint32), in order; tokenised in batches, which is much faster.

    Raises:
        UserError: the tokenizer has no EOS.
    """
    eos = tokenizer.eos_token_id
    if eos is None:
        raise UserError("the tokenizer has no end-of-text token, so documents cannot be joined; set its eos_token")
    for batch in _batches(texts):
        for ids in _token_ids(batch, tokenizer):
            yield np.asarray([*ids, eos], dtype=np.uint32)


def _token_ids(batch: list[str], tokenizer: PreTrainedTokenizerBase) -> list[list[int]]:
    """Ids without special tokens; a fast tokenizer is asked directly, which takes half the time of a call."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is None:
        return tokenizer(batch, add_special_tokens=False, verbose=False)["input_ids"]
    backend.no_truncation()  # earlier calls leave theirs behind
    backend.no_padding()
    backend.encode_special_tokens = tokenizer.split_special_tokens
    return [encoding.ids for encoding in backend.encode_batch_fast(batch, add_special_tokens=False)]


def _batches(texts: Iterable[str]) -> Iterator[list[str]]:
    batch: list[str] = []
    characters = 0
    for text in texts:
        batch.append(text)
        characters += len(text)
        if len(batch) == _BATCH_DOCUMENTS or characters >= _BATCH_CHARACTERS:
            yield batch
            batch, characters = [], 0
    if batch:
        yield batch
