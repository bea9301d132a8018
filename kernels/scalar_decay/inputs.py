"""The state that all forms of the operator start from."""

from __future__ import annotations

import torch
from torch import Tensor

from halobench.kernels.chunks import zero_state


def starting_state(k_BTHK: Tensor, v_BTHV: Tensor, given_BHKV: Tensor | None) -> Tensor:
    """The given state, or zeros, in the dtype that states are summed in: fp32 (fp64 for fp64 inputs)."""
    if given_BHKV is None:
        batch, _, heads, key = k_BTHK.shape
        return zero_state(k_BTHK.new_empty(batch, heads, key), v_BTHV.new_empty(v_BTHV.shape[-1:]))
    return given_BHKV.to(torch.float64 if k_BTHK.dtype == torch.float64 else torch.float32)
