"""The definition: every query against every key of the whole text, with the rule written out as a mask."""

from __future__ import annotations

import torch
from torch import Tensor

from halobench.kernels.attention.naive import attend_where_naive


def window_attention_naive(
    q_BTHK: Tensor,
    k_BTJK: Tensor,
    v_BTJV: Tensor,
    *,
    positions_BT: Tensor,
    padding_mask_BT: Tensor | None = None,
    window: int,
    sinks: int = 0,
    scale: float,
    soft_cap: float | None = None,
    sinks_H: Tensor | None = None,
) -> Tensor:
    """A whole text at once, o_BTHV; arguments as in `window_attention`. A padded query sees itself alone."""
    batch, tokens = k_BTJK.shape[:2]
    real_BT = torch.ones(batch, tokens, dtype=torch.bool, device=k_BTJK.device)
    if padding_mask_BT is not None:
        real_BT = padding_mask_BT.bool()
    query_BT1, key_B1T = positions_BT[:, :, None], positions_BT[:, None, :]
    seen_BTT = (key_B1T <= query_BT1) & ((query_BT1 - key_B1T < window) | (key_B1T < sinks))
    seen_BTT = seen_BTT & real_BT[:, None, :] & real_BT[:, :, None]
    allowed_B1TT = (seen_BTT | torch.eye(tokens, dtype=torch.bool, device=k_BTJK.device))[:, None]
    return attend_where_naive(q_BTHK, k_BTJK, v_BTJV, allowed_B1TT, scale=scale, soft_cap=soft_cap, sinks_H=sinks_H)
