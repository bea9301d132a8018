"""Mamba2's state-space layer as linear attention: a step size per token decays the state and scales the input.

    S_t = exp(-dt_t A_h) S_{t-1} + dt_t k_t^T v_t        o_t = (q_t / sqrt(d)) S_t + D_h v_t
    dt_t = softplus(W_dt x_t + b)

with C = q, B = k, x = v of the paper (arXiv 2405.21060).

Transfer: W_q, W_k, W_v and W_o take the places of the projections to C, B, x and of the output, as in "The Mamba in
the Llama" (arXiv 2408.15237). New: A starts at 1 and the step size at the ALiBi slope of its head, so that dt sums to 1
over the decay: the state starts as a weighted mean of k^T v, as attention is one of v. D starts at 0, for attention has
no such path.
"""

from __future__ import annotations

from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from halobench.kernels.scalar_decay.recurrence import scalar_decay
from halobench.mixers.linear import (
    LinearMixer,
    Recurred,
    head_slopes,
    inverse_softplus,
    masked_decay,
)
from halobench.mixers.parts import at_least_fp32, new_linear
from halobench.mixers.view import AttentionView


class Mamba2Mixer(LinearMixer):
    """See the module's docstring."""

    name = "mamba2"
    label = "Mamba2"
    paper = "https://arxiv.org/abs/2405.21060"
    backends: ClassVar[tuple[str, ...]] = ("naive", "torch", "triton", "fla")

    def build_gates(self, view: AttentionView) -> None:
        zeros = torch.zeros(view.num_heads, dtype=view.q_weight.dtype, device=view.q_weight.device)
        self.dt_proj = new_linear(view, view.hidden_size, view.num_heads, inverse_softplus(head_slopes(view)))
        self.A_log = nn.Parameter(zeros)
        self.D = nn.Parameter(zeros.clone())

    def recur(
        self,
        q_BTHK: Tensor,
        k_BTHK: Tensor,
        v_BTHV: Tensor,
        gates_BTD: Tensor,
        real_BT: Tensor | None,
        state_BHKV: Tensor | None,
    ) -> Recurred:
        step_BTH = F.softplus(at_least_fp32(self.dt_proj(gates_BTD)))
        log_decay_BTH = -step_BTH * at_least_fp32(self.A_log).exp()
        recurred = self.run(
            scalar_decay,
            q_BTHK,
            k_BTHK * step_BTH[..., None].to(k_BTHK.dtype),
            v_BTHV,
            masked_decay(log_decay_BTH, real_BT),
            scale=self.scale,
            state=state_BHKV,
        )
        return recurred._replace(o_BTHV=recurred.o_BTHV + self.D[:, None] * v_BTHV)
