"""What mixers with a matrix as state have in common: HypeNet's parts around a recurrence.

    q, k, v = short_conv(W x) -> norm -> rotate      o_t = recurrence      y_t = W_o (norm(o_t) * sigmoid(W_z x_t))

W_q, W_k, W_v, W_o and the norms of queries and keys are the teacher's. What is new starts so that it changes little:
convolutions as the identity, the output norm at the size of the teacher's values, decays at the ALiBi slopes of
Lightning Attention (arXiv 2601.22156), each with a small random part that sees the token.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from typing import ClassVar, Literal, NamedTuple, Self

import torch
from torch import Tensor, nn

from halobench.errors import UserError
from halobench.kernels.backend import choose, compute_dtype
from halobench.kernels.scalar_decay.slopes import alibi_slopes
from halobench.mixers.contract import Mixer, MixerContext
from halobench.mixers.convolution import ShortConvolution
from halobench.mixers.parts import (
    GateInit,
    RMSNorm,
    Rotation,
    copy_projections,
    gate_projection,
    head_norm,
    heads_of,
    value_scale,
)
from halobench.mixers.view import AttentionView

PROJECTED = ("q_proj", "k_proj", "v_proj")
CONVOLVED = ("q_conv", "k_conv", "v_conv")


@dataclass(frozen=True, kw_only=True)
class LinearOptions:
    """HypeNet's parts, options of every mixer with a matrix as state.

    qk_norm: norms on queries and keys: the teacher's, or per-head RMSNorm of ones where it has none.
    rope: rotate queries and keys with the teacher's own tables, in layers where the teacher does.
    expand_kv: give every query head its own key/value head, started as the one it shared in the teacher.
    short_conv: width of a causal convolution on queries, keys and values, one filter a channel; 0 is none.
    output_norm: RMSNorm before the gate; its weight starts at the size of the teacher's values.
    norm_scope: "all", one norm over all heads, or "head", each head apart.
    output_gate: multiply by sigmoid(W_z x).
    gate_init: "random" W_z (the released models), or "neutral": W_z zero and W_o doubled.
    """

    qk_norm: bool = True
    rope: bool = True
    expand_kv: bool = True
    short_conv: int = 0
    output_norm: bool = True
    norm_scope: Literal["all", "head"] = "head"
    output_gate: bool = True
    gate_init: GateInit = "random"

    def __post_init__(self) -> None:
        if self.short_conv < 0 or self.short_conv == 1:
            raise UserError(f"short_conv={self.short_conv} spans nothing; give 0 for none, or a width from 2 on")


class Recurred(NamedTuple):
    """What a recurrence gives: outputs, the state after the last token, and what passes by the output norm."""

    o_BTHV: Tensor
    state_BHKV: Tensor
    bypass_BTHV: Tensor | None = None


class LinearMixer(Mixer):
    """Base of the mixers with a matrix as state; a subclass builds its gates and gives the recurrence."""

    uses_rope = True
    backends: ClassVar[tuple[str, ...]] = ("naive", "torch", "fla")
    products: ClassVar[int] = 2  # passes over a state of key x value a token: one to write, one to read
    Options: ClassVar[type] = LinearOptions

    q_proj: nn.Linear
    k_proj: nn.Linear
    v_proj: nn.Linear
    o_proj: nn.Linear

    def __init__(self, view: AttentionView, options: LinearOptions) -> None:
        super().__init__()
        self.options = options
        self.layer_index = view.layer_index
        self.hidden_size, self.num_heads, self.head_dim = view.hidden_size, view.num_heads, view.head_dim
        self.num_kv_heads = view.num_heads if options.expand_kv else view.num_kv_heads
        self.rotate = Rotation(view) if options.rope and view.rope else None
        self.scale = view.head_dim**-0.5
        self.clip = view.clip
        times = self.num_kv_heads // view.num_kv_heads
        copy_projections(self, view, times=times, output_gate=options.output_gate, gate_init=options.gate_init)
        fresh = {*CONVOLVED, "o_norm", "z_proj"}
        if options.qk_norm:
            self.q_norm, self.k_norm = head_norm(view.q_norm, view), head_norm(view.k_norm, view, times)
            fresh |= {"q_norm"} if view.q_norm is None else set()
            fresh |= {"k_norm"} if view.k_norm is None else set()
        if options.short_conv:
            for name in CONVOLVED:
                channels = (self.num_heads if name == "q_conv" else self.num_kv_heads) * self.head_dim
                self.add_module(name, ShortConvolution(channels, options.short_conv, view.q_weight))
        if options.output_norm:
            groups = view.num_heads if options.norm_scope == "head" else 1
            self.o_norm = RMSNorm(value_scale(view), view.norm_eps, groups)
        if options.output_gate:
            self.z_proj = gate_projection(view, options.gate_init)
        before = set(self._modules) | set(self._parameters)
        self.build_gates(view)
        gates = (set(self._modules) | set(self._parameters)) - before
        self._fresh = frozenset(fresh | gates)  # gates have no counterpart in attention

    @classmethod
    def from_attention(cls, view: AttentionView, options: LinearOptions) -> Self:
        return cls(view, options)

    def build_gates(self, view: AttentionView) -> None:
        """Adds the parameters of the recurrence that attention has no counterpart for."""

    @abstractmethod
    def recur(
        self,
        q_BTHK: Tensor,
        k_BTHK: Tensor,
        v_BTHV: Tensor,
        gates_BTD: Tensor,
        real_BT: Tensor | None,
        state_BHKV: Tensor | None,
    ) -> Recurred:
        """The recurrence over the new tokens.

        Keys and values of padded tokens come as zeros; decays and write strengths there must leave the state alone.

        Args:
            gates_BTD: what decays and write strengths are computed from: the hidden states.
            real_BT: True at real tokens; None when all are.
            state_BHKV: the state before the first token; None is empty.
        """

    def step(
        self, hidden_BTD: Tensor, position_embeddings: tuple[Tensor, Tensor] | None, state_BHKV: Tensor, backend: str
    ) -> Tensor | None:
        """One token on a pinned cache, all in one: (B, 1, D) to (B, 1, D), the state updated in place.

        None where the mixer has no such form, or `step_obstacle` has a reason against it.
        """
        return None

    def step_obstacle(self, like: Tensor, backend: str) -> str | None:
        """Why `step` has no form for inputs like this one, or None."""
        return "only Lightning Attention and RetNet have a fused step"

    def run(
        self, form: Callable[..., tuple[Tensor, Tensor]], *given: Tensor | None, scale: float, state: Tensor | None
    ) -> Recurred:
        """An operator of kernels/, queries first, in the form `backend` asks for; `used_backend` says which ran."""
        like, value = given[0], given[2]
        assert like is not None and value is not None
        self.used_backend = choose(form.__name__, self.backend, like, max(like.shape[-1], value.shape[-1]))
        return Recurred(*form(*given, scale=scale, initial_state_BHKV=state, backend=self.used_backend))

    def inputs(
        self, hidden_BTD: Tensor, real_BT: Tensor | None, memory: list[Tensor]
    ) -> tuple[tuple[Tensor, ...], list[Tensor]]:
        """What q, k, v and the gates are computed from, and what to remember of it; takes its own from `memory`."""
        return (hidden_BTD,) * 4, []

    def forward(
        self, hidden_BTD: Tensor, *, position_embeddings: tuple[Tensor, Tensor] | None, context: MixerContext
    ) -> Tensor:
        past = None if context.cache is None else context.cache.state(self.layer_index)
        real_BT = None if context.padding_mask_BT is None else context.padding_mask_BT.bool()
        memory = list(past) if past is not None else []
        state = memory.pop(0) if memory else None
        steps = None if context.cache is None else context.cache.steps
        if steps is not None and state is not None:
            stepped_BTD = self.step(hidden_BTD, position_embeddings, state, steps.backend)
            if stepped_BTD is not None:
                return stepped_BTD
        (*sources, gates_BTD), remembered = self.inputs(hidden_BTD, real_BT, memory)
        heads = [heads_of(getattr(self, name), x, self.head_dim) for name, x in zip(PROJECTED, sources, strict=True)]
        if self.options.short_conv:
            heads, convolved = self._convolve(heads, real_BT, memory)
            remembered = remembered + convolved
        q, k, v = self._prepare(heads, position_embeddings)
        if real_BT is not None:
            # A padded token adds nothing and takes nothing: the state passes it by, on either side of the text.
            padded_BT11 = ~real_BT[..., None, None]
            k, v = k.masked_fill(padded_BT11, 0), v.masked_fill(padded_BT11, 0)
        recurred = self.recur(q, k, v, gates_BTD, real_BT, state)
        if context.cache is not None:
            context.cache.set_state(self.layer_index, (recurred.state_BHKV, *remembered), tokens=q.shape[1])
        return self._finish(recurred, hidden_BTD)

    def _prepare(
        self, heads: list[Tensor], position_embeddings: tuple[Tensor, Tensor] | None
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Norms, rotation, and keys and values for every query head; in autocast's dtype under autocast."""
        q, k, v = heads
        if self.options.qk_norm:
            q, k = self.q_norm(q), self.k_norm(k)
        if self.clip is not None:
            q, k, v = (x.clamp(-self.clip, self.clip) for x in (q, k, v))
        if self.rotate is not None and position_embeddings is not None:
            q, k = self.rotate.both(q, k, position_embeddings)
        if self.num_kv_heads < self.num_heads:
            times = self.num_heads // self.num_kv_heads
            k, v = k.repeat_interleave(times, dim=2), v.repeat_interleave(times, dim=2)
        dtype = compute_dtype(q)
        return q.to(dtype), k.to(dtype), v.to(dtype)

    def _convolve(
        self, heads: list[Tensor], real_BT: Tensor | None, memory: list[Tensor]
    ) -> tuple[list[Tensor], list[Tensor]]:
        """The short convolutions on q, k and v, and the inputs they must remember."""
        past: list[Tensor | None] = [*memory] if memory else [None] * len(CONVOLVED)
        filtered, kept = [], []
        for name, x_BTHK, before in zip(CONVOLVED, heads, past, strict=True):
            y_BTC, last = getattr(self, name)(x_BTHK.flatten(2), before, real_BT)
            filtered.append(y_BTC.view(x_BTHK.shape))
            kept.append(last)
        return filtered, kept

    def _finish(self, recurred: Recurred, hidden_BTD: Tensor) -> Tensor:
        """Output norm, gate and projection: (B, T, H, V) to (B, T, D)."""
        o_BTD = recurred.o_BTHV.flatten(2)
        if self.options.output_norm:
            o_BTD = self.o_norm(o_BTD)
        if recurred.bypass_BTHV is not None:
            o_BTD = o_BTD + recurred.bypass_BTHV.flatten(2)
        if self.options.output_gate:
            o_BTD = o_BTD * torch.sigmoid(self.z_proj(hidden_BTD))
        return self.o_proj(o_BTD)

    def state_bytes(self, batch: int, length: int, bytes_per_element: int = 2) -> int:
        state = self.num_heads * self.head_dim**2 * max(4, bytes_per_element)  # at least fp32, whatever the model's
        channels = (self.num_heads + 2 * self.num_kv_heads) * self.head_dim
        convolved = max(0, self.options.short_conv - 1) * channels * bytes_per_element
        return batch * (state + convolved)

    def flops_per_token(self, length: int) -> float:
        return 2 * self.products * self.num_heads * self.head_dim**2 + self.projection_flops()


def head_slopes(view: AttentionView) -> Tensor:
    """The ALiBi slope of each head in fp32: where decays start, exp(-slope) a token."""
    return torch.tensor(alibi_slopes(view.num_heads), dtype=torch.float32, device=view.q_weight.device)


def inverse_softplus(x: Tensor) -> Tensor:
    """y with log(1 + exp(y)) = x, for x above 0."""
    return x + torch.log(-torch.expm1(-x))


def masked_decay(log_decay: Tensor, real_BT: Tensor | None) -> Tensor:
    """Log decays (B, T, ...) with padded tokens set to 0: no decay there."""
    if real_BT is None:
        return log_decay
    return log_decay.masked_fill(~real_BT.view(*real_BT.shape, *[1] * (log_decay.ndim - 2)), 0)


def gate_bias(slopes: Tensor, normaliser: float) -> Tensor:
    """b with log(sigmoid(b)) / normaliser = -slope."""
    return -inverse_softplus(normaliser * slopes)
