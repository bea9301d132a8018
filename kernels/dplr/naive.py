"""The definition: one token at a time, as the recurrence is written. Every other form is tested against it."""

from __future__ import annotations

import torch
from torch import Tensor

from halobench.kernels.chunks import starting_state
from halobench.kernels.dplr.step import dplr_step


def dplr_naive(
    q_BTHK: Tensor,
    k_BTHK: Tensor,
    v_BTHV: Tensor,
    a_BTHK: Tensor,
    b_BTHK: Tensor,
    log_decay_BTHK: Tensor,
    *,
    scale: float,
    initial_state_BHKV: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """S_t = diag(exp(g_t)) S_{t-1} + b_t (a_t^T S_{t-1}) + k_t v_t^T, o_t = scale S_t^T q_t, token by token.

    Args:
        a_BTHK, b_BTHK: what the state is read under, and what the result is written under.
        log_decay_BTHK: g, at most 0.
        scale: factor on the output; RWKV-7 has 1.
        initial_state_BHKV: the state before the first token; zeros by default.

    Returns:
        o_BTHV in the dtype of q, and the state after the last token (fp32, or fp64 for fp64 inputs).
    """
    state_BHKV = starting_state(k_BTHK, v_BTHV, initial_state_BHKV)
    outputs = []
    for t in range(q_BTHK.shape[1]):
        q, k, v, a, b, decay = (x[:, t] for x in (q_BTHK, k_BTHK, v_BTHV, a_BTHK, b_BTHK, log_decay_BTHK))
        o_BHV, state_BHKV = dplr_step(q, k, v, a, b, decay, state_BHKV, scale)
        outputs.append(o_BHV)
    return torch.stack(outputs, dim=1), state_BHKV
