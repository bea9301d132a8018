"""The operator in flash-linear-attention (0.6): `chunk_dplr_delta_rule`, layout and signs as ours, log decays natural.

Its `chunk_rwkv7` is the same call under RWKV's names (r for q, w for the log decay).
"""

from __future__ import annotations

import torch
from torch import Tensor

from halobench.kernels.backend import compute_dtype, fla_ops
from halobench.kernels.decays import bounded_decay


def dplr_fla(
    q_BTHK: Tensor,
    k_BTHK: Tensor,
    v_BTHV: Tensor,
    a_BTHK: Tensor,
    b_BTHK: Tensor,
    log_decay_BTHK: Tensor,
    *,
    scale: float,
    initial_state_BHKV: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """S_t = diag(exp(g_t)) S_{t-1} + b_t (a_t^T S_{t-1}) + k_t v_t^T, o_t = scale S_t^T q_t, on an NVIDIA GPU.

    Arguments and results are those of `dplr_chunked`; the state is fp32. fla takes bf16 or fp16 here.
    """
    dtype = compute_dtype(q_BTHK)
    o_BTHV, state_BHKV = fla_ops("generalized_delta_rule").chunk_dplr_delta_rule(
        q=q_BTHK.to(dtype),
        k=k_BTHK.to(dtype),
        v=v_BTHV.to(dtype),
        a=a_BTHK.to(dtype),
        b=b_BTHK.to(dtype),
        gk=bounded_decay(log_decay_BTHK, torch.float32),
        scale=scale,
        initial_state=None if initial_state_BHKV is None else initial_state_BHKV.float(),
        output_final_state=True,
    )
    return o_BTHV.to(q_BTHK.dtype), state_BHKV
