"""What one attention block is made of, whatever the layout of its family."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from torch import Tensor


@dataclass(frozen=True, kw_only=True, eq=False)
class NormView:
    """How a teacher normalises its queries or its keys, before it rotates them.

    weight: the factor as it acts (Gemma's stored w acts as 1 + w): (head_dim,) or (heads, head_dim) when each head is
        normalised apart, (heads * head_dim,) when all are together.
    centred: the mean is taken away first (LayerNorm), else not (RMSNorm).
    scope: "head", each head apart, or "all", all heads of a token together.
    """

    weight: Tensor
    eps: float
    bias: Tensor | None = None
    centred: bool = False
    scope: Literal["head", "all"] = "head"


@dataclass(frozen=True, kw_only=True, eq=False)
class AttentionView:
    """One layer's attention. Tensors are the teacher's own (not copies) wherever its layout allows, and may be on meta.

    Shapes: q_weight (num_heads * head_dim, hidden_size), k_weight and v_weight (num_kv_heads * head_dim, hidden_size),
    o_weight (hidden_size, num_heads * head_dim); biases accordingly; sinks (num_heads,).
    """

    layer_index: int
    hidden_size: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    q_weight: Tensor
    k_weight: Tensor
    v_weight: Tensor
    o_weight: Tensor
    q_bias: Tensor | None = None
    k_bias: Tensor | None = None
    v_bias: Tensor | None = None
    o_bias: Tensor | None = None
    q_norm: NormView | None = None
    k_norm: NormView | None = None
    norm_eps: float  # of new norms
    scaling: float  # factor on q . k
    rope: bool  # whether this layer rotates its queries and keys
    rotary_dim: int  # leading part of head_dim that is rotated; 0 without RoPE
    rope_interleaved: bool = False  # rotated pairs are neighbours (2i, 2i + 1); else half of rotary_dim apart
    rope_table_interleaved: bool = False  # so are equal numbers in the tables of cosines and sines; else two halves
    sliding_window: int | None = None  # tokens a query sees, itself included
    soft_cap: float | None = None  # scores become cap * tanh(score / cap)
    clip: float | None = None  # queries, keys and values are clamped to [-clip, clip] after their norms
    sinks: Tensor | None = None  # a learned score per head that takes part in the softmax and carries no value
    init_std: float = 0.02  # spread of new random weights, as the teacher's config has it

    @property
    def groups(self) -> int:
        """Query heads that share one key/value head."""
        return self.num_heads // self.num_kv_heads

    @property
    def parameters(self) -> int:
        """Number of weights in the block."""
        tensors = [value for value in vars(self).values() if isinstance(value, Tensor)]
        for norm in (self.q_norm, self.k_norm):
            tensors += [] if norm is None else [x for x in (norm.weight, norm.bias) if x is not None]
        return sum(tensor.numel() for tensor in tensors)
