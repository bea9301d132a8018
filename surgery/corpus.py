"""Text in, token windows out: documents from files, the embedded sample or the hub, joined by EOS and packed.

A window is addressed by its index, so a stage resumes from a number and two runs with one seed see the same data.
"""

from __future__ import annotations

import gzip
import hashlib
import json
import os
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

import numpy as np

from halobench.assets import TEXT_HELDOUT, TEXT_LONG, TEXT_TRAIN
from halobench.errors import HalobenchError, UserError
from halobench.files import atomic_path

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_SUFFIXES = (".txt", ".jsonl", ".jsonl.gz", ".parquet")
_EMBEDDED = {"sample": TEXT_TRAIN, "sample:heldout": TEXT_HELDOUT, "sample:long": TEXT_LONG}


class TextSource(Protocol):
    """Tokens of packed text, addressed by window."""

    def window(self, index: int, length: int) -> np.ndarray:
        """The `index`-th window of `length` token ids (int64) in the seeded order."""
        ...


def source_files(source: str) -> list[Path] | None:
    """The files behind a local or embedded `source`; None when it can only be a hub name."""
    if source in _EMBEDDED:
        return [_EMBEDDED[source]]
    path = Path(source).expanduser()
    if "*" in path.name and path.parent.is_dir():
        files = sorted(path.parent.glob(path.name))
        if not files:
            raise UserError(f"data source {source!r} matches no file in {path.parent}")
        return files
    if path.is_dir():
        files = sorted(p for p in path.rglob("*") if p.name.endswith(_SUFFIXES))
        if not files:
            raise UserError(f"data folder {source} holds no text; files may end in {', '.join(_SUFFIXES)}")
        return files
    if path.is_file():
        if not path.name.endswith(_SUFFIXES):
            raise UserError(f"data file {source} is of no known kind; it may end in {', '.join(_SUFFIXES)}")
        return [path]
    if path.suffix or source.startswith((".", "/", "~")) or source.count("/") != 1:
        raise UserError(
            f"data source {source!r} not found; give a file or folder of text, a hub name (owner/name) or one of "
            f"{', '.join(_EMBEDDED)}"
        )
    return None


def read_documents(files: Iterable[Path]) -> Iterator[str]:
    """The documents of `files`: a .txt is one document; JSON lines and Parquet give their field `text`."""
    for path in files:
        if path.name.endswith(".txt"):
            yield path.read_text(encoding="utf-8")
        elif path.name.endswith(".parquet"):
            import pyarrow.parquet

            for batch in pyarrow.parquet.ParquetFile(path).iter_batches(columns=["text"]):
                yield from batch.column("text").to_pylist()
        else:
            yield from _json_lines(path)


def _json_lines(path: Path) -> Iterator[str]:
    opener = gzip.open if path.name.endswith(".gz") else open
    number = 0
    try:
        with opener(path, "rt", encoding="utf-8") as file:
            for line in file:
                number += 1
                if line.strip():
                    yield json.loads(line)["text"]
    except (json.JSONDecodeError, KeyError, TypeError, EOFError, gzip.BadGzipFile) as error:
        raise UserError(f"{path}, line {number}: not a JSON object with a field `text` ({error})") from error


def encode_corpus(files: list[Path], tokenizer: PreTrainedTokenizerBase) -> np.ndarray:
    """Token ids of every document, each ended by EOS, as one array; kept in a cache keyed by content and tokenizer."""
    eos = tokenizer.eos_token_id
    if eos is None:
        raise UserError("the tokenizer has no end-of-text token, so documents cannot be joined; set its eos_token")
    cache = cache_folder() / "tokens" / f"{_corpus_key(files, tokenizer)}.npy"
    if cache.exists():
        return np.load(cache, mmap_mode="r")
    pieces: list[np.ndarray] = []
    batch: list[str] = []

    def flush() -> None:
        for ids in tokenizer(batch, add_special_tokens=False, verbose=False)["input_ids"] if batch else []:
            pieces.append(np.asarray([*ids, eos], dtype=np.uint32))
        batch.clear()

    for text in read_documents(files):
        batch.append(text)
        if len(batch) == 256:
            flush()
    flush()
    if not pieces:
        raise UserError(f"no text in {', '.join(map(str, files))}; each document needs a non-empty field `text`")
    tokens = np.concatenate(pieces)
    with atomic_path(cache) as temporary, temporary.open("wb") as file:
        np.save(file, tokens)
    return tokens


def cache_folder() -> Path:
    """Where tokenised text is kept between runs: $HALOBENCH_CACHE, or ~/.cache/halobench."""
    return Path(os.environ.get("HALOBENCH_CACHE", "~/.cache/halobench")).expanduser()


def _corpus_key(files: list[Path], tokenizer: PreTrainedTokenizerBase) -> str:
    digest = hashlib.sha256()
    for path in files:
        with path.open("rb") as file:
            digest.update(hashlib.file_digest(file, "sha256").digest())
    backend = getattr(tokenizer, "backend_tokenizer", None)
    digest.update((backend.to_str() if backend else json.dumps(tokenizer.get_vocab(), sort_keys=True)).encode())
    return digest.hexdigest()[:32]


class PackedText:
    """Windows cut from one array of tokens, in an order shuffled anew each epoch.

    Every epoch shifts the cuts, so that a token is not always met at the same place of a window.
    """

    def __init__(self, tokens: np.ndarray, seed: int) -> None:
        self.tokens = tokens
        self.seed = seed
        self._order: tuple[tuple[int, int], np.ndarray] | None = None

    def window(self, index: int, length: int) -> np.ndarray:
        """See TextSource. Indices beyond one epoch go on into the next."""
        per_epoch = (len(self.tokens) - 1) // length
        if per_epoch < 1:
            raise UserError(
                f"the text has {len(self.tokens)} tokens, fewer than one window of {length}; give more text"
            )
        epoch, place = divmod(index, per_epoch)
        if self._order is None or self._order[0] != (epoch, length):
            order = np.random.default_rng((self.seed, epoch, length)).permutation(per_epoch)
            self._order = ((epoch, length), order)
        shift = int(
            np.random.default_rng((self.seed, epoch, length, 1)).integers(len(self.tokens) - per_epoch * length)
        )
        start = shift + int(self._order[1][place]) * length
        return np.asarray(self.tokens[start : start + length], dtype=np.int64)


class StreamedText:
    """Windows of a hub dataset read as a stream, in the dataset's shuffled-by-buffer order.

    Windows come in order; a resumed run reads forward to its place. Asking for an earlier window starts over.
    """

    def __init__(self, name: str, tokenizer: PreTrainedTokenizerBase, seed: int) -> None:
        self.name, self.tokenizer, self.seed = name, tokenizer, seed
        self._restart()

    def _restart(self) -> None:
        from datasets import load_dataset

        path, _, config = self.name.partition(":")
        try:
            dataset = load_dataset(path, config or None, split="train", streaming=True)
        except Exception as error:
            raise HalobenchError(
                f"data source {self.name!r} could not be opened from the hub ({type(error).__name__}); check the name "
                "and the network, or give a local folder"
            ) from error
        self._documents = iter(dataset.shuffle(seed=self.seed, buffer_size=10_000))
        self._buffer = np.empty(0, dtype=np.int64)
        self._consumed = 0

    def window(self, index: int, length: int) -> np.ndarray:
        """See TextSource."""
        start = index * length
        if start < self._consumed:
            self._restart()
        while self._consumed + len(self._buffer) < start + length:
            skip = min(start - self._consumed, len(self._buffer))
            self._buffer, self._consumed = self._buffer[skip:], self._consumed + skip
            document = next(self._documents, None)
            if document is None:
                raise UserError(
                    f"{self.name} ended after {self._consumed + len(self._buffer)} tokens; lower the budget"
                )
            ids = self.tokenizer(document["text"], add_special_tokens=False, verbose=False)["input_ids"]
            self._buffer = np.concatenate([self._buffer, np.asarray([*ids, self.tokenizer.eos_token_id])])
        skip = start - self._consumed
        self._buffer, self._consumed = self._buffer[skip:], start
        return self._buffer[:length].astype(np.int64)


def open_text(source: str, tokenizer: PreTrainedTokenizerBase, seed: int) -> TextSource:
    """The text behind `source`: a file, a folder, "sample" (embedded), or a hub dataset "owner/name[:config]"."""
    files = source_files(source)
    if files is None:
        return StreamedText(source, tokenizer, seed)
    return PackedText(encode_corpus(files, tokenizer), seed)
