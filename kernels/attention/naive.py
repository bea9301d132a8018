"""The definition: every score is computed, masked and normalised. Every other form is tested against it."""

from __future__ import annotations

import torch
from torch import Tensor

from halobench.kernels.attention.mask import allowed_keys


def attend_naive(
    q_BTHK: Tensor,
    k_BSJK: Tensor,
    v_BSJV: Tensor,
    *,
    scale: float,
    key_padding_mask_BS: Tensor | None = None,
    window: int | None = None,
    soft_cap: float | None = None,
    sinks_H: Tensor | None = None,
) -> Tensor:
    """Causal softmax attention, o_BTHV; arguments as in `attend`."""
    tokens, keys = q_BTHK.shape[1], k_BSJK.shape[1]
    allowed = allowed_keys(0, tokens, tokens, keys, q_BTHK.device, window, key_padding_mask_BS)
    return attend_where_naive(q_BTHK, k_BSJK, v_BSJV, allowed, scale=scale, soft_cap=soft_cap, sinks_H=sinks_H)


def attend_where_naive(
    q_BTHK: Tensor,
    k_BSJK: Tensor,
    v_BSJV: Tensor,
    allowed: Tensor,
    *,
    scale: float,
    soft_cap: float | None = None,
    sinks_H: Tensor | None = None,
) -> Tensor:
    """Softmax attention to the keys that `allowed`, (T, S) or (B, 1, T, S), names; o_BTHV."""
    groups = q_BTHK.shape[2] // k_BSJK.shape[2]
    k_BSHK, v_BSHV = k_BSJK.repeat_interleave(groups, dim=2), v_BSJV.repeat_interleave(groups, dim=2)
    scores_BHTS = torch.einsum("bthk,bshk->bhts", q_BTHK, k_BSHK) * scale
    if soft_cap is not None:
        scores_BHTS = soft_cap * torch.tanh(scores_BHTS / soft_cap)
    scores_BHTS = scores_BHTS.masked_fill(~allowed, -torch.inf)
    if sinks_H is None:
        return torch.einsum("bhts,bshv->bthv", scores_BHTS.softmax(-1), v_BSHV)
    sink_BHT1 = sinks_H[None, :, None, None].expand(*scores_BHTS.shape[:3], 1)
    probabilities = torch.cat((scores_BHTS, sink_BHT1), dim=-1).softmax(-1)[..., :-1]
    return torch.einsum("bhts,bshv->bthv", probabilities, v_BSHV)
