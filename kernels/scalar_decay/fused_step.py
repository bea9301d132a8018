"""One token of a linear-attention layer between its projections, as two Triton kernels at most.

    q, k = rotate(norm(q)), rotate(norm(k))      S = exp(g) S + k^T v      o = scale q S      y = norm(o) * sigmoid(z)

All of it in fp32 whatever the dtype of the projections; the state is updated in place. A norm over all heads needs the
sum of squares of every head, which the second kernel adds up; norms of each head apart would too, for a head's values
are spread over programs. Without an output norm there is one kernel.
"""

from __future__ import annotations

import importlib
from dataclasses import dataclass

from torch import Tensor


@dataclass(frozen=True, kw_only=True, eq=False)
class StepParts:
    """What surrounds the recurrence of one layer.

    q_norm, k_norm: weights of an RMSNorm of each head, (K,) or (heads, K); None is no norm. norm_eps: of both.
    cos, sin: (B or 1, N / 2), one number a pair of the first N features; None is no rotation. interleaved: pairs are
    neighbours, else N / 2 apart. o_norm: the output norm's weight, (H * V,); None is none. o_groups: equal parts of the
    output that are normalised apart, 1 or H. gate: z, (B, H * V), through a sigmoid; None is no gate.
    """

    q_norm: Tensor | None = None
    k_norm: Tensor | None = None
    norm_eps: float = 1e-6
    cos: Tensor | None = None
    sin: Tensor | None = None
    interleaved: bool = False
    o_norm: Tensor | None = None
    o_eps: float = 1e-6
    o_groups: int = 1
    gate: Tensor | None = None


def fused_step(
    q_BHK: Tensor,
    k_BJK: Tensor,
    v_BJV: Tensor,
    log_decay_H: Tensor,
    state_BHKV: Tensor,
    *,
    scale: float,
    parts: StepParts,
) -> Tensor:
    """One token; updates `state_BHKV` (fp32, contiguous) and returns y (B, H * V) in q's dtype.

    Args:
        q_BHK, k_BJK, v_BJV: as the projections give them; H is a multiple of J.
        log_decay_H: fp32, at most 0.
    """
    kernels = importlib.import_module("halobench.kernels.scalar_decay.fused_step_triton")
    return kernels.fused_step_triton(q_BHK, k_BJK, v_BJV, log_decay_H, state_BHKV, scale=scale, parts=parts)
