"""What one attention block is made of, whatever the layout of its family."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor


@dataclass(frozen=True, kw_only=True, eq=False)
class AttentionView:
    """One layer's attention. Tensors are the teacher's own (not copies), and may be on the meta device.

    Shapes: q_weight (num_heads * head_dim, hidden_size), k_weight and v_weight (num_kv_heads * head_dim, hidden_size),
    o_weight (hidden_size, num_heads * head_dim); q_norm_weight and k_norm_weight (head_dim,).
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
    q_norm_weight: Tensor | None = None  # per-head RMSNorm on queries; None where the teacher has none
    k_norm_weight: Tensor | None = None
    norm_eps: float
    scaling: float  # factor on q . k
    rope: bool  # whether this layer rotates its queries and keys
    rotary_dim: int  # leading part of head_dim that is rotated
    sliding_window: int | None = None  # tokens a query sees, itself included
    soft_cap: float | None = None  # scores become cap * tanh(score / cap)
    init_std: float = 0.02  # spread of new random weights, as the teacher's config has it

    @property
    def groups(self) -> int:
        """Query heads that share one key/value head."""
        return self.num_heads // self.num_kv_heads

    @property
    def parameters(self) -> int:
        """Number of weights in the block."""
        tensors = [value for value in vars(self).values() if isinstance(value, Tensor)]
        return sum(tensor.numel() for tensor in tensors)
