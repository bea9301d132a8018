"""Linear attention with a scalar decay per head: constant as in RetNet, or a gate of the token as in simple GLA.

    S_t = exp(g_t) S_{t-1} + k_t^T v_t        o_t = (q_t / sqrt(d)) S_t
    RetNet      g_t = log(1 - 2^(-5 - h)), h = 0, 1, ..                         (arXiv 2307.08621)
    simple GLA  g_t = log(sigmoid(W_g x_t + b)) / 16                            (arXiv 2312.06635, one gate per head)

Transfer: as Lightning Attention. New in simple GLA: W_g random, and b such that every head starts at its ALiBi slope,
so that before any training the mixer is Lightning Attention up to the small random part. RetNet's decays are constants.
"""

from __future__ import annotations

import math
from typing import ClassVar

import torch.nn.functional as F
from torch import Tensor

from halobench.kernels.scalar_decay.recurrence import scalar_decay
from halobench.mixers.lightning import ConstantDecayMixer
from halobench.mixers.linear import (
    LinearMixer,
    Recurred,
    gate_bias,
    head_slopes,
    masked_decay,
)
from halobench.mixers.parts import at_least_fp32, new_linear
from halobench.mixers.view import AttentionView

NORMALISER = 16.0  # divides the log of the gate, so that a gate of 1/2 forgets half in 16 tokens


class RetentionMixer(ConstantDecayMixer):
    """Retention: constant decays 1 - 2^(-5 - h), slower than Lightning Attention's."""

    name = "retnet"
    label = "RetNet"
    paper = "https://arxiv.org/abs/2307.08621"

    def log_decays(self) -> list[float]:
        return [math.log1p(-(2.0 ** (-5 - head))) for head in range(self.num_heads)]


class SimpleGLAMixer(LinearMixer):
    """See the module's docstring."""

    name = "simple_gla"
    label = "Simple GLA"
    paper = "https://arxiv.org/abs/2312.06635"
    backends: ClassVar[tuple[str, ...]] = ("naive", "torch", "triton", "fla")

    def build_gates(self, view: AttentionView) -> None:
        self.g_proj = new_linear(view, view.hidden_size, view.num_heads, gate_bias(head_slopes(view), NORMALISER))

    def recur(
        self,
        q_BTHK: Tensor,
        k_BTHK: Tensor,
        v_BTHV: Tensor,
        gates_BTD: Tensor,
        real_BT: Tensor | None,
        state_BHKV: Tensor | None,
    ) -> Recurred:
        log_decay_BTH = F.logsigmoid(at_least_fp32(self.g_proj(gates_BTD))) / NORMALISER
        return self.run(
            scalar_decay,
            q_BTHK,
            k_BTHK,
            v_BTHV,
            masked_decay(log_decay_BTH, real_BT),
            scale=self.scale,
            state=state_BHKV,
        )
