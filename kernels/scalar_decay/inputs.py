"""What all forms of the operator make of their inputs: the state at the start, decays within bounds."""

from __future__ import annotations

import torch
from torch import Tensor

from halobench.kernels.chunks import zero_state

# Decays (log) below these leave nothing that the dtype holds beside a token's own values: exp(-40) is 4e-18 and
# exp(-80) 2e-35. Far lower ones would take the digits of the sums that they are part of, and -inf would make them NaN.
LOWEST = {torch.float32: -40.0, torch.float64: -80.0}


def bounded_decay(log_decay: Tensor, dtype: torch.dtype) -> Tensor:
    """The log decay in fp32 or fp64, no lower than matters there; the gradient is zero below."""
    return log_decay.to(dtype).clamp(min=LOWEST[dtype])


def starting_state(k_BTHK: Tensor, v_BTHV: Tensor, given_BHKV: Tensor | None) -> Tensor:
    """The given state, or zeros, in the dtype that states are summed in: fp32 (fp64 for fp64 inputs)."""
    if given_BHKV is None:
        batch, _, heads, key = k_BTHK.shape
        return zero_state(k_BTHK.new_empty(batch, heads, key), v_BTHV.new_empty(v_BTHV.shape[-1:]))
    return given_BHKV.to(torch.float64 if k_BTHK.dtype == torch.float64 else torch.float32)
