"""The source's own attention over a pinned cache: what stands behind transformers' attention interface in a step."""

from __future__ import annotations

import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from torch import Tensor, nn
from transformers import AttentionInterface, PretrainedConfig

from halobench.errors import HalobenchError
from halobench.kernels.attention.decode import decode_attention
from halobench.mixers.memory import place_of

NAME = "halobench_decode"  # no mask is registered under it, so transformers makes none
_INTERFACE = "ALL_ATTENTION_FUNCTIONS"
_NAMED = threading.RLock()  # a config names one attention for all threads


class NotTakenOverError(HalobenchError):
    """A model whose attention does something that its decoding cannot be taken over with; the message is what."""


def decode_interface(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    softcap: float | None = None,
    s_aux: Tensor | None = None,
    sliding_window: int | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """One query a row, (B, H, 1, K), over a pinned layer's buffers; (B, 1, H, V).

    Raises:
        NotTakenOverError: the buffers did not arrive as the cache gave them, or the scores are to be changed in a way
            that is not known here.
    """
    place = place_of(key)
    family = type(module).__name__
    if place is None or query.shape[2] != 1:
        raise NotTakenOverError(f"{family} changes keys after its cache: its decoding cannot be taken over")
    if attention_mask is not None:
        raise NotTakenOverError(f"{family} makes a mask of its own, which decode_attention does not know")
    if kwargs.get("position_bias") is not None:
        raise NotTakenOverError(f"{family} adds a bias to its scores, which decode_attention does not know")
    never_full = place.window is None and sliding_window is not None and sliding_window >= key.shape[2]
    if sliding_window not in (None, place.window) and not never_full:
        raise NotTakenOverError(f"{family} has a window of {sliding_window}, its cache one of {place.window}")
    place.attended += 1
    o_BHV = decode_attention(
        query[:, :, 0], key, value, place.lengths_B,
        scale=query.shape[-1] ** -0.5 if scaling is None else scaling,
        soft_cap=softcap, sinks_H=s_aux, backend=place.backend,
    )  # fmt: skip
    return o_BHV[:, None], None


def asks_the_interface(attention: nn.Module) -> bool:
    """Whether a module of transformers looks its kernel up by name, so that another can be put there."""
    return hasattr(sys.modules[type(attention).__module__], _INTERFACE)


@contextmanager
def decoding(config: PretrainedConfig) -> Iterator[None]:
    """The model of this (text) config attends through `decode_interface` for the length of a block.

    One such block runs at a time. A plain forward of the same model in another thread meanwhile is an error there.
    """
    with _NAMED:
        before = config._attn_implementation
        if before == NAME:
            raise HalobenchError("a decode step began inside another of the same model")
        config._attn_implementation = NAME
        try:
            yield
        finally:
            config._attn_implementation = before


AttentionInterface.register(NAME, decode_interface)
