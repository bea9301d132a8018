"""Text in, token windows out: opens a data source, and checks that it is enough and that the tokenizer fits.

Local text is tokenised once, into a file that later runs map into memory; text of the hub is streamed.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from halobench.errors import UserError
from halobench.files import atomic_path
from halobench.progress import Progress
from halobench.surgery.documents import content_hash, encode_documents, read_documents, source_files
from halobench.surgery.streamed import StreamedText
from halobench.surgery.windows import PackedText, TextSource

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_LONG_WORK = 64_000_000  # bytes of files from which the progress of tokenising is shown


def open_text(source: str, tokenizer: PreTrainedTokenizerBase, seed: int) -> TextSource:
    """The text behind `source`: a file, a folder, "sample" (embedded), or a hub dataset "owner/name[:config]".

    The answer is the same in every process that asks with the same arguments. Of several processes, let one open the
    source before the others do: it tokenises local files for all.
    """
    files = source_files(source)
    if files is None:
        return StreamedText(source, tokenizer, seed)
    return PackedText(encode_corpus(files, tokenizer), seed)


def encode_corpus(files: list[Path], tokenizer: PreTrainedTokenizerBase) -> np.ndarray:
    """Token ids (uint32, memory-mapped) of every document of `files`, each ended by EOS.

    Documents pass one batch at a time into a file in the cache, whose name is a hash of the files' content and of the
    tokenizer; the memory needed is that of the longest document, not of the corpus.
    """
    cache = cache_folder() / "tokens" / f"{_corpus_key(files, tokenizer)}.uint32"
    if cache.exists() and (cache.stat().st_size == 0 or cache.stat().st_size % 4):
        cache.unlink()  # whoever cut it off, not we
    if not cache.exists():
        total = sum(path.stat().st_size for path in files)
        progress = Progress("tokenise", total, unit="bytes", quiet=total < _LONG_WORK)
        with progress, atomic_path(cache) as temporary, temporary.open("wb") as file:
            for ids in encode_documents(_counted(files, progress), tokenizer):
                ids.tofile(file)
    return np.memmap(cache, dtype=np.uint32, mode="r")


def _counted(files: Iterable[Path], progress: Progress) -> Iterator[str]:
    for path in files:
        yield from read_documents([path])
        progress.advance(path.stat().st_size, path.name)


def cache_folder() -> Path:
    """Where tokenised text is kept between runs: $HALOBENCH_CACHE, or ~/.cache/halobench."""
    return Path(os.environ.get("HALOBENCH_CACHE", "~/.cache/halobench")).expanduser()


def _corpus_key(files: list[Path], tokenizer: PreTrainedTokenizerBase) -> str:
    digest = hashlib.sha256()
    for path in files:
        digest.update(f"{path.suffix} {content_hash(path)} ".encode())
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is None:
        described: Any = [type(tokenizer).__name__, tokenizer.get_vocab()]
    else:
        described = json.loads(backend.to_str())
        for setting in ("truncation", "padding"):  # left behind by earlier calls; ours use neither
            described.pop(setting, None)
    digest.update(json.dumps([described, tokenizer.eos_token_id], sort_keys=True).encode())
    return digest.hexdigest()[:32]


def check_budget(source: TextSource, wanted: int, epochs: int, what: str) -> None:
    """Raises UserError when `what` (the stages, for the message) reads more than `epochs` times the training text.

    Args:
        source: the text; nothing is said of one whose size is unknown.
        wanted: tokens that are read from it, over all stages.
        epochs: how often it may be read.
    """
    if source.tokens is None or wanted <= source.tokens * epochs:
        return
    times = -(-wanted // max(source.tokens, 1))
    allowed = "once" if epochs == 1 else f"{epochs} times"
    raise UserError(
        f"the text has {source.tokens:,} training tokens, to be read {allowed}; {what} reads {wanted:,} "
        f"({wanted / max(source.tokens, 1):.1f} times as many): lower the budget, give more text, or allow it to be "
        f"read {times} times with --set epochs={times}"
    )


def check_ids(tokenizer: PreTrainedTokenizerBase, config: Any) -> tuple[int, int]:
    """Raises UserError unless the tokenizer's highest id has a row in the embedding; both ends."""
    vocabulary = int(config.get_text_config().vocab_size)
    highest = max(tokenizer.get_vocab().values())
    if highest >= vocabulary:
        raise UserError(
            f"the tokenizer has token ids up to {highest:,} but the model's vocabulary ends at {vocabulary - 1:,} "
            f"(vocab_size {vocabulary:,}); use the tokenizer that the model was trained with"
        )
    return highest, vocabulary


def check_tokenizer(tokenizer: PreTrainedTokenizerBase, config: Any) -> None:
    """Raises UserError when the tokenizer cannot serve the training of a model of this (transformers) configuration.

    Its highest token id must have a row in the embedding, and documents need an end-of-text token to join them.
    """
    highest, vocabulary = check_ids(tokenizer, config)
    if tokenizer.eos_token_id is None:
        raise UserError(
            f"the tokenizer ({highest + 1:,} tokens; the model's vocabulary has {vocabulary:,}) has no end-of-text "
            "token, so documents cannot be joined; set its eos_token"
        )
