"""The operator in flash-linear-attention (0.6), layout and signs as ours, log decays natural.

`chunk_kda` has a decay per key channel, `chunk_gated_delta_rule` one per head, `chunk_delta_rule` none; the last does
not take fp32, for which a decay of zero is given to the second. None of them normalises the keys unless told to.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from halobench.kernels.backend import compute_dtype, fla_ops
from halobench.kernels.decays import bounded_decay


def delta_rule_fla(
    q_BTHK: Tensor,
    k_BTHK: Tensor,
    v_BTHV: Tensor,
    beta_BTH: Tensor,
    log_decay: Tensor | None,
    *,
    scale: float,
    initial_state_BHKV: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """S_t = (I - beta_t k_t k_t^T) diag(exp(g_t)) S_{t-1} + beta_t k_t v_t^T, o_t = scale S_t^T q_t, on an NVIDIA GPU.

    Arguments and results are those of `delta_rule_chunked`; the state is fp32.
    """
    dtype = compute_dtype(q_BTHK)
    arguments: dict[str, Any] = {
        "q": q_BTHK.to(dtype),
        "k": k_BTHK.to(dtype),
        "v": v_BTHV.to(dtype),
        "beta": beta_BTH.to(dtype),
        "scale": scale,
        "initial_state": None if initial_state_BHKV is None else initial_state_BHKV.float(),
        "output_final_state": True,
    }
    if log_decay is not None:
        log_decay = bounded_decay(log_decay, torch.float32)  # they are summed up
    elif dtype == torch.float32:
        log_decay = torch.zeros_like(beta_BTH)
    if log_decay is None:
        o_BTHV, state_BHKV = fla_ops("delta_rule").chunk_delta_rule(**arguments)
    elif log_decay.ndim == 3:
        o_BTHV, state_BHKV = fla_ops("gated_delta_rule").chunk_gated_delta_rule(g=log_decay, **arguments)
    else:
        o_BTHV, state_BHKV = fla_ops("kda").chunk_kda(g=log_decay, **arguments)
    return o_BTHV.to(q_BTHK.dtype), state_BHKV
