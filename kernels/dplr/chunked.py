"""The recurrence as batched matrix products: fast on any device, no loop over tokens.

Let u_i = S_{i-1}^T a_i, what token i reads. S_{i-1} is the chunk's first state S, decayed, plus what the tokens before
i wrote: b_j u_j^T + k_j v_j^T. With c the decay (log) summed over the chunk, the u of a chunk solve

    (I - A_ab) U = (A exp c_prev) S + A_ak V,    A_xy,ij = sum_c x_ic y_jc exp(c_{i-1} - c_j)  for j < i, x = a

(I - A_ab)^-1 is taken for all chunks at once, in fp32; then

    hand-over      U = U_own + W S,  S' = diag(exp(c_C)) S + (B exp(c_C - c))^T U + (K exp(c_C - c))^T V
    output         O = (Q exp c) S + A_qb U + A_qk V,   A_xy,ij = sum_c x_ic y_jc exp(c_i - c_j)  for j <= i, x = q

A row a_i stands one token earlier: it meets the decays up to i-1, and the columns up to i-1, as q_{i-1} does. So the
four products share their decays and are one call.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from halobench.kernels.chunks import (
    add_product,
    cut,
    cut_together,
    hand_over_corrected,
    join,
    padded_superblocks,
    starting_state,
    without_autocast,
)
from halobench.kernels.decays import decayed_pairs
from halobench.kernels.triangular import unit_lower_inverse


def dplr_chunked(
    q_BTHK: Tensor,
    k_BTHK: Tensor,
    v_BTHV: Tensor,
    a_BTHK: Tensor,
    b_BTHK: Tensor,
    log_decay_BTHK: Tensor,
    *,
    scale: float,
    initial_state_BHKV: Tensor | None = None,
    chunk_size: int = 32,
) -> tuple[Tensor, Tensor]:
    """S_t = diag(exp(g_t)) S_{t-1} + b_t (a_t^T S_{t-1}) + k_t v_t^T, o_t = scale S_t^T q_t, in chunks.

    All of it is computed in the state's dtype: an error of bf16 in one u would be copied into all later ones.

    Args:
        a_BTHK, b_BTHK: what the state is read under, and what the result is written under.
        log_decay_BTHK: g, at most 0; any strength.
        scale: factor on the output; RWKV-7 has 1.
        initial_state_BHKV: the state before the first token; zeros by default.
        chunk_size: tokens in a chunk, a power of two; any T is accepted.

    Returns:
        o_BTHV in the dtype of q, and the state after the last token (fp32, or fp64 for fp64 inputs).
    """
    start = starting_state(k_BTHK, v_BTHV, initial_state_BHKV)
    inputs = q_BTHK, k_BTHK, v_BTHV, a_BTHK, b_BTHK, log_decay_BTHK
    state_GKV, outputs = start.flatten(0, 1), []
    with without_autocast(q_BTHK):
        for (q, k, v, a, b, decay), chunk in padded_superblocks(inputs, chunk_size):
            earlier_a = F.pad(a[:, 1:], (0, 0, 0, 0, 0, 1))  # what crosses into the chunk before is not used
            rows_NG2CK = cut_together((q.to(start.dtype) * scale, earlier_a), chunk, start.dtype)
            first_NG1K = a[:, ::chunk].to(start.dtype).transpose(0, 1).flatten(1, 2)[:, :, None]
            columns_NG2CK = cut_together((b, k), chunk, start.dtype)
            values, decays = cut(v, chunk, start.dtype), cut(decay, chunk, start.dtype)
            o_NGCV, state_GKV = _superblock(rows_NG2CK, first_NG1K, columns_NG2CK, values, decays, state_GKV)
            outputs.append(join(o_NGCV, q.shape[2], q.shape[1]).to(q.dtype))
    return (outputs[0] if len(outputs) == 1 else torch.cat(outputs, dim=1)), state_GKV.view(start.shape)


def _superblock(
    rows_NG2CK: Tensor,
    first_NG1K: Tensor,
    columns_NG2CK: Tensor,
    v_NGCV: Tensor,
    log_decay_NGCK: Tensor,
    state_GKV: Tensor,
) -> tuple[Tensor, Tensor]:
    """Outputs of one superblock and the state at its end.

    Rows are q, which carries the scale, and the a of the next token, whose first in each chunk is apart; columns b, k.
    """
    pairs = decayed_pairs(rows_NG2CK, columns_NG2CK, log_decay_NGCK)
    ab_NGCC, ak_NGCC = (_one_later(x) for x in pairs.scores_RCSC[:, :, 1].unbind(-2))
    inverse_NGCC = unit_lower_inverse(-ab_NGCC)
    b_NGCK, k_NGCK = pairs.to_end_SCK.unbind(2)
    from_start_q, from_start_a = pairs.from_start_RCK.unbind(2)
    read_NGCK = torch.cat((first_NG1K, from_start_a[..., :-1, :]), dim=-2)
    u_NGCV, before_NGKV, state_GKV = hand_over_corrected(
        pairs.whole_D1,
        k_NGCK.mT @ v_NGCV,
        b_NGCK,
        inverse_NGCC @ (ak_NGCC @ v_NGCV),
        inverse_NGCC @ read_NGCK,
        state_GKV,
    )
    written = torch.cat((u_NGCV, v_NGCV), dim=-2)
    return add_product(from_start_q @ before_NGKV, pairs.scores_RCSC[:, :, 0].flatten(-2), written), state_GKV


def _one_later(x_CC: Tensor) -> Tensor:
    """Rows moved down by one, the first row zero: from where a row stood to the token it belongs to."""
    return F.pad(x_CC[..., :-1, :], (0, 0, 1, 0))
