"""The softmax layers of a HALO student: the teacher's attention without RoPE, with an output gate (HyPE).

o_t = softmax attention of s_t q_t over all keys        y_t = W_o (o_t * sigmoid(W_g x_t))
s_t = log(t + a) / log(a) at inference once a is set, else 1          (arXiv 2601.22156)
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar, Self

import torch
from torch import Tensor

from halobench.errors import UserError
from halobench.kernels.attention.softmax import attend
from halobench.mixers.contract import Mixer, MixerContext
from halobench.mixers.parts import (
    GateInit,
    RMSNorm,
    gate_projection,
    heads_of,
    linear,
    output_projection,
    rotate,
)
from halobench.mixers.view import AttentionView


@dataclass(frozen=True, kw_only=True)
class SoftmaxOptions:
    """Options of a softmax layer; the defaults are HyPE's.

    rope: rotate queries and keys where the teacher does; False is NoPE.
    output_gate: multiply by sigmoid(W_g x).
    gate_init: "random" W_g (the released models), or "neutral": W_g zero and W_o doubled, with which (and with rope)
        the layer starts as exactly the teacher's attention.
    logits_scale_base: a of s_t, above 1; None is no scaling. Used in evaluation mode only, never while training.
    sliding_window: keep the teacher's window, where it has one.
    """

    rope: bool = False
    output_gate: bool = True
    gate_init: GateInit = "random"
    logits_scale_base: float | None = None
    sliding_window: bool = True

    def __post_init__(self) -> None:
        if self.logits_scale_base is not None and not self.logits_scale_base > 1:
            raise UserError(f"logits_scale_base must be above 1 (its logarithm divides), got {self.logits_scale_base}")


class SoftmaxMixer(Mixer):
    """See the module's docstring."""

    name = "softmax"
    label = "Softmax attention"
    paper = "https://arxiv.org/abs/2601.22156"
    uses_rope = False
    Options: ClassVar[type] = SoftmaxOptions

    def __init__(self, view: AttentionView, options: SoftmaxOptions) -> None:
        super().__init__()
        self.options = options
        self.layer_index = view.layer_index
        self.hidden_size, self.num_heads, self.head_dim = view.hidden_size, view.num_heads, view.head_dim
        self.num_kv_heads = view.num_kv_heads
        self.scaling, self.soft_cap = view.scaling, view.soft_cap
        self.rope = options.rope and view.rope
        self.window = view.sliding_window if options.sliding_window else None
        self.q_proj = linear(view.q_weight, view.q_bias)
        self.k_proj = linear(view.k_weight, view.k_bias)
        self.v_proj = linear(view.v_weight, view.v_bias)
        self.o_proj = output_projection(view, options.output_gate, options.gate_init)
        self.q_norm = None if view.q_norm_weight is None else RMSNorm(view.q_norm_weight, view.norm_eps)
        self.k_norm = None if view.k_norm_weight is None else RMSNorm(view.k_norm_weight, view.norm_eps)
        if options.output_gate:
            self.o_gate = gate_projection(view, options.gate_init)
        self._fresh = frozenset({"o_gate"})

    @classmethod
    def from_attention(cls, view: AttentionView, options: SoftmaxOptions) -> Self:
        return cls(view, options)

    def forward(
        self, hidden_BTD: Tensor, *, position_embeddings: tuple[Tensor, Tensor] | None, context: MixerContext
    ) -> Tensor:
        q, k, v = (heads_of(layer, hidden_BTD, self.head_dim) for layer in (self.q_proj, self.k_proj, self.v_proj))
        q = q if self.q_norm is None else self.q_norm(q)
        k = k if self.k_norm is None else self.k_norm(k)
        if self.rope and position_embeddings is not None:
            q, k = rotate(q, position_embeddings), rotate(k, position_embeddings)
        if self.options.logits_scale_base is not None and not self.training:
            q = q * self._logits_scale(context.positions_BT).to(q.dtype)
        if context.cache is not None:
            keys, values = context.cache.update(k.transpose(1, 2), v.transpose(1, 2), self.layer_index)
            k, v = keys.transpose(1, 2), values.transpose(1, 2)
        o_BTD = attend(
            q,
            k,
            v,
            scale=self.scaling,
            key_padding_mask_BS=context.key_padding_mask_BS,
            window=self.window,
            soft_cap=self.soft_cap,
        ).flatten(2)
        if self.options.output_gate:
            o_BTD = o_BTD * torch.sigmoid(self.o_gate(hidden_BTD))
        return self.o_proj(o_BTD)

    def _logits_scale(self, positions_BT: Tensor) -> Tensor:
        """s_t = log(t + a) / log(a), (B or 1, T, 1, 1), in fp32: t + a needs more digits than bf16 has."""
        base = self.options.logits_scale_base
        return (torch.log(positions_BT.float() + base) / math.log(base))[..., None, None]

    def state_bytes(self, batch: int, length: int, bytes_per_element: int = 2) -> int:
        return batch * length * 2 * self.num_kv_heads * self.head_dim * bytes_per_element

    def flops_per_token(self, length: int) -> float:
        seen = length + 1 if self.window is None else min(length + 1, self.window)
        scores = 2 * 2 * seen * self.num_heads * self.head_dim  # q . k, then the mean of v
        return scores + 2 * sum(p.numel() for p in self.parameters() if p.ndim == 2)
