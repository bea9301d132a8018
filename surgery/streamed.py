"""Text streamed from a dataset of the hub: nothing is downloaded ahead, windows are cut as it is read."""

from __future__ import annotations

import hashlib
from collections import deque
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import numpy as np

from halobench.errors import HalobenchError, UserError, some
from halobench.surgery.documents import encode_documents
from halobench.surgery.windows import held_out_start

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

HELD_OUT_TOKENS = 1_100_000
SHUFFLE_BUFFER = 10_000


class StreamedText:
    """Windows of a hub dataset, addressed by their position in the stream of its tokens (a TextSource).

    The first documents, as they lie on the hub, are held out; the rest, in the dataset's order shuffled by buffer, is
    for training. Held-out documents are known by their text, so that no seed and no second copy brings one into
    training. Positions are exact: windows of any lengths that follow one another neither overlap nor skip a token.

    The stream is only ever read forward. A run that resumes reads and tokenises all that lies before its position,
    which gives exactly the windows it would have had; asking for a position that has been passed starts it again.
    Of several processes each reads the whole stream and takes its own windows, so the data does not depend on how many
    there are. A stream ends with its dataset: text that is to be read more than once has to be downloaded.

    Args:
        name: "owner/name" or "owner/name:config"; the split is `train`.
        tokenizer: with an end-of-text token.
        seed: of the shuffle.
        held_out: tokens to set aside.
    """

    def __init__(
        self, name: str, tokenizer: PreTrainedTokenizerBase, seed: int, *, held_out: int = HELD_OUT_TOKENS
    ) -> None:
        self.name, self.tokenizer, self.seed = name, tokenizer, seed
        self.tokens: int | None = None
        self._dataset = self._open()
        self._aside: set[bytes] = set()
        self._held_out = self._set_aside(held_out)
        self._restart()

    def _open(self) -> Any:
        from datasets import load_dataset

        path, _, config = self.name.partition(":")
        try:
            dataset = load_dataset(path, config or None, split="train", streaming=True)
        except Exception as error:
            raise HalobenchError(
                f"data source {self.name!r} could not be opened from the hub ({_first_line(error)}); check the name "
                "and the network, or give a local folder"
            ) from error
        columns = dataset.column_names
        if columns is not None and "text" not in columns:
            raise UserError(f"{self.name} has no column `text`, only {some(columns)}; give a dataset that has one")
        return dataset if columns is None else dataset.select_columns(["text"])

    def _texts(self, dataset: Any) -> Iterator[str]:
        """The documents of `dataset` that hold anything."""
        rows = iter(dataset)
        while True:
            try:
                row = next(rows, None)
            except Exception as error:
                raise HalobenchError(
                    f"{self.name} could not be read on ({_first_line(error)}); run again to resume"
                ) from error
            if row is None:
                return
            text = row.get("text")
            if not isinstance(text, str):
                raise UserError(f"{self.name}: a row has no string `text` (its fields: {some(row)}); use another one")
            if text:
                yield text

    def _set_aside(self, wanted: int) -> np.ndarray:
        """Tokens of the first documents, at least `wanted`; remembers which documents they are."""
        texts: list[str] = []

        def noted() -> Iterator[str]:
            for text in self._texts(self._dataset):
                texts.append(text)
                yield text

        pieces: list[np.ndarray] = []
        count = 0
        for number, ids in enumerate(encode_documents(noted(), self.tokenizer)):
            self._aside.add(_digest(texts[number]))
            pieces.append(ids)
            count += len(ids)
            if count >= wanted:
                return np.concatenate(pieces)
        raise UserError(
            f"{self.name} has {count:,} tokens, too few to set {wanted:,} aside; download it and give the folder"
        )

    def _restart(self) -> None:
        shuffled = self._dataset.shuffle(seed=self.seed, buffer_size=SHUFFLE_BUFFER)
        texts = (text for text in self._texts(shuffled) if _digest(text) not in self._aside)
        self._documents = encode_documents(texts, self.tokenizer)
        self._pieces: deque[np.ndarray] = deque()  # documents read and not yet passed
        self._start = self._end = 0  # positions of the first token in `_pieces`, and after the last

    def window(self, position: int, length: int) -> np.ndarray:
        """See TextSource."""
        if position < self._start:
            self._restart()
        while self._end < position + length:
            document = next(self._documents, None)
            if document is None:
                raise UserError(
                    f"{self.name} ended after {self._end:,} training tokens, before {position + length:,}; lower the "
                    "budget, or download it and give the folder, which may be read more than once"
                )
            self._pieces.append(document)
            self._end += len(document)
            self._pass(position)
        self._pass(position)
        skip, parts, found = position - self._start, [], 0
        for piece in self._pieces:
            parts.append(piece)
            found += len(piece)
            if found >= skip + length:
                break
        return np.concatenate(parts)[skip : skip + length].astype(np.int64)

    def _pass(self, position: int) -> None:
        """Lets go of the documents that end before `position`."""
        while self._pieces and self._start + len(self._pieces[0]) <= position:
            self._start += len(self._pieces.popleft())

    def held_out(self, index: int, length: int) -> np.ndarray:
        """See TextSource."""
        start = held_out_start(len(self._held_out), index, length)
        return self._held_out[start : start + length].astype(np.int64)


def _digest(text: str) -> bytes:
    return hashlib.blake2b(text.encode("utf-8", "surrogatepass"), digest_size=16).digest()


def _first_line(error: Exception) -> str:
    return f"{type(error).__name__}: {str(error).strip().partition(chr(10))[0][:200]}"
