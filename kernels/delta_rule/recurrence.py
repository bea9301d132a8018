"""Picks the form of the operator: the definition, one step, chunks in torch, or flash-linear-attention."""

from __future__ import annotations

from torch import Tensor

from halobench.kernels.backend import choose
from halobench.kernels.delta_rule.chunked import delta_rule_chunked
from halobench.kernels.delta_rule.fla import delta_rule_fla
from halobench.kernels.delta_rule.naive import delta_rule_naive
from halobench.kernels.delta_rule.step import delta_rule_step


def delta_rule(
    q_BTHK: Tensor,
    k_BTHK: Tensor,
    v_BTHV: Tensor,
    beta_BTH: Tensor,
    log_decay: Tensor | None,
    *,
    scale: float,
    initial_state_BHKV: Tensor | None = None,
    backend: str = "auto",
) -> tuple[Tensor, Tensor]:
    """S_t = (I - beta_t k_t k_t^T) diag(exp(g_t)) S_{t-1} + beta_t k_t v_t^T, o_t = scale S_t^T q_t.

    Arguments and results are those of `delta_rule_chunked`; `backend` is "auto", "naive", "torch" or "fla", as in
    `kernels.backend.choose`. One token on a given state is a torch step whatever the backend (save "naive"): it is a
    few small operations on the state, for which a chunk kernel has no better form.
    """
    form = choose("delta_rule", backend, q_BTHK)
    if form != "naive" and q_BTHK.shape[1] == 1 and initial_state_BHKV is not None:
        decay = None if log_decay is None else log_decay[:, 0]
        token = q_BTHK[:, 0], k_BTHK[:, 0], v_BTHV[:, 0], beta_BTH[:, 0], decay
        o_BHV, state_BHKV = delta_rule_step(*token, initial_state_BHKV, scale)
        return o_BHV[:, None], state_BHKV
    run = {"naive": delta_rule_naive, "torch": delta_rule_chunked, "fla": delta_rule_fla}[form]
    return run(q_BTHK, k_BTHK, v_BTHV, beta_BTH, log_decay, scale=scale, initial_state_BHKV=initial_state_BHKV)
