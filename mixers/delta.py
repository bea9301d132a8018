"""Mixers of the delta rule: a token first takes out what the state holds under its key, then writes its own value.

    S_t = (I - beta_t k_t k_t^T) diag(exp(g_t)) S_{t-1} + beta_t k_t v_t^T
    o_t = S_t^T q_t        beta_t = sigmoid(W_b x_t)

    DeltaNet         g = 0                                          (arXiv 2406.06484)
    Gated DeltaNet   g = -exp(A_h) softplus(W_a x_t + b)            (arXiv 2412.06464), one number per head
    KDA              g = -exp(A_h) softplus(W_2 W_1 x_t + b)        (Kimi Linear, arXiv 2510.26692), one per key channel

q and k are brought to length 1 after their norms and their rotation, which keeps I - beta k k^T from growing anything.

Transfer: W_q, W_k, W_v and W_o are copied: under a key of length 1 the state answers with the value written there, as
attention does with a sharp softmax. New: W_b random (beta starts near 1/2), the decay's projection random, with b such
that every head starts at its ALiBi slope and A at 0.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from halobench.kernels.delta_rule.recurrence import delta_rule
from halobench.mixers.linear import (
    LinearMixer,
    Recurred,
    head_slopes,
    inverse_softplus,
    masked_decay,
)
from halobench.mixers.parts import LowRank, at_least_fp32, new_linear, unit
from halobench.mixers.view import AttentionView


class DeltaNetMixer(LinearMixer):
    """The delta rule without decay: only what is written again is forgotten."""

    name = "deltanet"
    label = "DeltaNet"
    paper = "https://arxiv.org/abs/2406.06484"
    products = 3  # read what is there, write, read out

    def build_gates(self, view: AttentionView) -> None:
        self.b_proj = new_linear(view, view.hidden_size, view.num_heads)

    def log_decay(self, gates_BTD: Tensor) -> Tensor | None:
        """g: None, (B, T, H) or (B, T, H, K)."""
        return None

    def recur(
        self,
        q_BTHK: Tensor,
        k_BTHK: Tensor,
        v_BTHV: Tensor,
        gates_BTD: Tensor,
        real_BT: Tensor | None,
        state_BHKV: Tensor | None,
    ) -> Recurred:
        beta_BTH = torch.sigmoid(at_least_fp32(self.b_proj(gates_BTD)))
        if real_BT is not None:
            beta_BTH = beta_BTH * real_BT[..., None]
        log_decay = self.log_decay(gates_BTD)
        if log_decay is not None:
            log_decay = masked_decay(log_decay, real_BT)
        return self.run(
            delta_rule, unit(q_BTHK), unit(k_BTHK), v_BTHV, beta_BTH, log_decay, scale=1.0, state=state_BHKV
        )


class GatedDeltaNetMixer(DeltaNetMixer):
    """The delta rule with one decay per head, set by the token."""

    name = "gated_deltanet"
    label = "Gated DeltaNet"
    paper = "https://arxiv.org/abs/2412.06464"

    def build_gates(self, view: AttentionView) -> None:
        super().build_gates(view)
        self.a_proj = new_linear(view, view.hidden_size, view.num_heads, inverse_softplus(head_slopes(view)))
        self.A_log = nn.Parameter(torch.zeros_like(view.q_weight[: view.num_heads, 0]))

    def log_decay(self, gates_BTD: Tensor) -> Tensor:
        return -at_least_fp32(self.A_log).exp() * F.softplus(at_least_fp32(self.a_proj(gates_BTD)))


class KDAMixer(DeltaNetMixer):
    """The delta rule with one decay per channel of the key, set by the token."""

    name = "kda"
    label = "KDA"
    paper = "https://arxiv.org/abs/2510.26692"

    def build_gates(self, view: AttentionView) -> None:
        super().build_gates(view)
        self.f_proj = LowRank(view, inverse_softplus(head_slopes(view)).repeat_interleave(view.head_dim))
        self.A_log = nn.Parameter(torch.zeros_like(view.q_weight[: view.num_heads, 0]))

    def log_decay(self, gates_BTD: Tensor) -> Tensor:
        step_BTHK = F.softplus(at_least_fp32(self.f_proj(gates_BTD))).unflatten(-1, (self.num_heads, self.head_dim))
        return -at_least_fp32(self.A_log).exp()[:, None] * step_BTHK
