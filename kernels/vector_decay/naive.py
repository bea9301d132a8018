"""The definition: one token at a time, as the recurrence is written. Every other form is tested against it."""

from __future__ import annotations

import torch
from torch import Tensor

from halobench.kernels.chunks import starting_state
from halobench.kernels.vector_decay.step import vector_decay_step


def vector_decay_naive(
    q_BTHK: Tensor,
    k_BTHK: Tensor,
    v_BTHV: Tensor,
    log_decay_BTHK: Tensor,
    *,
    scale: float,
    initial_state_BHKV: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """S_t = diag(exp(g_t)) S_{t-1} + k_t^T v_t, o_t = scale q_t S_t, token by token.

    Args:
        log_decay_BTHK: g, at most 0.
        scale: factor on the output, usually 1 / sqrt(K).
        initial_state_BHKV: the state before the first token; zeros by default.

    Returns:
        o_BTHV in the dtype of q, and the state after the last token (fp32, or fp64 for fp64 inputs).
    """
    state_BHKV = starting_state(k_BTHK, v_BTHV, initial_state_BHKV)
    outputs = []
    for t in range(q_BTHK.shape[1]):
        token = q_BTHK[:, t], k_BTHK[:, t], v_BTHV[:, t], log_decay_BTHK[:, t]
        o_BHV, state_BHKV = vector_decay_step(*token, state_BHKV, scale)
        outputs.append(o_BHV)
    return torch.stack(outputs, dim=1), state_BHKV
