"""Parts that mixers share: projections copied from the teacher, norms, rotation, gates."""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor, nn

from halobench.mixers.view import AttentionView, NormView

GateInit = Literal["random", "neutral"]
LOW_RANK = 16  # inner width of projections to data-dependent decays, as in GLA


class RMSNorm(nn.Module):
    """x / rms(x) * weight over groups of the last dimension; the mean is taken in fp32.

    Args:
        weight: one factor per feature, copied.
        groups: equal parts of the last dimension that are normalised apart.
    """

    def __init__(self, weight: Tensor, eps: float, groups: int = 1) -> None:
        super().__init__()
        self.weight = nn.Parameter(weight.detach().clone())
        self.eps = eps
        self.groups = groups

    def forward(self, x: Tensor) -> Tensor:
        parts = x.unflatten(-1, (self.groups, -1)) if self.groups > 1 else x
        parts = _normalise(parts, self.eps, centred=False)
        return self.weight * (parts.flatten(-2) if self.groups > 1 else parts)


class HeadNorm(nn.Module):
    """The norm of queries or keys, as the teacher's NormView says; (B, T, heads, head_dim) to the same."""

    def __init__(self, norm: NormView) -> None:
        super().__init__()
        self.weight = nn.Parameter(norm.weight.detach().clone())
        self.bias = None if norm.bias is None else nn.Parameter(norm.bias.detach().clone())
        self.eps, self.centred, self.together = norm.eps, norm.centred, norm.scope == "all"

    def forward(self, x_BTHK: Tensor) -> Tensor:
        x = x_BTHK.flatten(-2) if self.together else x_BTHK
        x = self.weight * _normalise(x, self.eps, self.centred)
        if self.bias is not None:
            x = x + self.bias
        return x.view(x_BTHK.shape)


def _normalise(x: Tensor, eps: float, centred: bool) -> Tensor:
    """x over its root mean square (around its mean if `centred`) along the last dimension, in at least fp32."""
    exact = at_least_fp32(x)
    if centred:
        exact = exact - exact.mean(-1, keepdim=True)
    return (exact * torch.rsqrt(exact.square().mean(-1, keepdim=True) + eps)).to(x.dtype)


def head_norm(norm: NormView | None, view: AttentionView, times: int = 1) -> HeadNorm:
    """A copy of the teacher's norm, or a per-head RMSNorm of ones where it has none.

    Args:
        times: each head's part is repeated this often, for heads that were (`repeat_heads`). The norm of repeated heads
            is the repeated norm, also where all heads are normalised together: each counts equally often in the mean.
    """
    if norm is None:
        ones = torch.ones(view.head_dim, dtype=view.q_weight.dtype, device=view.q_weight.device)
        return HeadNorm(NormView(weight=ones, eps=view.norm_eps))

    def repeated(x: Tensor | None) -> Tensor | None:
        if x is None or times == 1 or x.shape == (view.head_dim,):
            return x
        return x.detach().reshape(-1, view.head_dim).repeat_interleave(times, dim=0).view(-1, *x.shape[1:])

    weight = repeated(norm.weight)
    assert weight is not None
    return HeadNorm(
        NormView(weight=weight, bias=repeated(norm.bias), eps=norm.eps, centred=norm.centred, scope=norm.scope)
    )


def linear(weight: Tensor, bias: Tensor | None = None, own: bool = False) -> nn.Linear:
    """A linear layer holding copies of `weight` (out, in) and `bias`, or with `own` the tensors themselves."""

    def parameter(x: Tensor) -> nn.Parameter:
        return nn.Parameter(x.detach() if own else x.detach().clone(memory_format=torch.contiguous_format))

    layer = nn.Linear(weight.shape[1], weight.shape[0], bias=bias is not None, device="meta")
    layer.weight = parameter(weight)
    if bias is not None:
        layer.bias = parameter(bias)
    return layer


def new_linear(view: AttentionView, inputs: int, outputs: int, bias: Tensor | None = None) -> nn.Linear:
    """A linear layer with random weights of the teacher's spread and the given bias."""
    weight = torch.empty(outputs, inputs, dtype=view.q_weight.dtype, device=view.q_weight.device)
    return linear(weight.normal_(std=view.init_std), None if bias is None else bias.to(weight), own=True)


class LowRank(nn.Module):
    """up(activation(down(x))): a thin projection from hidden states to one number per channel, with a bias."""

    def __init__(self, view: AttentionView, bias: Tensor, rank: int = LOW_RANK, tanh: bool = False) -> None:
        super().__init__()
        self.down = new_linear(view, view.hidden_size, rank)
        self.up = new_linear(view, rank, len(bias), bias)
        self.tanh = tanh

    def forward(self, hidden_BTD: Tensor) -> Tensor:
        inner = self.down(hidden_BTD)
        return self.up(torch.tanh(inner) if self.tanh else inner)


def copy_projections(
    mixer: nn.Module, view: AttentionView, *, times: int, output_gate: bool, gate_init: GateInit
) -> None:
    """Gives `mixer` q_proj, k_proj, v_proj and o_proj with the teacher's weights, each key/value head `times` times."""
    mixer.q_proj = linear(view.q_weight, view.q_bias)
    for name, weight, bias in (("k_proj", view.k_weight, view.k_bias), ("v_proj", view.v_weight, view.v_bias)):
        repeated = None if bias is None else repeat_heads(bias, view, times)
        setattr(mixer, name, linear(repeat_heads(weight, view, times), repeated, own=True))
    mixer.o_proj = output_projection(view, output_gate, gate_init)


def gate_projection(view: AttentionView, init: GateInit) -> nn.Linear:
    """W of the output gate sigmoid(W x): random, or zeros ("neutral"), which makes the gate 1/2 everywhere."""
    gate = new_linear(view, view.hidden_size, view.num_heads * view.head_dim)
    if init == "neutral":
        nn.init.zeros_(gate.weight)
    return gate


def output_projection(view: AttentionView, gated: bool, init: GateInit) -> nn.Linear:
    """The teacher's W_o; doubled under a neutral gate, so that gate and projection together start as the teacher's."""
    projection = linear(view.o_weight, view.o_bias)
    if gated and init == "neutral":
        with torch.no_grad():
            projection.weight.mul_(2)
    return projection


def repeat_heads(x: Tensor, view: AttentionView, times: int) -> Tensor:
    """A copy of the rows of a key or value projection (weight or bias), each head repeated: i becomes i // times."""
    return x.detach().unflatten(0, (-1, view.head_dim)).repeat_interleave(times, dim=0).flatten(0, 1)


def value_scale(view: AttentionView) -> Tensor:
    """The root mean square of each value head for an input of RMS 1, spread over its features: (num_heads * head_dim,).

    For x with independent features of RMS 1, (W_v x)_i has RMS |row i of W_v|. An output norm that starts with this
    weight answers at about the scale of the attention it replaces (a weighted mean of values), and not at 1.
    """
    rows = view.v_weight.detach().float().square().sum(-1)
    if view.v_bias is not None:
        rows = rows + view.v_bias.detach().float().square()
    per_head = rows.unflatten(0, (view.num_kv_heads, view.head_dim)).mean(-1).sqrt()
    per_feature = per_head.repeat_interleave(view.groups)[:, None].expand(-1, view.head_dim).flatten()
    return per_feature.to(view.v_weight.dtype)


class Rotation:
    """RoPE as the teacher's layer does it, on the leading rotary_dim features; the rest pass unchanged.

    Calling it takes x_BTHK and (cos, sin) as the source's decoder hands them to its attention, each (B or 1, T, N): one
    number for each pair of features (N = rotary_dim / 2), or each number twice (N = rotary_dim).
    """

    def __init__(self, view: AttentionView) -> None:
        self.size = view.rotary_dim
        self.interleaved, self.table_interleaved = view.rope_interleaved, view.rope_table_interleaved

    def __call__(self, x_BTHK: Tensor, position_embeddings: tuple[Tensor, Tensor]) -> Tensor:
        cos, sin = (self.per_pair(table)[:, :, None].to(x_BTHK.dtype) for table in position_embeddings)
        rotated, rest = x_BTHK[..., : self.size], x_BTHK[..., self.size :]
        if self.interleaved:
            first, second = rotated[..., ::2], rotated[..., 1::2]
            turned = torch.stack((first * cos - second * sin, second * cos + first * sin), dim=-1).flatten(-2)
        else:
            first, second = rotated.chunk(2, dim=-1)
            turned = torch.cat((first * cos - second * sin, second * cos + first * sin), dim=-1)
        return turned if rest.shape[-1] == 0 else torch.cat((turned, rest), dim=-1)

    def both(self, q_BTHK: Tensor, k_BTJK: Tensor, position_embeddings: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
        """Queries and keys, those of a single token as one tensor: there an operation costs more than its work."""
        if q_BTHK.shape[1] > 1:
            return self(q_BTHK, position_embeddings), self(k_BTJK, position_embeddings)
        heads = [q_BTHK.shape[2], k_BTJK.shape[2]]
        q, k = self(torch.cat((q_BTHK, k_BTJK), dim=2), position_embeddings).split(heads, dim=2)
        return q, k

    def per_pair(self, table_BTN: Tensor) -> Tensor:
        if table_BTN.shape[-1] == self.size // 2:
            return table_BTN
        return table_BTN[..., ::2] if self.table_interleaved else table_BTN[..., : self.size // 2]


def heads_of(projection: nn.Linear, hidden_BTD: Tensor, head_dim: int) -> Tensor:
    """The projection's output cut into heads, (B, T, heads, head_dim)."""
    return projection(hidden_BTD).unflatten(-1, (-1, head_dim))


def unit(x: Tensor) -> Tensor:
    """x over its length along the last dimension, in at least fp32; zero stays zero."""
    exact = at_least_fp32(x)
    return (exact * torch.rsqrt(exact.square().sum(-1, keepdim=True) + 1e-6)).to(x.dtype)


def at_least_fp32(x: Tensor) -> Tensor:
    """x for means, gates and decays: bf16 would round decays near 1 to 1."""
    return x.float() if x.dtype in (torch.bfloat16, torch.float16) else x
