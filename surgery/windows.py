"""Windows of packed text: what a source of training text answers, and the source that lies in one array of tokens."""

from __future__ import annotations

from typing import Protocol

import numpy as np

from halobench.errors import UserError

HELD_OUT_SHARE = 0.02
HELD_OUT_MOST = 1_100_000
HELD_OUT_LEAST = 32_769  # a window of 32K and the token after it, where that is at most an eighth of the text


class TextSource(Protocol):
    """Tokens of documents, each ended by EOS, packed without padding; some are held out and never trained on.

    Attributes:
        tokens: training tokens of one epoch; None when that is not known before it is read.
    """

    tokens: int | None

    def window(self, position: int, length: int) -> np.ndarray:
        """`length` training token ids (int64), when `position` tokens have been drawn before them.

        The answer depends on the seed, the position and the length alone. A reader that adds `length` to its position
        after each window meets every window of an epoch once, and goes on in the same order after a pause.
        """
        ...

    def held_out(self, index: int, length: int) -> np.ndarray:
        """The `index`-th window of `length` token ids (int64) of the text that is not trained on.

        Windows stand side by side; an index beyond the last gives a window that begins at a random place.
        """
        ...


def held_out_start(tokens: int, index: int, length: int) -> int:
    """Where the `index`-th held-out window begins, among so many `tokens` that are held out."""
    if tokens < length:
        raise UserError(
            f"{tokens:,} tokens of the text are held out, fewer than one window of {length:,}; give more text or lower "
            "the length"
        )
    if index < tokens // length:
        return index * length
    return int(np.random.default_rng((index, length)).integers(tokens - length + 1))


class PackedText:
    """Windows cut from one array of tokens, in an order shuffled anew each epoch (a TextSource).

    The last tokens are held out: 2% of them and at most a million, or 32K when that is more and at most an eighth.
    Training windows of one length are cut side by side and permuted; the `position // length`-th is the answer, so one
    epoch holds each once, and leaves out only a remainder shorter than a window. Every epoch shifts the cuts, so that
    the remainder and the place of a token in its window change. Each length has a permutation of its own: a reader that
    changes the length goes on at its position, in the same epoch, but may meet text again that it met at the other.

    Args:
        tokens: (N,) ids of any integer type; may be memory-mapped.
        seed: of the order.
    """

    def __init__(self, tokens: np.ndarray, seed: int) -> None:
        least = min(HELD_OUT_LEAST, len(tokens) // 8)
        kept = len(tokens) - max(min(int(len(tokens) * HELD_OUT_SHARE), HELD_OUT_MOST), least)
        self._training, self._held_out = tokens[:kept], tokens[kept:]
        self.tokens: int | None = kept
        self.seed = seed
        self._orders: dict[int, tuple[int, int, np.ndarray]] = {}

    def window(self, position: int, length: int) -> np.ndarray:
        """See TextSource. Positions beyond one epoch go on into the next."""
        per_epoch = len(self._training) // length
        if per_epoch < 1:
            raise UserError(
                f"the text has {len(self._training):,} training tokens, fewer than one window of {length:,}; give more "
                "text or lower the length"
            )
        epoch, number = divmod(position // length, per_epoch)
        shift, order = self._order(epoch, length, per_epoch)
        start = shift + int(order[number]) * length
        return np.asarray(self._training[start : start + length], dtype=np.int64)

    def _order(self, epoch: int, length: int, per_epoch: int) -> tuple[int, np.ndarray]:
        """(tokens before the first cut, permutation of the windows); the last epoch of each length is remembered."""
        known = self._orders.get(length)
        if known is None or known[0] != epoch:
            order = np.random.default_rng((self.seed, epoch, length)).permutation(per_epoch)
            remainder = len(self._training) - per_epoch * length
            shift = int(np.random.default_rng((self.seed, epoch, length, 1)).integers(remainder + 1))
            known = self._orders[length] = (epoch, shift, order)
        return known[1], known[2]

    def held_out(self, index: int, length: int) -> np.ndarray:
        """See TextSource."""
        start = held_out_start(len(self._held_out), index, length)
        return np.asarray(self._held_out[start : start + length], dtype=np.int64)
