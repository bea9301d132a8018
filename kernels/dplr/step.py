"""One token of decoding: the state is read under a, decayed, written under b and k, read under q."""

from __future__ import annotations

import torch
from torch import Tensor


def dplr_step(
    q_BHK: Tensor,
    k_BHK: Tensor,
    v_BHV: Tensor,
    a_BHK: Tensor,
    b_BHK: Tensor,
    log_decay_BHK: Tensor,
    state_BHKV: Tensor,
    scale: float,
) -> tuple[Tensor, Tensor]:
    """S_t = diag(exp(g_t)) S_{t-1} + b_t (a_t^T S_{t-1}) + k_t v_t^T, o_t = scale S_t^T q_t.

    Returns o_BHV in q's dtype, and the new state.
    """
    dtype = state_BHKV.dtype
    read_BH1V = a_BHK.to(dtype)[..., None, :] @ state_BHKV
    update_BHKV = k_BHK.to(dtype)[..., None] * v_BHV[..., None, :]
    update_BHKV = torch.addcmul(update_BHKV, b_BHK.to(dtype)[..., None], read_BH1V)
    state_BHKV = torch.addcmul(update_BHKV, state_BHKV, log_decay_BHK.to(dtype).exp()[..., None])
    q_BH1K = q_BHK.to(dtype)[..., None, :] * scale
    return (q_BH1K @ state_BHKV).squeeze(-2).to(q_BHK.dtype), state_BHKV
