"""The recurrence as batched matrix products: fast on any device, no loop over tokens.

With b_i the decay (log) of a channel summed over the chunk up to token i:

    within a chunk      o_i  = sum_{j<=i} A_ij v_j,   A_ij = sum_c q_ic k_jc exp(b_ic - b_jc)
    from before it      o_i += (q_i exp(b_i)) S_prev
    what it adds        S    = diag(exp(b_C)) S_prev + sum_j (k_j exp(b_C - b_j))^T v_j

kernels/decays.py takes A for any decay. Only the state is handed from chunk to chunk in a loop, and only
superblocks of chunks are in memory at once.
"""

from __future__ import annotations

import torch
from torch import Tensor

from halobench.kernels.chunks import (
    add_product,
    cut,
    hand_over,
    join,
    padded_superblocks,
    starting_state,
    without_autocast,
)
from halobench.kernels.decays import decayed_pairs


def vector_decay_chunked(
    q_BTHK: Tensor,
    k_BTHK: Tensor,
    v_BTHV: Tensor,
    log_decay_BTHK: Tensor,
    *,
    scale: float,
    initial_state_BHKV: Tensor | None = None,
    chunk_size: int = 32,
) -> tuple[Tensor, Tensor]:
    """S_t = diag(exp(g_t)) S_{t-1} + k_t^T v_t, o_t = scale q_t S_t, in chunks.

    Args:
        log_decay_BTHK: g, at most 0; any strength.
        scale: factor on the output, usually 1 / sqrt(K).
        initial_state_BHKV: the state before the first token; zeros by default.
        chunk_size: tokens in a chunk, a power of two; any T is accepted.

    Returns:
        o_BTHV in the dtype of q, and the state after the last token (fp32, or fp64 for fp64 inputs).
    """
    start = starting_state(k_BTHK, v_BTHV, initial_state_BHKV)
    heads, dtype = q_BTHK.shape[2], q_BTHK.dtype
    state_GKV, outputs = start.flatten(0, 1), []
    with without_autocast(q_BTHK):
        for (*qkv, decay), chunk in padded_superblocks((q_BTHK, k_BTHK, v_BTHV, log_decay_BTHK), chunk_size):
            q, k, v = (cut(x, chunk, dtype) for x in qkv)
            o_NGCV, state_GKV = _superblock(q * scale, k, v, cut(decay, chunk, start.dtype), state_GKV)
            outputs.append(join(o_NGCV, heads, decay.shape[1]))
    return (outputs[0] if len(outputs) == 1 else torch.cat(outputs, dim=1)), state_GKV.view(start.shape)


def _superblock(
    q_NGCK: Tensor, k_NGCK: Tensor, v_NGCV: Tensor, log_decay_NGCK: Tensor, state_GKV: Tensor
) -> tuple[Tensor, Tensor]:
    """Outputs of one superblock and the state at its end; q carries the scale."""
    pairs = decayed_pairs(q_NGCK[:, :, None], k_NGCK[:, :, None], log_decay_NGCK)
    added_NGKV = pairs.to_end_SCK[:, :, 0].mT @ v_NGCV
    before_NGKV, state_GKV = hand_over(pairs.whole_D1, added_NGKV.to(state_GKV.dtype), state_GKV)
    o_NGCV = pairs.from_start_RCK[:, :, 0] @ before_NGKV.to(q_NGCK.dtype)
    return add_product(o_NGCV, pairs.scores_RCSC[:, :, 0, :, 0], v_NGCV), state_GKV
