"""Softmax attention as a mixer: by default the softmax layers of a HALO student, without RoPE and with a gate (HyPE).

o_t = softmax attention of s_t q_t over all keys        y_t = W_o (o_t * sigmoid(W_g x_t))
s_t = log(t + a) / log(a) at inference once a is set, else 1          (arXiv 2601.22156)

Transfer: everything the teacher's attention has is copied - projections, norms, scale, soft cap, sinks, window. New is
the output gate alone. Under a neutral gate and with rope=True the layer starts as exactly the teacher's attention.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, ClassVar, Self

import torch
from torch import Tensor, nn

from halobench.errors import UserError
from halobench.kernels.attention.decode import decode_attention, decode_form
from halobench.kernels.attention.softmax import attend
from halobench.kernels.window_attention.chunked import window_attention
from halobench.kernels.window_attention.memory import memory_bytes
from halobench.mixers.contract import Mixer, MixerContext
from halobench.mixers.memory import Place, place_of
from halobench.mixers.parts import GateInit, Rotation, copy_projections, gate_projection, head_norm, heads_of
from halobench.mixers.view import AttentionView


@dataclass(frozen=True, kw_only=True)
class SoftmaxOptions:
    """Options of a softmax layer; the defaults are HyPE's.

    rope: rotate queries and keys where the teacher does; False is NoPE.
    output_gate: multiply by sigmoid(W_g x).
    gate_init: "random" W_g (the released models), or "neutral": W_g zero and W_o doubled, with which (and with rope)
        the layer starts as exactly the teacher's attention.
    logits_scale_base: a of s_t, above 1; None is no scaling. Used in evaluation mode only, never while training.
    sliding_window: keep the teacher's window, where it has one; what has left it is forgotten.
    """

    rope: bool = False
    output_gate: bool = True
    gate_init: GateInit = "random"
    logits_scale_base: float | None = None
    sliding_window: bool = True

    def __post_init__(self) -> None:
        if self.logits_scale_base is not None and not self.logits_scale_base > 1:
            raise UserError(f"logits_scale_base must be above 1 (its logarithm divides), got {self.logits_scale_base}")


class AttentionMixer(Mixer):
    """Base of the mixers that compute softmax attention: the teacher's own parts, and what subclasses ask for."""

    q_proj: nn.Linear
    k_proj: nn.Linear
    v_proj: nn.Linear
    o_proj: nn.Linear

    def __init__(
        self,
        view: AttentionView,
        options: Any,
        *,
        rope: bool,
        window: int | None,
        first: int,
        output_gate: bool,
        gate_init: GateInit,
    ) -> None:
        """Args:
        window: tokens a query sees, itself included; None is all.
        first: tokens at the start of the text that stay visible beyond the window.
        """
        super().__init__()
        self.options = options
        self.layer_index = view.layer_index
        self.hidden_size, self.num_heads, self.head_dim = view.hidden_size, view.num_heads, view.head_dim
        self.num_kv_heads = view.num_kv_heads
        self.scaling, self.soft_cap, self.clip = view.scaling, view.soft_cap, view.clip
        self.rotate = Rotation(view) if rope and view.rope else None
        self.window, self.first = window, first
        copy_projections(self, view, times=1, output_gate=output_gate, gate_init=gate_init)
        self.q_norm = None if view.q_norm is None else head_norm(view.q_norm, view)
        self.k_norm = None if view.k_norm is None else head_norm(view.k_norm, view)
        self.sinks = None if view.sinks is None else nn.Parameter(view.sinks.detach().clone())
        self.o_gate = gate_projection(view, gate_init) if output_gate else None
        self._fresh = frozenset({"o_gate"})

    def forward(
        self, hidden_BTD: Tensor, *, position_embeddings: tuple[Tensor, Tensor] | None, context: MixerContext
    ) -> Tensor:
        q, k, v = self._project(hidden_BTD, position_embeddings)
        self.used_backend = "torch" if self.soft_cap is not None else "sdpa"
        scale = self.query_scale(context.positions_BT)
        if scale is not None:
            q = (q * scale).to(q.dtype)  # multiplied in fp32, rounded once
        o_BTHV = self._attend(q, k, v, context) if self.window is None else self._attend_window(q, k, v, context)
        o_BTD = o_BTHV.flatten(2)
        if self.o_gate is not None:
            o_BTD = o_BTD * torch.sigmoid(self.o_gate(hidden_BTD))
        return self.o_proj(o_BTD)

    def _project(
        self, hidden_BTD: Tensor, position_embeddings: tuple[Tensor, Tensor] | None
    ) -> tuple[Tensor, Tensor, Tensor]:
        layers = (self.q_proj, self.k_proj, self.v_proj)
        q, k, v = (heads_of(layer, hidden_BTD, self.head_dim) for layer in layers)
        q = q if self.q_norm is None else self.q_norm(q)
        k = k if self.k_norm is None else self.k_norm(k)
        if self.clip is not None:
            q, k, v = (x.clamp(-self.clip, self.clip) for x in (q, k, v))
        if self.rotate is not None and position_embeddings is not None:
            q, k = self.rotate.both(q, k, position_embeddings)
        return q, k, v

    def query_scale(self, positions_BT: Tensor) -> Tensor | None:
        """A factor on the queries by position, (B or 1, T, 1, 1); None is none."""
        return None

    def _attend(self, q: Tensor, k: Tensor, v: Tensor, context: MixerContext) -> Tensor:
        """Over everything so far; keys and values go to the cache."""
        if context.cache is not None:
            keys, values = context.cache.update(k.transpose(1, 2), v.transpose(1, 2), self.layer_index)
            place = place_of(keys)
            if place is not None:
                return self._attend_placed(q, keys, values, place)
            k, v = keys.transpose(1, 2), values.transpose(1, 2)
        padding = context.key_padding_mask_BS
        return attend(
            q, k, v, scale=self.scaling, key_padding_mask_BS=padding, soft_cap=self.soft_cap, sinks_H=self.sinks
        )

    def _attend_placed(self, q: Tensor, keys: Tensor, values: Tensor, place: Place) -> Tensor:
        """One token over the buffers of a pinned cache."""
        self.used_backend = decode_form(place.backend, q, self.head_dim)
        place.attended += 1
        o_BHV = decode_attention(
            q[:, 0], keys, values, place.lengths_B, scale=self.scaling, soft_cap=self.soft_cap, sinks_H=self.sinks,
            backend=self.used_backend,
        )  # fmt: skip
        return o_BHV[:, None]

    def _attend_window(self, q: Tensor, k: Tensor, v: Tensor, context: MixerContext) -> Tensor:
        """Over the window; the cache holds no more than that."""
        assert self.window is not None
        cache = context.cache
        o_BTHV, memory = window_attention(
            q,
            k,
            v,
            positions_BT=context.positions_BT,
            padding_mask_BT=context.padding_mask_BT,
            memory=None if cache is None else cache.state(self.layer_index),
            keep_memory=cache is not None,
            in_place=True,  # what the cache holds is its own: clone() copies
            window=self.window,
            sinks=self.first,
            scale=self.scaling,
            soft_cap=self.soft_cap,
            sinks_H=self.sinks,
        )
        if cache is not None:
            assert memory is not None
            cache.set_state(self.layer_index, memory, tokens=q.shape[1])
        return o_BTHV

    def state_bytes(self, batch: int, length: int, bytes_per_element: int = 2) -> int:
        if self.window is not None:
            return memory_bytes(batch, self.num_kv_heads, self.head_dim, self.window, self.first, bytes_per_element)
        return batch * length * 2 * self.num_kv_heads * self.head_dim * bytes_per_element

    def flops_per_token(self, length: int) -> float:
        seen = length + 1 if self.window is None else min(length + 1, self.window + self.first)
        return 2 * 2 * seen * self.num_heads * self.head_dim + self.projection_flops()  # q . k, then the mean of v


class SoftmaxMixer(AttentionMixer):
    """See the module's docstring."""

    name = "softmax"
    label = "Softmax attention"
    paper = "https://arxiv.org/abs/2601.22156"
    uses_rope = False
    Options: ClassVar[type] = SoftmaxOptions

    @classmethod
    def from_attention(cls, view: AttentionView, options: SoftmaxOptions) -> Self:
        return cls(
            view,
            options,
            rope=options.rope,
            window=view.sliding_window if options.sliding_window else None,
            first=0,
            output_gate=options.output_gate,
            gate_init=options.gate_init,
        )

    def query_scale(self, positions_BT: Tensor) -> Tensor | None:
        """s_t = log(t + a) / log(a) outside training, in fp32: t + a needs more digits than bf16 has."""
        base = self.options.logits_scale_base
        if base is None or self.training:
            return None
        return (torch.log(positions_BT.float() + base) / math.log(base))[..., None, None]
