"""Lightning Attention as HypeNet uses it: linear attention, one constant decay per head, RoPE inside.

    S_t = gamma_h S_{t-1} + k_t^T v_t        o_t = (q_t / sqrt(d)) S_t        gamma_h = exp(-slope_h)
    y_t = W_o (norm(o_t) * sigmoid(W_z x_t))

with q and k normalised per head and rotated, and ALiBi slopes (arXiv 2601.22156, after 2401.04658).

Transfer: W_q, W_k, W_v, W_o and the teacher's norms are copied, for softmax attention without its softmax is a sum of
values weighted by q . k. New: the output norm (at the scale of the teacher's values), which replaces the softmax's
normalisation, and the output gate. The decays are constants and not learned.
"""

from __future__ import annotations

from abc import abstractmethod
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor

from halobench.kernels.backend import triton_obstacle
from halobench.kernels.scalar_decay.fused_step import StepParts, fused_step
from halobench.kernels.scalar_decay.recurrence import scalar_decay
from halobench.kernels.scalar_decay.slopes import alibi_slopes
from halobench.mixers.linear import PROJECTED, LinearMixer, LinearOptions, Recurred
from halobench.mixers.parts import heads_of
from halobench.mixers.view import AttentionView


@dataclass(frozen=True, kw_only=True)
class LightningOptions(LinearOptions):
    """Options of Lightning Attention; the defaults are those of the released HypeNets.

    scale: factor on the queries, by the head size d. An output norm hides it, but for the norm's epsilon.
    """

    norm_scope: Literal["all", "head"] = "all"
    scale: Literal["1/sqrt(d)", "1/d", "1"] = "1/sqrt(d)"


class ConstantDecayMixer(LinearMixer):
    """Linear attention with one constant decay per head; a subclass says which."""

    backends: ClassVar[tuple[str, ...]] = ("naive", "torch", "triton", "fla")

    def __init__(self, view: AttentionView, options: LinearOptions) -> None:
        super().__init__(view, options)
        self._log_decay_H: Tensor | None = None

    @abstractmethod
    def log_decays(self) -> list[float]:
        """The log of each head's decay, at most 0."""

    def recur(
        self,
        q_BTHK: Tensor,
        k_BTHK: Tensor,
        v_BTHV: Tensor,
        gates_BTD: Tensor,
        real_BT: Tensor | None,
        state_BHKV: Tensor | None,
    ) -> Recurred:
        log_decay = self._constant(q_BTHK)
        if real_BT is not None:
            log_decay = log_decay * real_BT[..., None]
        return self.run(scalar_decay, q_BTHK, k_BTHK, v_BTHV, log_decay, scale=self.scale, state=state_BHKV)

    def step(
        self, hidden_BTD: Tensor, position_embeddings: tuple[Tensor, Tensor] | None, state_BHKV: Tensor, backend: str
    ) -> Tensor | None:
        """One token in fused kernels; updates the state. None where they cannot, for `step_obstacle`'s reason."""
        if self.step_obstacle(hidden_BTD, backend) is not None:
            return None
        tables = None
        if self.rotate is not None and position_embeddings is not None:
            tables = [self.rotate.per_pair(table) for table in position_embeddings]
        named = {name: getattr(self, name).weight for name in ("q_norm", "k_norm") if self.options.qk_norm}
        o_norm = self.o_norm if self.options.output_norm else None
        parts = StepParts(
            **named,
            norm_eps=self.q_norm.eps if self.options.qk_norm else 0.0,
            cos=None if tables is None else tables[0][:, 0],
            sin=None if tables is None else tables[1][:, 0],
            interleaved=self.rotate is not None and self.rotate.interleaved,
            o_norm=None if o_norm is None else o_norm.weight,
            o_eps=0.0 if o_norm is None else o_norm.eps,
            o_groups=1 if o_norm is None else o_norm.groups,
            gate=self.z_proj(hidden_BTD)[:, 0] if self.options.output_gate else None,
        )
        q, k, v = (heads_of(getattr(self, name), hidden_BTD, self.head_dim)[:, 0] for name in PROJECTED)
        self.used_backend = "triton"
        y_BD = fused_step(q, k, v, self._constant(hidden_BTD), state_BHKV, scale=self.scale, parts=parts)
        return self.o_proj(y_BD[:, None])

    def step_obstacle(self, like: Tensor, backend: str) -> str | None:
        """Why one token cannot go through the fused kernels, or None."""
        if backend in ("torch", "naive"):
            return "torch was asked for"
        norms = [self.q_norm, self.k_norm] if self.options.qk_norm else []
        if self.options.short_conv:
            return "it has a short convolution"
        if self.clip is not None:
            return "it clips queries, keys and values"
        if any(norm.centred or norm.together or norm.bias is not None for norm in norms):
            return "its queries and keys have another norm than an RMSNorm of each head"
        return triton_obstacle("decode_step", like, self.head_dim)

    def _constant(self, like: Tensor) -> Tensor:
        """(H,), fp32. Made on first use and not a buffer: loading through the meta device empties those."""
        cached = self._log_decay_H
        if cached is None or cached.device != like.device:
            with torch.inference_mode(False):  # else a first call under inference_mode would spoil later training
                cached = torch.tensor(self.log_decays(), dtype=torch.float32, device=like.device)
            self._log_decay_H = cached
        return cached


class LightningMixer(ConstantDecayMixer):
    """See the module's docstring."""

    name = "lightning"
    label = "Lightning Attention"
    paper = "https://arxiv.org/abs/2401.04658"
    Options: ClassVar[type] = LightningOptions

    def __init__(self, view: AttentionView, options: LightningOptions) -> None:
        super().__init__(view, options)
        self.scale = view.head_dim ** {"1/sqrt(d)": -0.5, "1/d": -1.0, "1": 0.0}[options.scale]

    def log_decays(self) -> list[float]:
        return [-slope for slope in alibi_slopes(self.num_heads)]
