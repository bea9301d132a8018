"""Gated Linear Attention: every channel of a key forgets at its own rate, which the token sets.

    S_t = diag(exp(g_t)) S_{t-1} + k_t^T v_t        o_t = (q_t / sqrt(d)) S_t
    g_t = log(sigmoid(W_2 W_1 x_t + b)) / 16

(arXiv 2312.06635)

Transfer: as Lightning Attention. New: W_1 and W_2 (16 wide, as in the paper), random, and b such that all channels of a
head start at its ALiBi slope.
"""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor

from halobench.kernels.vector_decay.recurrence import vector_decay
from halobench.mixers.linear import (
    LinearMixer,
    Recurred,
    gate_bias,
    head_slopes,
    masked_decay,
)
from halobench.mixers.parts import LowRank, at_least_fp32
from halobench.mixers.simple_gla import NORMALISER
from halobench.mixers.view import AttentionView


class GLAMixer(LinearMixer):
    """See the module's docstring."""

    name = "gla"
    label = "GLA"
    paper = "https://arxiv.org/abs/2312.06635"

    def build_gates(self, view: AttentionView) -> None:
        bias_H = gate_bias(head_slopes(view), NORMALISER)
        self.g_proj = LowRank(view, bias_H.repeat_interleave(view.head_dim))

    def recur(
        self,
        q_BTHK: Tensor,
        k_BTHK: Tensor,
        v_BTHV: Tensor,
        gates_BTD: Tensor,
        real_BT: Tensor | None,
        state_BHKV: Tensor | None,
    ) -> Recurred:
        gate_BTHK = at_least_fp32(self.g_proj(gates_BTD)).view(q_BTHK.shape)
        log_decay_BTHK = masked_decay(F.logsigmoid(gate_BTHK) / NORMALISER, real_BT)
        return self.run(vector_decay, q_BTHK, k_BTHK, v_BTHV, log_decay_BTHK, scale=self.scale, state=state_BHKV)
