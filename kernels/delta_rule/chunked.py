"""The recurrence as batched matrix products: fast on any device, no loop over tokens.

Token i writes k_i u_i^T with u_i = beta_i (v_i - what the decayed state holds under k_i), and that state is the chunk's
first, S, plus what the tokens before i wrote. With b the decay (log) summed over the chunk, the u of a chunk solve

    (I + L) U = beta (V - (K exp b) S),    L_ij = beta_i sum_c k_ic k_jc exp(b_ic - b_jc)  for j < i

(the UT form of a product of Householder-like factors). (I + L)^-1 is taken for all chunks at once, in fp32; then

    hand-over      U = U_own + W S,  S' = diag(exp(b_C)) S + (K exp(b_C - b))^T U     chunk after chunk
    output         O = (Q exp b) S + A U,  A_ij = sum_c q_ic k_jc exp(b_ic - b_jc)    for j <= i, all chunks at once
"""

from __future__ import annotations

import torch
from torch import Tensor

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


def delta_rule_chunked(
    q_BTHK: Tensor,
    k_BTHK: Tensor,
    v_BTHV: Tensor,
    beta_BTH: Tensor,
    log_decay: Tensor | None,
    *,
    scale: float,
    initial_state_BHKV: Tensor | None = None,
    chunk_size: int = 32,
) -> tuple[Tensor, Tensor]:
    """S_t = (I - beta_t k_t k_t^T) diag(exp(g_t)) S_{t-1} + beta_t k_t v_t^T, o_t = scale S_t^T q_t, in chunks.

    All of it is computed in the state's dtype: an error of bf16 in one u would be copied into all later ones.

    Args:
        beta_BTH: how far what is held under the key is replaced, in [0, 2].
        log_decay: g, at most 0: None for no decay, (B, T, H) for each head, (B, T, H, K) for each key channel.
        scale: factor on the output, usually 1 / sqrt(K).
        initial_state_BHKV: the state before the first token; zeros by default.
        chunk_size: tokens in a chunk, a power of two; any T is accepted.

    Returns:
        o_BTHV in the dtype of q, and the state after the last token (fp32, or fp64 for fp64 inputs).
    """
    start = starting_state(k_BTHK, v_BTHV, initial_state_BHKV)
    decay_BTHD = torch.zeros_like(beta_BTH) if log_decay is None else log_decay
    if decay_BTHD.ndim == 3:
        decay_BTHD = decay_BTHD[..., None]
    inputs = q_BTHK, k_BTHK, v_BTHV, beta_BTH[..., None], decay_BTHD
    state_GKV, outputs = start.flatten(0, 1), []
    with without_autocast(q_BTHK):
        for (q, k, *rest), chunk in padded_superblocks(inputs, chunk_size):
            rows_NG2CK = cut_together((q.to(start.dtype) * scale, k), chunk, start.dtype)
            v, beta, decay = (cut(x, chunk, start.dtype) for x in rest)
            o_NGCV, state_GKV = _superblock(rows_NG2CK, v, beta, decay, state_GKV)
            outputs.append(join(o_NGCV, q.shape[2], q.shape[1]).to(q.dtype))
    return (outputs[0] if len(outputs) == 1 else torch.cat(outputs, dim=1)), state_GKV.view(start.shape)


def _superblock(
    rows_NG2CK: Tensor, v_NGCV: Tensor, beta_NGC1: Tensor, log_decay_NGCD: Tensor, state_GKV: Tensor
) -> tuple[Tensor, Tensor]:
    """Outputs of one superblock and the state at its end; the rows are q, which carries the scale, and k."""
    pairs = decayed_pairs(rows_NG2CK, rows_NG2CK[:, :, 1:], log_decay_NGCD)
    q_scores_NGCC, k_scores_NGCC = pairs.scores_RCSC[..., 0, :].unbind(2)
    q_NGCK, k_NGCK = pairs.from_start_RCK.unbind(2)
    # What solves for U, applied to beta V and to - beta K: the column of a token by its beta.
    inverse_NGCC = unit_lower_inverse(k_scores_NGCC.tril(-1) * beta_NGC1) * beta_NGC1.mT
    u_NGCV, before_NGKV, state_GKV = hand_over_corrected(
        pairs.whole_D1, None, pairs.to_end_SCK[:, :, 0], inverse_NGCC @ v_NGCV, -inverse_NGCC @ k_NGCK, state_GKV
    )
    return add_product(q_NGCK @ before_NGKV, q_scores_NGCC, u_NGCV), state_GKV
