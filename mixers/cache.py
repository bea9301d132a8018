"""What a hybrid remembers between forward calls: keys and values of softmax layers, states of recurrent ones."""

from __future__ import annotations

import copy
from collections.abc import Sequence

import torch
from torch import Tensor
from transformers.cache_utils import Cache

from halobench.errors import UserError
from halobench.mixers.memory import FIRST_ROOM, LayerMemory


class HybridCache(Cache):
    """The memory of all layers, for any mix of softmax and recurrent ones; a layer's kind shows at its first use.

    Args:
        layers: number of decoder layers.
        room: tokens that key/value buffers have room for from the start. Buffers double when full; giving the final
            length avoids the copies and the spare room.
        windows: for each layer, the sliding window of the source's own attention there, which calls `update` and reads
            masks that transformers made; None where a layer needs all its past, or is a mixer.
    """

    layers: list[LayerMemory]  # type: ignore[assignment]

    def __init__(self, layers: int, room: int = FIRST_ROOM, windows: Sequence[int | None] | None = None) -> None:
        windows = [None] * layers if windows is None else windows
        if len(windows) != layers or any(window is not None and window < 1 for window in windows):
            raise UserError(
                f"windows is {list(windows)}; give one for each of {layers} layers: a number of tokens, or None"
            )
        super().__init__(layers=[LayerMemory(room, window) for window in windows])

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
        return self.layers[layer_idx].mask_sizes(self.get_seq_length(), query_length)

    def crop(self, tokens_to_remove: int) -> None:
        """Forgets the last -tokens_to_remove tokens in all layers, or raises UserError and changes none."""
        if tokens_to_remove != 0:
            for layer in self.layers:
                layer.require_croppable()
        super().crop(tokens_to_remove)

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
