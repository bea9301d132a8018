"""The operator in flash-linear-attention (0.6): `chunk_simple_gla`, layout and signs as ours, log decays natural.

A decay that is the same at every token is its `g_gamma`, which has no gradient there; where one is needed, and for a
decay of each token, it is `g`.
"""

from __future__ import annotations

import torch
from torch import Tensor

from halobench.kernels.backend import compute_dtype, fla_ops
from halobench.kernels.decays import bounded_decay


def scalar_decay_fla(
    q_BTHK: Tensor,
    k_BTHK: Tensor,
    v_BTHV: Tensor,
    log_decay: Tensor,
    *,
    scale: float,
    initial_state_BHKV: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """S_t = exp(g_t) S_{t-1} + k_t^T v_t, o_t = scale q_t S_t, on an NVIDIA GPU.

    Arguments and results are those of `scalar_decay_chunked`; the state is fp32.
    """
    dtype = compute_dtype(q_BTHK)
    log_decay = bounded_decay(log_decay, torch.float32)
    if log_decay.ndim == 1 and log_decay.requires_grad:
        log_decay = log_decay.expand(q_BTHK.shape[:3])
    constant = log_decay.ndim == 1
    o_BTHV, state_BHKV = fla_ops("simple_gla").chunk_simple_gla(
        q=q_BTHK.to(dtype),
        k=k_BTHK.to(dtype),
        v=v_BTHV.to(dtype),
        g=None if constant else log_decay,
        g_gamma=log_decay if constant else None,
        scale=scale,
        initial_state=None if initial_state_BHKV is None else initial_state_BHKV.float(),
        output_final_state=True,
    )
    return o_BTHV.to(q_BTHK.dtype), state_BHKV
