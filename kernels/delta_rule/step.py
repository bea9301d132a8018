"""One token of decoding: the state is decayed, what it holds under the key is corrected, then it is read."""

from __future__ import annotations

import torch
from torch import Tensor


def delta_rule_step(
    q_BHK: Tensor,
    k_BHK: Tensor,
    v_BHV: Tensor,
    beta_BH: Tensor,
    log_decay: Tensor | None,
    state_BHKV: Tensor,
    scale: float,
) -> tuple[Tensor, Tensor]:
    """S_t = (I - beta_t k_t k_t^T) diag(exp(g_t)) S_{t-1} + beta_t k_t v_t^T, o_t = scale S_t^T q_t.

    `log_decay` is None, (B, H) or (B, H, K). Returns o_BHV in q's dtype, and the new state.
    """
    dtype = state_BHKV.dtype
    k_BHK1 = k_BHK.to(dtype)[..., None]
    if log_decay is not None:
        decay = log_decay.to(dtype).exp()[..., None]
        state_BHKV = state_BHKV * (decay if log_decay.ndim == 3 else decay[..., None])
    held_BH1V = k_BHK1.mT @ state_BHKV
    change_BH1V = beta_BH.to(dtype)[..., None, None] * (v_BHV.to(dtype)[..., None, :] - held_BH1V)
    state_BHKV = torch.addcmul(state_BHKV, k_BHK1, change_BH1V)
    q_BH1K = q_BHK.to(dtype)[..., None, :] * scale
    return (q_BH1K @ state_BHKV).squeeze(-2).to(q_BHK.dtype), state_BHKV
