"""What a hybrid remembers between forward calls: keys and values of softmax layers, states of recurrent ones."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import Cache

from halobench.errors import UserError
from halobench.mixers.memory import FIRST_ROOM, LayerMemory, Place


class Steps:
    """Where a pinned cache stands, in tensors on the device: what a captured step reads instead of Python's numbers.

    Args:
        seen: tokens before the next one.
        windows: those of the layers; None is a layer that keeps all.
        backend: of attention and recurrence, as in `kernels.attention.decode`.
    """

    def __init__(self, seen: int, batch: int, windows: set[int | None], device: torch.device, backend: str) -> None:
        self.backend = backend
        with torch.inference_mode(False):
            self.seen_1 = torch.full((1,), seen, dtype=torch.int64, device=device)
            self.places = {
                window: Place(
                    slot_1=self.seen_1 if window is None else torch.zeros_like(self.seen_1),
                    lengths_B=torch.ones(batch, dtype=torch.int64, device=device),
                    window=window,
                    backend=backend,
                )
                for window in windows
            }

    def begin(self) -> None:
        """Makes slots and lengths those of the next token; device operations only."""
        for window, place in self.places.items():
            place.lengths_B.copy_(self.seen_1 + 1)
            if window is not None:
                place.slot_1.copy_(self.seen_1 % window)
                place.lengths_B.clamp_(max=window)

    def end(self) -> None:
        """Counts the token, on the device."""
        self.seen_1.add_(1)


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
        self.steps: Steps | None = None
        self.engine: Any = None  # what takes single tokens while generate() runs, see HybridForCausalLM

    def pin(self, room: int, *, backend: str = "auto", fixed_states: bool) -> Steps:
        """From here on one token a call for all rows alike, until `unpin`: see LayerMemory.

        The caller frames each step with `begin` and `end` of the result and then calls `advance`; a replayed step runs
        no Python that could count.

        Args:
            room: tokens in all, those seen included.
            fixed_states: states stay in the tensors that hold them, as a captured step needs.

        Raises:
            UserError: nothing was read yet.
        """
        if self.batch_size < 1:
            raise UserError("an empty cache cannot be pinned; read at least one token first")
        device = next(tensor.device for layer in self.layers for tensor in layer.tensors())
        windows = {layer.window for layer in self.layers}
        self.steps = Steps(self.get_seq_length(), self.batch_size, windows, device, backend)
        try:
            for layer in self.layers:
                layer.pin(self.steps.places[layer.window], room, fixed_states=fixed_states)
        except BaseException:
            self.unpin()
            raise
        return self.steps

    def advance(self) -> None:
        """Counts the token of a step, on the host."""
        for layer in self.layers:
            layer.advance()

    def unpin(self) -> None:
        """Back to a cache that takes any number of tokens and grows."""
        if self.steps is not None:
            for layer in self.layers:
                layer.unpin()
            self.steps = None

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
        self.unpin()
        if tokens_to_remove != 0:
            for layer in self.layers:
                layer.require_croppable()
        super().crop(tokens_to_remove)

    def reorder_cache(self, beam_idx: Tensor) -> None:
        """The sequences of the batch in another order, as beam search chooses them."""
        self.unpin()
        for layer in self.layers:
            layer.reorder_cache(beam_idx)

    def reset(self) -> None:
        self.unpin()
        super().reset()

    @property
    def batch_size(self) -> int:
        """Sequences held, or -1 before the first token."""
        return next((tensor.shape[0] for layer in self.layers for tensor in layer.tensors()), -1)

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Each sequence `repeats` times, side by side."""
        self.unpin()
        for layer in self.layers:
            layer.change(lambda x: x.repeat_interleave(repeats, dim=0))

    def batch_select_indices(self, indices: Tensor) -> None:
        """Keeps only these sequences of the batch, in this order."""
        self.unpin()
        for layer in self.layers:
            layer.change(lambda x: x[indices])

    def clone(self) -> HybridCache:
        """An independent copy: prefill a haystack once, then ask each question on a clone."""
        self.unpin()
        twin = HybridCache(len(self.layers))
        for mine, theirs in zip(self.layers, twin.layers, strict=True):
            theirs.__dict__.update(copy.copy(mine.__dict__))
            theirs.change(torch.clone)
        return twin

    def __deepcopy__(self, memo: dict[int, Any]) -> HybridCache:
        return self.clone()

    def nbytes(self, used: bool = False) -> int:
        """Bytes allocated, or with `used` those that hold something."""
        if used:
            return sum(layer.used_bytes for layer in self.layers)
        return sum(tensor.nbytes for layer in self.layers for tensor in layer.tensors())
