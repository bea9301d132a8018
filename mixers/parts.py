"""Parts that mixers share: projections copied from the teacher, norms, rotation, gates."""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor, nn

from halobench.mixers.view import AttentionView

GateInit = Literal["random", "neutral"]


class RMSNorm(nn.Module):
    """x / rms(x) * weight over groups of the last dimension; the mean is taken in fp32.

    Args:
        size: length of the weight.
        groups: equal parts of the last dimension that are normalised apart.
    """

    def __init__(self, weight: Tensor, eps: float, groups: int = 1) -> None:
        super().__init__()
        self.weight = nn.Parameter(weight.detach().clone())
        self.eps = eps
        self.groups = groups

    def forward(self, x: Tensor) -> Tensor:
        parts = x.float() if x.dtype in (torch.bfloat16, torch.float16) else x
        if self.groups > 1:
            parts = parts.unflatten(-1, (self.groups, -1))
        parts = parts * torch.rsqrt(parts.square().mean(-1, keepdim=True) + self.eps)
        if self.groups > 1:
            parts = parts.flatten(-2)
        return self.weight * parts.to(x.dtype)


def head_norm(weight: Tensor | None, view: AttentionView) -> RMSNorm:
    """Per-head RMSNorm with the teacher's weight, or ones where the teacher has no norm."""
    ones = torch.ones(view.head_dim, dtype=view.q_weight.dtype, device=view.q_weight.device)
    return RMSNorm(ones if weight is None else weight, view.norm_eps)


def linear(weight: Tensor, bias: Tensor | None = None) -> nn.Linear:
    """A linear layer holding copies of `weight` (out, in) and `bias`."""
    layer = nn.Linear(weight.shape[1], weight.shape[0], bias=bias is not None, device="meta")
    layer.weight = nn.Parameter(weight.detach().clone())
    if bias is not None:
        layer.bias = nn.Parameter(bias.detach().clone())
    return layer


def gate_projection(view: AttentionView, init: GateInit) -> nn.Linear:
    """W of the output gate sigmoid(W x): random, or zeros ("neutral"), which makes the gate 1/2 everywhere."""
    weight = torch.zeros(
        view.num_heads * view.head_dim, view.hidden_size, dtype=view.q_weight.dtype, device=view.q_weight.device
    )
    return linear(weight.normal_(std=view.init_std) if init == "random" else weight)


def output_projection(view: AttentionView, gated: bool, init: GateInit) -> nn.Linear:
    """The teacher's W_o; doubled under a neutral gate, so that gate and projection together start as the teacher's."""
    projection = linear(view.o_weight, view.o_bias)
    if gated and init == "neutral":
        with torch.no_grad():
            projection.weight.mul_(2)
    return projection


def repeat_heads(x: Tensor, view: AttentionView, times: int) -> Tensor:
    """Rows of a key or value projection (weight or bias), each head repeated: head i becomes head i // times."""
    return x.detach().unflatten(0, (-1, view.head_dim)).repeat_interleave(times, dim=0).flatten(0, 1)


def rotate(x_BTHK: Tensor, position_embeddings: tuple[Tensor, Tensor]) -> Tensor:
    """RoPE with halves paired (GPT-NeoX layout) on the leading rotary_dim features; the rest pass unchanged.

    Args:
        position_embeddings: (cos, sin), each (B or 1, T, rotary_dim).
    """
    cos, sin = (table[:, :, None].to(x_BTHK.dtype) for table in position_embeddings)
    rotary_dim = cos.shape[-1]
    rotated, rest = x_BTHK[..., :rotary_dim], x_BTHK[..., rotary_dim:]
    first, second = rotated.chunk(2, dim=-1)
    rotated = rotated * cos + torch.cat((-second, first), dim=-1) * sin
    return rotated if rest.shape[-1] == 0 else torch.cat((rotated, rest), dim=-1)


def heads_of(projection: nn.Linear, hidden_BTD: Tensor, head_dim: int) -> Tensor:
    """The projection's output cut into heads, (B, T, heads, head_dim)."""
    return projection(hidden_BTD).unflatten(-1, (-1, head_dim))
