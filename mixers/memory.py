"""What one layer of a hybrid remembers between forward calls.

Keys and values live in buffers that double when full and are written in place, so a token costs its own bytes and not
a copy of the whole. A layer whose attention has a window keeps the tokens of the window: its buffer stops growing at
twice their number, and when that is full the last of them move to its front. A recurrent layer keeps a few tensors of
fixed size. Each layer counts the tokens it has seen, so a model with no softmax layer knows its place too.

Pinned (see `HybridCache.pin`) a layer takes one token a call at the place that tensors on the device name: nothing
moves and nothing grows, so that a captured step can be replayed. A window is a ring then.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import CacheLayerMixin

from halobench.errors import UserError
from halobench.kernels.attention.decode import decode_form

FIRST_ROOM = 64  # tokens a key/value buffer has room for at least


@dataclass(kw_only=True, eq=False)
class Place:
    """Where a pinned layer writes its next token and how many it then attends to, on the device.

    slot_1: int64, index into the buffer. lengths_B: int64, keys with the new one, of each row. window: as in
    LayerMemory. backend: the form of `decode_attention` that reads the buffer. attended: calls that read it so far.
    """

    slot_1: Tensor
    lengths_B: Tensor
    window: int | None
    backend: str
    attended: int = 0


def place_of(keys: Tensor) -> Place | None:
    """The place of the pinned layer whose buffer this is; None for any other tensor."""
    return getattr(keys, "place", None)


class LayerMemory(CacheLayerMixin):
    """What one layer remembers: a buffer of keys and values, or the states of a recurrence, or nothing yet.

    Args:
        room: tokens that the buffer has room for from the start.
        window: a query sees this many tokens, itself included, so `window - 1` are kept for the next; None is all.
    """

    keys: Tensor
    values: Tensor
    supports_early_init = False

    def __init__(self, room: int = FIRST_ROOM, window: int | None = None) -> None:
        super().__init__()
        self.room = room
        self.window = window
        self.length = 0  # tokens seen
        self.held = 0  # of them, the last so many are in the buffer
        self.states: tuple[Tensor, ...] | None = None
        self.place: Place | None = None
        self.fixed_states = False  # states are written into the tensors that hold them

    @property
    def is_sliding(self) -> bool:
        """Whether old tokens are dropped; transformers makes the mask of such layers for a shorter past."""
        return self.window is not None

    @property
    def most(self) -> int | None:
        """Tokens that the buffer may have room for; None is any number."""
        return None if self.window is None else 2 * self.window

    def kept(self, seen: int) -> int:
        """Of `seen` tokens, how many a next query sees."""
        return seen if self.window is None else min(seen, self.window - 1)

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        """Makes the buffers, (B, J, room, K), for heads like these."""
        room = max(self.room, key_states.shape[2])
        room = room if self.most is None else min(room, self.most)
        self.keys, self.values = (_buffer(x, room) for x in (key_states, value_states))
        self.is_initialized = True

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """Appends keys and values (B, J, T, K); returns them after the past that they see, as views where possible."""
        if self.place is not None:
            self.keys.index_copy_(2, self.place.slot_1, key_states)
            self.values.index_copy_(2, self.place.slot_1, value_states)
            return self.keys, self.values
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        if torch.is_grad_enabled() and (key_states.requires_grad or self.keys.requires_grad):
            return self._append_for_gradients(key_states, value_states)
        first, end = self.held - self.kept(self.held), self.held + key_states.shape[2]
        self.length += key_states.shape[2]
        if self.most is not None and end > self.most:
            return self._move_to_front(key_states, value_states)
        if end > self.keys.shape[2]:
            room = max(end, 2 * self.keys.shape[2])
            room = room if self.most is None else min(room, self.most)
            self.keys, self.values = (_grown(x, self.held, room) for x in (self.keys, self.values))
        self.keys[:, :, self.held : end] = key_states
        self.values[:, :, self.held : end] = value_states
        self.held = end
        return self.keys[:, :, first:end], self.values[:, :, first:end]

    def _append_for_gradients(self, key_states: Tensor, value_states: Tensor) -> tuple[Tensor, Tensor]:
        """Appends by concatenation: what an earlier call computed from must not be written over before its backward."""
        first = self.held - self.kept(self.held)
        self.keys = torch.cat((self.keys[:, :, first : self.held], key_states), dim=2)
        self.values = torch.cat((self.values[:, :, first : self.held], value_states), dim=2)
        self.held = self.keys.shape[2]
        self.length += key_states.shape[2]
        return self.keys, self.values

    def _move_to_front(self, key_states: Tensor, value_states: Tensor) -> tuple[Tensor, Tensor]:
        """Begins a full buffer anew with the last tokens of a window; returns copies, which this cannot disturb."""
        first = self.held - self.kept(self.held)
        keys = torch.cat((self.keys[:, :, first : self.held], key_states), dim=2)
        values = torch.cat((self.values[:, :, first : self.held], value_states), dim=2)
        self.held = self.kept(keys.shape[2])
        if self.keys.shape[2] < self.held:
            self.keys, self.values = (_buffer(x, 2 * self.held) for x in (keys, values))
        self.keys[:, :, : self.held] = keys[:, :, keys.shape[2] - self.held :]
        self.values[:, :, : self.held] = values[:, :, values.shape[2] - self.held :]
        return keys, values

    def set_states(self, states: tuple[Tensor, ...], tokens: int) -> None:
        """Replaces the states, which now stand `tokens` further."""
        if self.fixed_states and self.states is not None:
            for held, new in zip(self.states, states, strict=True):
                if held is not new:
                    held.copy_(new)
        else:
            self.states = states
        if self.place is None:
            self.length += tokens

    def pin(self, place: Place, room: int, *, fixed_states: bool) -> None:
        """Puts keys and values where `place` expects them, with room for `room` tokens or for the window.

        Args:
            fixed_states: write new states into the tensors of the old ones, as a captured step must.
        """
        if self.states is not None:  # a copy of its own: steps may write into it
            with torch.inference_mode(False):
                self.states = tuple(state.clone(memory_format=torch.contiguous_format) for state in self.states)
        if self.is_initialized:
            if self.window is not None:
                self.keys, self.values = (self._ring(x) for x in (self.keys, self.values))
            elif self.keys.shape[2] < room:
                self.keys, self.values = (_grown(x, self.held, room) for x in (self.keys, self.values))
            if self.keys.device.type == "cuda" and decode_form(place.backend, self.keys) == "torch":
                for buffer in (self.keys, self.values):  # it is multiplied by zeros there, so it must be finite
                    buffer[:, :, min(self.held, buffer.shape[2]) :].zero_()
            self.keys.place = place  # type: ignore[attr-defined]
        self.place, self.fixed_states = place, fixed_states

    def _ring(self, buffer: Tensor) -> Tensor:
        """The last tokens of a window, each at its position modulo the window."""
        assert self.window is not None
        kept = min(self.held, self.window)
        places = torch.arange(self.length - kept, self.length, device=buffer.device) % self.window
        return _buffer(buffer, self.window).index_copy_(2, places, buffer[:, :, self.held - kept : self.held])

    def advance(self) -> None:
        """Counts a token that a pinned layer has taken."""
        self.length += 1
        if self.is_initialized:
            self.held = self.length if self.window is None else min(self.length, self.window)

    def unpin(self) -> None:
        """Back to a buffer in the order of time that may grow."""
        if self.place is None:
            return
        if self.is_initialized and self.window is not None:
            order = torch.arange(self.length - self.held, self.length, device=self.keys.device) % self.window
            self.keys, self.values = (_buffer(x, 2 * self.window).index_copy_(
                2, torch.arange(self.held, device=x.device), x.index_select(2, order)
            ) for x in (self.keys, self.values))  # fmt: skip
        elif self.is_initialized:
            del self.keys.place  # type: ignore[attr-defined]
        self.place, self.fixed_states = None, False

    def tensors(self) -> list[Tensor]:
        """All tensors held, batch first."""
        kept = [self.keys, self.values] if self.is_initialized else []
        return [*kept, *(self.states or ())]

    def change(self, function: Callable[[Tensor], Tensor]) -> None:
        """Replaces every tensor held by `function` of it."""
        if self.is_initialized:
            self.keys, self.values = function(self.keys), function(self.values)
        if self.states is not None:
            self.states = tuple(function(state) for state in self.states)

    @property
    def used_bytes(self) -> int:
        """Bytes that hold something still needed."""
        total: int = sum(state.nbytes for state in self.states or ())
        if self.is_initialized:
            total += sum(x.nbytes // x.shape[2] * self.kept(self.held) for x in (self.keys, self.values))
        return total

    def mask_sizes(self, seen: int, query_length: int) -> tuple[int, int]:
        """(number, first position) of the keys that `query_length` queries after `seen` tokens are given."""
        return self.kept(seen) + query_length, seen - self.kept(seen)

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        return self.mask_sizes(self.length, query_length)

    def get_seq_length(self) -> int:
        return self.length

    def get_max_length(self) -> int:
        return -1

    @property
    def is_croppable(self) -> bool:  # type: ignore[override]
        """Whether tokens can be taken back however many follow; within its first window a sliding layer can too."""
        return self.states is None and self.window is None

    def require_croppable(self) -> None:
        """Raises UserError if tokens cannot be taken back now."""
        what = None
        if self.states is not None:
            what = "a recurrent state"
        elif self.kept(self.length) < self.length:
            what = f"a layer with a window of {self.window} tokens that has seen {self.length}"
        if what is not None:
            raise UserError(
                f"{what} cannot take back tokens; keep a clone() of the cache from before them, "
                "and do not use assisted decoding with this model"
            )

    def crop(self, tokens_to_remove: int) -> None:
        """Forgets the last -tokens_to_remove tokens; recurrent states and windows that dropped some cannot."""
        if tokens_to_remove == 0:
            return
        self.require_croppable()
        self.length = max(0, self.length - abs(tokens_to_remove))
        self.held = min(self.held, self.length)

    def reset(self) -> None:
        self.keys = self.values = self.states = self.place = None  # type: ignore[assignment]
        self.is_initialized = self.fixed_states = False
        self.length = self.held = 0

    def offload(self) -> None:
        raise UserError("this cache does not offload; leave cache_implementation unset")

    def reorder_cache(self, beam_idx: Tensor) -> None:
        self.change(lambda x: x.index_select(0, beam_idx.to(x.device)))


def _buffer(like_BJTK: Tensor, room: int) -> Tensor:
    batch, heads, _, size = like_BJTK.shape
    with torch.inference_mode(False):  # a buffer made in inference mode could not be written outside it
        return torch.empty(batch, heads, room, size, dtype=like_BJTK.dtype, device=like_BJTK.device)


def _grown(buffer: Tensor, used: int, room: int) -> Tensor:
    larger = _buffer(buffer, room)
    larger[:, :, :used] = buffer[:, :, :used]
    return larger
