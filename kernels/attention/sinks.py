"""A learned score per head that takes part in the softmax, as one more key, so that fused kernels need not know of it.

    p_s = exp(a_s) / (sum_r exp(a_r) + exp(sink_h))

The keys get features that are zero but for a first key, which is nothing else; the queries hold sink_h / scale there.
That key's score is then sink_h and no other score changes, and its value is zero. No mask carries the score, and the
gradient reaches it through the queries.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

FEATURES = 8  # fused kernels on a GPU want head sizes that are multiples of this


def with_sink_key(
    q_BHTK: Tensor, k_BJSK: Tensor, v_BJSV: Tensor, sinks_H: Tensor, scale: float
) -> tuple[Tensor, Tensor, Tensor]:
    """Queries, keys and values with the sink as key 0: (B, H, T, L), (B, J, 1 + S, L), (B, J, 1 + S, L).

    All get one size L, at least max(K + 2, V), which some kernels ask for; the output's features from V on are zero.
    """
    batch, heads, tokens, key = q_BHTK.shape
    value, kv_heads = v_BJSV.shape[-1], k_BJSK.shape[1]
    size = -(-max(key + 2, value) // FEATURES) * FEATURES
    # In two terms, for one of bf16 has three digits: what the first rounds away is in the second.
    wanted_H = sinks_H.to(torch.promote_types(q_BHTK.dtype, torch.float32)) / scale
    first_H = wanted_H.detach().to(q_BHTK.dtype)
    terms_H2 = torch.stack((first_H, (wanted_H - first_H).to(q_BHTK.dtype)), dim=-1)
    q = torch.cat((q_BHTK, terms_H2[None, :, None].expand(batch, heads, tokens, 2)), dim=-1)
    sink_L = k_BJSK.new_zeros(size)
    sink_L[key : key + 2] = 1
    k = torch.cat((sink_L.expand(batch, kv_heads, 1, size), F.pad(k_BJSK, (0, size - key))), dim=2)
    return F.pad(q, (0, size - key - 2)), k, F.pad(v_BJSV, (0, size - value, 1, 0))
