"""What a hybrid remembers between forward calls: keys and values of softmax layers, states of recurrent ones.

Keys and values live in buffers that double when full and are written in place, so a token costs its own bytes and not
a copy of the whole. A recurrent layer keeps a few tensors of fixed size. Each layer counts the tokens it has seen, so a
model with no softmax layer knows its place too.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import Cache, CacheLayerMixin

from halobench.errors import UserError

FIRST_ROOM = 64  # tokens a key/value buffer has room for at least


class LayerMemory(CacheLayerMixin):
    """What one layer remembers: a growing key/value buffer, or the states of a recurrence, or nothing yet."""

    keys: Tensor
    values: Tensor
    is_sliding = False
    supports_early_init = False

    def __init__(self, room: int = FIRST_ROOM) -> None:
        super().__init__()
        self.room = room
        self.length = 0
        self.states: tuple[Tensor, ...] | None = None

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        """Makes the buffers, (B, J, room, K), for heads like these."""
        self.keys, self.values = (_buffer(x, max(self.room, x.shape[2])) for x in (key_states, value_states))
        self.is_initialized = True

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """Appends keys and values (B, J, T, K); returns views of all so far."""
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        end = self.length + key_states.shape[2]
        if end > self.keys.shape[2]:
            room = max(end, 2 * self.keys.shape[2])
            self.keys, self.values = (_grown(x, self.length, room) for x in (self.keys, self.values))
        self.keys[:, :, self.length : end] = key_states
        self.values[:, :, self.length : end] = value_states
        self.length = end
        return self.keys[:, :, :end], self.values[:, :, :end]

    def set_states(self, states: tuple[Tensor, ...], tokens: int) -> None:
        """Replaces the states, which now stand `tokens` further."""
        self.states = states
        self.length += tokens

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
        """Bytes that hold something."""
        total: int = sum(state.nbytes for state in self.states or ())
        if self.is_initialized:
            total += sum(x.nbytes // x.shape[2] * self.length for x in (self.keys, self.values))
        return total

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        return self.length + query_length, 0

    def get_seq_length(self) -> int:
        return self.length

    def get_max_length(self) -> int:
        return -1

    @property
    def is_croppable(self) -> bool:  # type: ignore[override]
        return self.states is None

    def crop(self, tokens_to_remove: int) -> None:
        """Forgets the last -tokens_to_remove tokens; a recurrent state cannot."""
        if tokens_to_remove == 0:
            return
        if self.states is not None:
            raise UserError(
                "a recurrent state cannot take back tokens; keep a clone() of the cache from before them, "
                "and do not use assisted decoding with this model"
            )
        self.length = max(0, self.length - abs(tokens_to_remove))

    def reset(self) -> None:
        self.keys = self.values = self.states = None  # type: ignore[assignment]
        self.is_initialized = False
        self.length = 0

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


class HybridCache(Cache):
    """The memory of all layers, for any mix of softmax and recurrent ones; a layer's kind shows at its first use.

    Args:
        layers: number of decoder layers.
        room: tokens that key/value buffers have room for from the start. Buffers double when full; giving the final
            length avoids the copies and the spare room.
    """

    layers: list[LayerMemory]  # type: ignore[assignment]

    def __init__(self, layers: int, room: int = FIRST_ROOM) -> None:
        super().__init__(layers=[LayerMemory(room) for _ in range(layers)])

    def state(self, layer_index: int) -> tuple[Tensor, ...] | None:
        """The states that layer left, or None before its first token."""
        return self.layers[layer_index].states

    def set_state(self, layer_index: int, states: tuple[Tensor, ...], tokens: int) -> None:
        """Stores the states of a layer after `tokens` more tokens."""
        self.layers[layer_index].set_states(states, tokens)

    def get_seq_length(self, layer_idx: int = 0) -> int:
        """Tokens seen so far, padding included: the longest of all layers, for some may keep nothing."""
        return max(layer.length for layer in self.layers)

    def get_mask_sizes(self, query_length: int, layer_idx: int) -> tuple[int, int]:
        return self.get_seq_length() + query_length, 0

    @property
    def batch_size(self) -> int:
        """Sequences held, or -1 before the first token."""
        return next((tensor.shape[0] for layer in self.layers for tensor in layer.tensors()), -1)

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Each sequence `repeats` times, side by side."""
        for layer in self.layers:
            layer.change(lambda x: x.repeat_interleave(repeats, dim=0))

    def batch_select_indices(self, indices: Tensor) -> None:
        """Keeps only these sequences of the batch, in this order."""
        for layer in self.layers:
            layer.change(lambda x: x[indices])

    def clone(self) -> HybridCache:
        """An independent copy: prefill a haystack once, then ask each question on a clone."""
        twin = HybridCache(len(self.layers))
        for mine, theirs in zip(self.layers, twin.layers, strict=True):
            theirs.__dict__.update(copy.copy(mine.__dict__))
            theirs.change(torch.clone)
        return twin

    def nbytes(self, used: bool = False) -> int:
        """Bytes allocated, or with `used` those that hold something."""
        if used:
            return sum(layer.used_bytes for layer in self.layers)
        return sum(tensor.nbytes for layer in self.layers for tensor in layer.tensors())
