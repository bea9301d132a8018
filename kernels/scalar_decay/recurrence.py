"""Picks the form of the operator: the definition, one step, chunks in torch, or flash-linear-attention."""

from __future__ import annotations

from torch import Tensor

from halobench.kernels.backend import choose
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

    Arguments and results are those of `scalar_decay_chunked`; `backend` is "auto", "naive", "torch" or "fla", as in
    `kernels.backend.choose`. One token on a given state is a torch step whatever the backend (save "naive"): it is a
    few small operations on the state, for which a chunk kernel has no better form.
    """
    form = choose("scalar_decay", backend, q_BTHK)
    if form != "naive" and q_BTHK.shape[1] == 1 and initial_state_BHKV is not None:
        decay = log_decay if log_decay.ndim == 1 else log_decay[:, 0]
        token = q_BTHK[:, 0], k_BTHK[:, 0], v_BTHV[:, 0], decay
        o_BHV, state_BHKV = scalar_decay_step(*token, initial_state_BHKV, scale)
        return o_BHV[:, None], state_BHKV
    run = {"naive": scalar_decay_naive, "torch": scalar_decay_chunked, "fla": scalar_decay_fla}[form]
    return run(q_BTHK, k_BTHK, v_BTHV, log_decay, scale=scale, initial_state_BHKV=initial_state_BHKV)
