"""Lightning Attention as HypeNet uses it: linear attention, one constant decay per head, RoPE inside.

    S_t = gamma_h S_{t-1} + k_t^T v_t        o_t = (q_t / sqrt(d)) S_t        gamma_h = exp(-slope_h)
    y_t = W_o (norm(o_t) * sigmoid(W_z x_t))

with q and k normalised per head and rotated, and ALiBi slopes (arXiv 2601.22156, after 2401.04658).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal, Self

import torch
from torch import Tensor

from halobench.kernels.scalar_decay.chunked import scalar_decay_chunked
from halobench.kernels.scalar_decay.slopes import alibi_slopes
from halobench.kernels.scalar_decay.step import scalar_decay_step
from halobench.mixers.contract import Mixer, MixerContext
from halobench.mixers.parts import (
    GateInit,
    RMSNorm,
    gate_projection,
    head_norm,
    heads_of,
    linear,
    output_projection,
    repeat_heads,
    rotate,
)
from halobench.mixers.view import AttentionView


@dataclass(frozen=True, kw_only=True)
class LightningOptions:
    """Options of Lightning Attention; the defaults are HypeNet's.

    qk_norm: per-head RMSNorm on queries and keys: the teacher's weights, or ones where it has none.
    rope: rotate queries and keys with the teacher's own tables.
    expand_kv: give every query head its own key/value head, started as the one it shared in the teacher.
    output_norm: RMSNorm before the gate. Its weight starts at the size of a value under a normalised input, so that the
        mixer starts at about the scale of the attention it replaces (a weighted mean of values) and not at 1.
    norm_scope: "all", one norm over all heads (the released models), or "head", each head apart (the paper).
    output_gate: multiply by sigmoid(W_z x).
    gate_init: "random" W_z (the released models), or "neutral": W_z zero and W_o doubled.
    """

    qk_norm: bool = True
    rope: bool = True
    expand_kv: bool = True
    output_norm: bool = True
    norm_scope: Literal["all", "head"] = "all"
    output_gate: bool = True
    gate_init: GateInit = "random"


class LightningMixer(Mixer):
    """See the module's docstring."""

    name = "lightning"
    label = "Lightning Attention"
    paper = "https://arxiv.org/abs/2401.04658"
    uses_rope = True
    Options: ClassVar[type] = LightningOptions

    def __init__(self, view: AttentionView, options: LightningOptions) -> None:
        super().__init__()
        self.options = options
        self.layer_index = view.layer_index
        self.hidden_size, self.num_heads, self.head_dim = view.hidden_size, view.num_heads, view.head_dim
        self.num_kv_heads = view.num_heads if options.expand_kv else view.num_kv_heads
        self.scale = view.head_dim**-0.5
        times = self.num_kv_heads // view.num_kv_heads
        k_bias, v_bias = (None if b is None else repeat_heads(b, view, times) for b in (view.k_bias, view.v_bias))
        self.q_proj = linear(view.q_weight, view.q_bias)
        self.k_proj = linear(repeat_heads(view.k_weight, view, times), k_bias)
        self.v_proj = linear(repeat_heads(view.v_weight, view, times), v_bias)
        self.o_proj = output_projection(view, options.output_gate, options.gate_init)
        fresh = {"z_proj", "o_norm"}
        if options.qk_norm:
            self.q_norm, self.k_norm = head_norm(view.q_norm_weight, view), head_norm(view.k_norm_weight, view)
            fresh |= {"q_norm"} if view.q_norm_weight is None else set()
            fresh |= {"k_norm"} if view.k_norm_weight is None else set()
        if options.output_norm:
            groups = view.num_heads if options.norm_scope == "head" else 1
            self.o_norm = RMSNorm(_value_scale(view), view.norm_eps, groups)
        if options.output_gate:
            self.z_proj = gate_projection(view, options.gate_init)
        self._fresh = frozenset(fresh)
        self._log_decay_H: Tensor | None = None

    @classmethod
    def from_attention(cls, view: AttentionView, options: LightningOptions) -> Self:
        return cls(view, options)

    def forward(
        self, hidden_BTD: Tensor, *, position_embeddings: tuple[Tensor, Tensor] | None, context: MixerContext
    ) -> Tensor:
        q, k, v = (heads_of(layer, hidden_BTD, self.head_dim) for layer in (self.q_proj, self.k_proj, self.v_proj))
        if self.options.qk_norm:
            q, k = self.q_norm(q), self.k_norm(k)
        if self.options.rope and position_embeddings is not None:
            q, k = rotate(q, position_embeddings), rotate(k, position_embeddings)
        if self.num_kv_heads < self.num_heads:
            times = self.num_heads // self.num_kv_heads
            k, v = k.repeat_interleave(times, dim=2), v.repeat_interleave(times, dim=2)
        o_BTD = self._recur(q, k, v, context).flatten(2)
        if self.options.output_norm:
            o_BTD = self.o_norm(o_BTD)
        if self.options.output_gate:
            o_BTD = o_BTD * torch.sigmoid(self.z_proj(hidden_BTD))
        return self.o_proj(o_BTD)

    def _recur(self, q_BTHK: Tensor, k_BTHK: Tensor, v_BTHV: Tensor, context: MixerContext) -> Tensor:
        """The recurrence over the new tokens, from the cached state and into it."""
        past = None if context.cache is None else context.cache.state(self.layer_index)
        state = None if past is None else past[0]
        log_decay = self._log_decay(q_BTHK)
        if context.padding_mask_BT is not None:
            # A padded token adds nothing and takes nothing: the state passes it by, on either side of the text.
            padded_BT11 = ~context.padding_mask_BT.bool()[..., None, None]
            k_BTHK, v_BTHV = k_BTHK.masked_fill(padded_BT11, 0), v_BTHV.masked_fill(padded_BT11, 0)
            log_decay = log_decay * context.padding_mask_BT[..., None]
        if q_BTHK.shape[1] == 1 and state is not None:
            decay = log_decay if log_decay.ndim == 1 else log_decay[:, 0]
            o_BHV, state = scalar_decay_step(q_BTHK[:, 0], k_BTHK[:, 0], v_BTHV[:, 0], decay, state, self.scale)
            o_BTHV = o_BHV[:, None]
        else:
            o_BTHV, state = scalar_decay_chunked(
                q_BTHK, k_BTHK, v_BTHV, log_decay, scale=self.scale, initial_state_BHKV=state
            )
        if context.cache is not None:
            context.cache.set_state(self.layer_index, (state,), tokens=q_BTHK.shape[1])
        return o_BTHV

    def _log_decay(self, like: Tensor) -> Tensor:
        """-slope per head, fp32. Made on first use and not a buffer: loading through the meta device empties those."""
        cached = self._log_decay_H
        if cached is None or cached.device != like.device:
            with torch.inference_mode(False):  # else a first call under inference_mode would spoil later training
                cached = -torch.tensor(alibi_slopes(self.num_heads), dtype=torch.float32, device=like.device)
            self._log_decay_H = cached
        return cached

    def state_bytes(self, batch: int, length: int, bytes_per_element: int = 2) -> int:
        return batch * self.num_heads * self.head_dim * self.head_dim * 4  # fp32, whatever the model's dtype

    def flops_per_token(self, length: int) -> float:
        state = 2 * 2 * self.num_heads * self.head_dim**2  # write and read
        return state + 2 * sum(p.numel() for p in self.parameters() if p.ndim == 2)


def _value_scale(view: AttentionView) -> Tensor:
    """Weight of the output norm: the RMS of each value head for an input of RMS 1, spread over its features.

    For x with independent features of RMS 1, (W_v x)_i has RMS |row i of W_v|.
    """
    rows = view.v_weight.detach().float().square().sum(-1)
    if view.v_bias is not None:
        rows = rows + view.v_bias.detach().float().square()
    per_head = rows.unflatten(0, (view.num_kv_heads, view.head_dim)).mean(-1).sqrt()
    per_feature = per_head.repeat_interleave(view.groups)[:, None].expand(-1, view.head_dim).flatten()
    return per_feature.to(view.v_weight.dtype)
