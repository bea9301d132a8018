"""One token of decoding: the state is decayed, written, read."""

from __future__ import annotations

import torch
from torch import Tensor


def vector_decay_step(
    q_BHK: Tensor, k_BHK: Tensor, v_BHV: Tensor, log_decay_BHK: Tensor, state_BHKV: Tensor, scale: float
) -> tuple[Tensor, Tensor]:
    """S_t = diag(exp(g_t)) S_{t-1} + k_t^T v_t, o_t = scale q_t S_t. Returns o_BHV in q's dtype, and the new state."""
    decay_BHK1 = log_decay_BHK.to(state_BHKV.dtype).exp()[..., None]
    update_BHKV = k_BHK[..., :, None].to(state_BHKV.dtype) * v_BHV[..., None, :]
    state_BHKV = torch.addcmul(update_BHKV, state_BHKV, decay_BHK1)
    q_BH1K = q_BHK[..., None, :].to(state_BHKV.dtype) * scale
    return (q_BH1K @ state_BHKV).squeeze(-2).to(q_BHK.dtype), state_BHKV
