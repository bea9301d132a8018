"""The definition: one token at a time, as the recurrence is written. Every other form is tested against it."""

from __future__ import annotations

import torch
from torch import Tensor

from halobench.kernels.chunks import starting_state
from halobench.kernels.delta_rule.step import delta_rule_step


def delta_rule_naive(
    q_BTHK: Tensor,
    k_BTHK: Tensor,
    v_BTHV: Tensor,
    beta_BTH: Tensor,
    log_decay: Tensor | None,
    *,
    scale: float,
    initial_state_BHKV: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """S_t = (I - beta_t k_t k_t^T) diag(exp(g_t)) S_{t-1} + beta_t k_t v_t^T, o_t = scale S_t^T q_t, token by token.

    Args:
        beta_BTH: how far what is held under the key is replaced, in [0, 2].
        log_decay: g, at most 0: None for no decay, (B, T, H) for each head, (B, T, H, K) for each key channel.
        scale: factor on the output, usually 1 / sqrt(K).
        initial_state_BHKV: the state before the first token; zeros by default.

    Returns:
        o_BTHV in the dtype of q, and the state after the last token (fp32, or fp64 for fp64 inputs).
    """
    state_BHKV = starting_state(k_BTHK, v_BTHV, initial_state_BHKV)
    outputs = []
    for t in range(q_BTHK.shape[1]):
        decay = None if log_decay is None else log_decay[:, t]
        token = q_BTHK[:, t], k_BTHK[:, t], v_BTHV[:, t], beta_BTH[:, t]
        o_BHV, state_BHKV = delta_rule_step(*token, decay, state_BHKV, scale)
        outputs.append(o_BHV)
    return torch.stack(outputs, dim=1), state_BHKV
