"""Queries that follow a past, on a CPU: attention to the past and to themselves apart, joined by their log sums.

All queries see the whole past, so it needs no mask, and among themselves order alone decides. With o and l the outputs
and the logs of the softmax sums of the two parts, the whole is (exp(l_1) o_1 + exp(l_2) o_2) / (exp(l_1) + exp(l_2)).
A mask of the whole, which the fused kernel would want otherwise, is as large as the scores: with it a model takes 1.8
times as long for a prompt of 16K in pieces of 4K (benchmarks/prefill-cpu.json). A group's heads are read as queries of
their key head, so keys and values are not repeated.
"""

from __future__ import annotations

import torch
from torch import Tensor

_attend = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu  # the form of SDPA that returns the log sums


def attend_past_and_self(q_BHTK: Tensor, k_BJSK: Tensor, v_BJSK: Tensor, scale: float) -> Tensor:
    """Causal attention of the last T of S > T tokens, o_BHTK; no gradient, keys and values of one size.

    Exact: the numbers differ from a masked form's by rounding alone.
    """
    (batch, heads, tokens, key), kv_heads = q_BHTK.shape, k_BJSK.shape[1]
    past = k_BJSK.shape[2] - tokens
    grouped = q_BHTK.reshape(batch, kv_heads, -1, key)
    o_past, log_past = _attend(grouped, k_BJSK[:, :, :past], v_BJSK[:, :, :past], scale=scale)
    k, v = (x[:, :, past:].repeat_interleave(heads // kv_heads, dim=1) for x in (k_BJSK, v_BJSK))
    o_self, log_self = _attend(q_BHTK, k, v, is_causal=True, scale=scale)
    weight = torch.sigmoid(log_past.reshape(batch, heads, tokens) - log_self)[..., None]
    return torch.lerp(o_self.to(weight.dtype), o_past.reshape(o_self.shape).to(weight.dtype), weight).to(q_BHTK.dtype)
