"""The operator in flash-linear-attention (0.6): `chunk_gla`, layout and signs as ours, log decays natural."""

from __future__ import annotations

import torch
from torch import Tensor

from halobench.kernels.backend import compute_dtype, fla_ops
from halobench.kernels.decays import bounded_decay


def vector_decay_fla(
    q_BTHK: Tensor,
    k_BTHK: Tensor,
    v_BTHV: Tensor,
    log_decay_BTHK: Tensor,
    *,
    scale: float,
    initial_state_BHKV: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """S_t = diag(exp(g_t)) S_{t-1} + k_t^T v_t, o_t = scale q_t S_t, on an NVIDIA GPU.

    Arguments and results are those of `vector_decay_chunked`; the state is fp32.
    """
    dtype = compute_dtype(q_BTHK)
    o_BTHV, state_BHKV = fla_ops("gla").chunk_gla(
        q=q_BTHK.to(dtype),
        k=k_BTHK.to(dtype),
        v=v_BTHV.to(dtype),
        g=bounded_decay(log_decay_BTHK, torch.float32),
        scale=scale,
        initial_state=None if initial_state_BHKV is None else initial_state_BHKV.float(),
        output_final_state=True,
    )
    return o_BTHV.to(q_BTHK.dtype), state_BHKV
