"""What window attention keeps between calls: one place for each token that may still be seen.

A token at position p has place p if p < sinks, and else sinks + p % window: the ring's new tokens overwrite those that
went out of sight. All places are there from the first token on, so the memory's size never changes.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

POSITION_BYTES = 8


class WindowMemory(NamedTuple):
    """Keys, values and positions of M = sinks + window places; batch first, so a cache may reorder and repeat them."""

    k_BMJK: Tensor
    v_BMJV: Tensor
    positions_BM: Tensor  # int64; -1 where no token is yet


def memory_bytes(
    batch: int, kv_heads: int, head_dim: int, window: int, sinks: int = 0, bytes_per_element: int = 2
) -> int:
    """Bytes of a WindowMemory, its positions included, whatever the length: it is allocated whole at the first token.

    Args:
        head_dim: K, for values of the same size.
        bytes_per_element: of keys and values.
    """
    return batch * (sinks + window) * (2 * kv_heads * head_dim * bytes_per_element + POSITION_BYTES)


def empty_memory(k_BTJK: Tensor, v_BTJV: Tensor, window: int, sinks: int) -> WindowMemory:
    """A memory for keys and values like these, without a token."""
    batch, places = k_BTJK.shape[0], sinks + window
    positions_BM = torch.full((batch, places), -1, dtype=torch.int64, device=k_BTJK.device)
    return WindowMemory(
        k_BTJK.new_zeros(batch, places, *k_BTJK.shape[2:]),
        v_BTJV.new_zeros(batch, places, *v_BTJV.shape[2:]),
        positions_BM,
    )


def remember(
    memory: WindowMemory,
    k_BTJK: Tensor,
    v_BTJV: Tensor,
    positions_BT: Tensor,
    *,
    window: int,
    sinks: int,
    padded: bool,
    in_place: bool = False,
) -> WindowMemory:
    """The memory after these tokens.

    Args:
        positions_BT: -1 at padding, which is never written.
        padded: whether there may be padding; without it a single token costs less.
        in_place: write into `memory` and not into a copy of it. Ignored where autograd or inference mode forbid it.
    """
    if k_BTJK.shape[1] == 1:
        rows = torch.arange(k_BTJK.shape[0], device=k_BTJK.device)
        columns = torch.zeros_like(rows)
    else:  # of two tokens with one place, only the later one is written
        last_B1 = positions_BT.amax(1, keepdim=True)
        kept_BT = (positions_BT >= 0) & ((positions_BT < sinks) | (positions_BT > last_B1 - window))
        rows, columns = kept_BT.nonzero(as_tuple=True)
        padded = False
    position_N = positions_BT[rows, columns]
    place_N = torch.where(position_N < sinks, position_N.clamp(min=0), sinks + position_N % window)
    if in_place and not torch.is_grad_enabled() and (torch.is_inference_mode_enabled() or not memory[0].is_inference()):
        put = torch.Tensor.index_put_
    else:
        put = torch.Tensor.index_put

    def written(old_BM: Tensor, new_BT: Tensor) -> Tensor:
        new_N = new_BT[rows, columns].to(old_BM.dtype)
        if padded:
            keep_old_N = (position_N < 0).view(-1, *(1,) * (new_N.ndim - 1))
            new_N = torch.where(keep_old_N, old_BM[rows, place_N], new_N)
        return put(old_BM, (rows, place_N), new_N)

    return WindowMemory(*map(written, memory, (k_BTJK, v_BTJV, positions_BT)))
