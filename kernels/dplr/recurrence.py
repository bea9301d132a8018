"""Picks the form of the operator: the definition, one step, chunks in torch, or flash-linear-attention."""

from __future__ import annotations

from torch import Tensor

from halobench.kernels.backend import choose
from halobench.kernels.dplr.chunked import dplr_chunked
from halobench.kernels.dplr.fla import dplr_fla
from halobench.kernels.dplr.naive import dplr_naive
from halobench.kernels.dplr.step import dplr_step


def dplr(
    q_BTHK: Tensor,
    k_BTHK: Tensor,
    v_BTHV: Tensor,
    a_BTHK: Tensor,
    b_BTHK: Tensor,
    log_decay_BTHK: Tensor,
    *,
    scale: float,
    initial_state_BHKV: Tensor | None = None,
    backend: str = "auto",
) -> tuple[Tensor, Tensor]:
    """S_t = diag(exp(g_t)) S_{t-1} + b_t (a_t^T S_{t-1}) + k_t v_t^T, o_t = scale S_t^T q_t.

    Arguments and results are those of `dplr_chunked`; `backend` is "auto", "naive", "torch" or "fla", as in
    `kernels.backend.choose`. One token on a given state is a torch step whatever the backend (save "naive"): it is a
    few small operations on the state, for which a chunk kernel has no better form.
    """
    inputs = q_BTHK, k_BTHK, v_BTHV, a_BTHK, b_BTHK, log_decay_BTHK
    form = choose("dplr", backend, q_BTHK)
    if form != "naive" and q_BTHK.shape[1] == 1 and initial_state_BHKV is not None:
        q, k, v, a, b, decay = (x[:, 0] for x in inputs)
        o_BHV, state_BHKV = dplr_step(q, k, v, a, b, decay, initial_state_BHKV, scale)
        return o_BHV[:, None], state_BHKV
    run = {"naive": dplr_naive, "torch": dplr_chunked, "fla": dplr_fla}[form]
    return run(*inputs, scale=scale, initial_state_BHKV=initial_state_BHKV)
