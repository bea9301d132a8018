"""RWKV-7's time mixing: a decay per channel, and a state that is edited under one key and written under another.

    S_t = diag(w_t) S_{t-1} - (a_t * kappa_t) (kappa_t^T S_{t-1}) + k~_t v_t^T
    y_t = W_o ((norm(S_t^T r_t / sqrt(d)) + (r_t . (rho * k~_t)) v_t) * gate)

    r = q        kappa = unit(xi * k)        k~ = k * (1 + alpha * (a - 1))
    w = exp(-exp(-1/2) sigmoid(w_0 + W_2 tanh(W_1 x)))        a = sigmoid(a_0 + A_2 A_1 x)        (arXiv 2503.14456)

Transfer: r, k, v and the output projection are the teacher's q, k, v and o, as in RADLADS (arXiv 2505.03005), which
also found that conversions do without token shift; it is an option here, and starts as no shift. New: the decay starts
at the ALiBi slopes (at most the formula's own limit of 0.6 a token), a near 1/2, xi and alpha at 1, the bonus rho at 0,
for attention has no such path. The value residual between layers is left out: a mixer sees its own layer alone.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor, nn

from halobench.kernels.dplr.recurrence import dplr
from halobench.mixers.convolution import previous_inputs
from halobench.mixers.linear import LinearMixer, LinearOptions, Recurred, head_slopes, masked_decay
from halobench.mixers.parts import LowRank, at_least_fp32, unit
from halobench.mixers.view import AttentionView

DECAY_LIMIT = math.exp(-0.5)  # the fastest decay of the formula
SHIFTED = ("q", "k", "v", "gates")  # inputs that token shift mixes with the previous token's, each by its own amount


@dataclass(frozen=True, kw_only=True)
class RWKV7Options(LinearOptions):
    """Options of RWKV-7.

    token_shift: mix the input of r, k, v and of the gates with the previous token's, channel by channel.
    """

    token_shift: bool = False


class RWKV7Mixer(LinearMixer):
    """See the module's docstring."""

    name = "rwkv7"
    label = "RWKV-7"
    paper = "https://arxiv.org/abs/2503.14456"
    products = 4  # read under one key, edit, write, read out
    Options: ClassVar[type] = RWKV7Options

    def build_gates(self, view: AttentionView) -> None:
        like = view.q_weight.detach()
        share_H = (head_slopes(view) / DECAY_LIMIT).clamp(max=0.9)
        self.w_proj = LowRank(view, (share_H.log() - (-share_H).log1p()).repeat_interleave(view.head_dim), tanh=True)
        self.a_proj = LowRank(view, torch.zeros_like(head_slopes(view)).repeat_interleave(view.head_dim))
        shape = (view.num_heads, view.head_dim)
        self.xi = nn.Parameter(like.new_ones(shape))
        self.alpha = nn.Parameter(like.new_ones(shape))
        self.rho = nn.Parameter(like.new_zeros(shape))
        if self.options.token_shift:
            self.shift = nn.Parameter(like.new_zeros(len(SHIFTED), view.hidden_size))

    def inputs(
        self, hidden_BTD: Tensor, real_BT: Tensor | None, memory: list[Tensor]
    ) -> tuple[tuple[Tensor, ...], list[Tensor]]:
        if not self.options.token_shift:
            return super().inputs(hidden_BTD, real_BT, memory)
        history = previous_inputs(hidden_BTD, memory.pop(0) if memory else None, real_BT, kept=1)
        change_BTD = history.place(history.x_BNC[:, :-1]) - hidden_BTD
        return tuple(hidden_BTD + change_BTD * amount_D for amount_D in self.shift), [history.last_BPC]

    def recur(
        self,
        q_BTHK: Tensor,
        k_BTHK: Tensor,
        v_BTHV: Tensor,
        gates_BTD: Tensor,
        real_BT: Tensor | None,
        state_BHKV: Tensor | None,
    ) -> Recurred:
        decay_BTHK = torch.sigmoid(at_least_fp32(self.w_proj(gates_BTD))).view(q_BTHK.shape)
        log_decay_BTHK = masked_decay(-DECAY_LIMIT * decay_BTHK, real_BT)
        edit_BTHK = torch.sigmoid(at_least_fp32(self.a_proj(gates_BTD))).view(q_BTHK.shape).to(q_BTHK.dtype)
        kappa_BTHK = unit(self.xi * k_BTHK)  # zero at padded tokens, as k is
        written_BTHK = k_BTHK * (1 + self.alpha * (edit_BTHK - 1))
        recurred = self.run(
            dplr,
            q_BTHK,
            written_BTHK,
            v_BTHV,
            -kappa_BTHK,
            kappa_BTHK * edit_BTHK,
            log_decay_BTHK,
            scale=self.scale,
            state=state_BHKV,
        )
        bonus_BTH1 = (q_BTHK * self.rho * written_BTHK).sum(-1, keepdim=True)
        return recurred._replace(bypass_BTHV=bonus_BTH1 * v_BTHV)

    def state_bytes(self, batch: int, length: int, bytes_per_element: int = 2) -> int:
        shifted = self.hidden_size * bytes_per_element if self.options.token_shift else 0
        return super().state_bytes(batch, length, bytes_per_element) + batch * shifted
