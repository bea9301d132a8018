"""One token of decoding: the state is decayed, written, read."""

from __future__ import annotations

import torch
from torch import Tensor

from halobench.kernels.chunks import without_autocast


def scalar_decay_step(
    q_BHK: Tensor, k_BHK: Tensor, v_BHV: Tensor, log_decay: Tensor, state_BHKV: Tensor, scale: float
) -> tuple[Tensor, Tensor]:
    """One step of the recurrence; `log_decay` is (H,) or (B, H). Returns o_BHV in q's dtype, and the new state.

    Autocast, where it is on, is switched off: the state would be read in bf16.
    """
    device = state_BHKV.device.type
    if torch.amp.is_autocast_available(device) and torch.is_autocast_enabled(device):
        with without_autocast(state_BHKV):
            return scalar_decay_step(q_BHK, k_BHK, v_BHV, log_decay, state_BHKV, scale)
    decay = log_decay.to(state_BHKV.dtype).exp()[..., None, None]
    update_BHKV = k_BHK[..., :, None].to(state_BHKV.dtype) * v_BHV[..., None, :]
    state_BHKV = torch.addcmul(update_BHKV, state_BHKV, decay)
    q_BH1K = q_BHK[..., None, :].to(state_BHKV.dtype) * scale
    return (q_BH1K @ state_BHKV).squeeze(-2).to(q_BHK.dtype), state_BHKV
