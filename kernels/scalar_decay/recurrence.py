"""Picks the form of the operator: the definition, one step, chunks in torch, Triton, or flash-linear-attention."""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor

from halobench.kernels.backend import choose
from halobench.kernels.chunks import starting_state
from halobench.kernels.scalar_decay.chunked import scalar_decay_chunked
from halobench.kernels.scalar_decay.fla import scalar_decay_fla
from halobench.kernels.scalar_decay.naive import scalar_decay_naive
from halobench.kernels.scalar_decay.step import scalar_decay_step


def scalar_decay(
    q_BTHK: Tensor,
    k_BTHK: Tensor,
    v_BTHV: Tensor,
    log_decay: Tensor,
    *,
    scale: float,
    initial_state_BHKV: Tensor | None = None,
    backend: str = "auto",
) -> tuple[Tensor, Tensor]:
    """S_t = exp(g_t) S_{t-1} + k_t^T v_t, o_t = scale q_t S_t.

    Arguments and results are those of `scalar_decay_chunked`; `backend` is "auto", "naive", "torch", "triton" or
    "fla", as in `kernels.backend.choose`. One token on a given state is a torch step whatever the backend (save
    "naive"): it is a few small operations on the state, for which a chunk kernel has no better form. No tokens give no
    outputs and leave the state as it is.
    """
    form = choose("scalar_decay", backend, q_BTHK, max(q_BTHK.shape[-1], v_BTHV.shape[-1]))
    if q_BTHK.shape[1] == 0:
        return v_BTHV.to(q_BTHK.dtype), starting_state(k_BTHK, v_BTHV, initial_state_BHKV)
    if form != "naive" and q_BTHK.shape[1] == 1 and initial_state_BHKV is not None:
        decay = log_decay if log_decay.ndim == 1 else log_decay[:, 0]
        token = q_BTHK[:, 0], k_BTHK[:, 0], v_BTHV[:, 0], decay
        state_BHKV = starting_state(k_BTHK, v_BTHV, initial_state_BHKV)
        o_BHV, state_BHKV = scalar_decay_step(*token, state_BHKV, scale)
        return o_BHV[:, None], state_BHKV
    forms: dict[str, Callable[..., tuple[Tensor, Tensor]]] = {
        "naive": scalar_decay_naive,
        "torch": scalar_decay_chunked,
        "triton": _triton,
        "fla": scalar_decay_fla,
    }
    return forms[form](q_BTHK, k_BTHK, v_BTHV, log_decay, scale=scale, initial_state_BHKV=initial_state_BHKV)


def _triton(*given: Tensor, scale: float, initial_state_BHKV: Tensor | None) -> tuple[Tensor, Tensor]:
    """`scalar_decay_triton`, whose module imports triton."""
    from halobench.kernels.scalar_decay.triton import scalar_decay_triton

    return scalar_decay_triton(*given, scale=scale, initial_state_BHKV=initial_state_BHKV)
