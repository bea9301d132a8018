"""Softmax attention by the fastest form at hand; the numbers do not depend on which one ran.

- scaled_dot_product_attention, without a mask wherever order alone decides (a mask keeps the flash kernels out), and
  with the queries taken in pieces where a mask is needed and would be large. Written-out products were measured
  against it on a CPU, forward and backward at 256 to 1024 tokens, and were no faster.
- on a CPU, queries that follow a past take it apart from themselves (past.py): a mask would be as large as the scores.
- learned sinks become one more key (sinks.py), which costs a copy of keys and values and keeps the fused kernels.
- a soft cap on the scores is written out, a block of queries at a time: the fused kernels have none. So are sinks for
  a single query, where copying the keys would cost more than reading them.
"""

from __future__ import annotations

from contextlib import nullcontext

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.attention.bias import causal_lower_right

from halobench.kernels.attention.mask import allowed_keys
from halobench.kernels.attention.past import attend_past_and_self
from halobench.kernels.attention.sinks import with_sink_key

EXPLICIT_BLOCK = 128  # queries in a block of the explicit form: small enough to skip most of the upper triangle
MASK_ELEMENTS = 2**24  # a mask larger than this is built in pieces of queries
# cuDNN plans anew for every length of a growing cache, so decoding must not fall to it.
DECODE_BACKENDS = [SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH]


def attend(
    q_BTHK: Tensor,
    k_BSJK: Tensor,
    v_BSJV: Tensor,
    *,
    scale: float,
    key_padding_mask_BS: Tensor | None = None,
    window: int | None = None,
    soft_cap: float | None = None,
    sinks_H: Tensor | None = None,
) -> Tensor:
    """Causal softmax attention of the last T of S tokens; returns o_BTHV.

    Args:
        q_BTHK, k_BSJK, v_BSJV: any strides; H is a multiple of J (grouped heads), S at least T.
        scale: factor on the scores before the softmax.
        key_padding_mask_BS: True at real tokens; None when there is no padding, which is faster.
        window: a query sees this many tokens, itself included; None is all.
        soft_cap: scores become cap * tanh(score / cap).
        sinks_H: a score for each head that joins the softmax's denominator, neither scaled nor capped, and carries no
            value: p_s = exp(a_s) / (sum_r exp(a_r) + exp(sink_h)).
    """
    tokens, keys = q_BTHK.shape[1], k_BSJK.shape[1]
    if window is not None and window >= keys:
        window = None
    q, k, v = (x.transpose(1, 2) for x in (q_BTHK, k_BSJK, v_BSJV))
    if key_padding_mask_BS is None and window is None:
        if tokens == 1:
            return attend_where(q, k, v, None, scale=scale, soft_cap=soft_cap, sinks_H=sinks_H).transpose(1, 2)
        if tokens == keys and soft_cap is None:
            return _causal(q, k, v, scale, sinks_H).transpose(1, 2)
        plain = soft_cap is None and sinks_H is None and not _traced(q, k, v)
        if plain and q.device.type == "cpu" and k.shape[-1] == v.shape[-1] and q.dtype == k.dtype == v.dtype:
            return attend_past_and_self(q, k, v, scale).transpose(1, 2)
        if plain and q.is_cuda:
            bias = causal_lower_right(tokens, keys)  # flash knows this order by itself
            grouped = q.shape[1] != k.shape[1]
            o = F.scaled_dot_product_attention(q, k, v, attn_mask=bias, scale=scale, enable_gqa=grouped)
            return o.transpose(1, 2)
    return _in_pieces(q, k, v, scale, key_padding_mask_BS, window, soft_cap, sinks_H).transpose(1, 2)


def attend_where(
    q_BHTK: Tensor,
    k_BJSK: Tensor,
    v_BJSV: Tensor,
    allowed: Tensor | None,
    *,
    scale: float,
    soft_cap: float | None = None,
    sinks_H: Tensor | None = None,
) -> Tensor:
    """Softmax attention to the keys that a mask names, all at once; o_BHTV. Other arguments as in `attend`.

    Args:
        allowed: (T, S) or (B, 1, T, S), True where a query sees a key; None is everywhere. Each query must see one.
    """
    (batch, heads, tokens, key), kv_heads, value = q_BHTK.shape, k_BJSK.shape[1], v_BJSV.shape[-1]
    if soft_cap is not None or (sinks_H is not None and tokens == 1):
        return _explicit(q_BHTK, k_BJSK, v_BJSV, allowed, scale, soft_cap, sinks_H)
    if tokens == 1:  # the heads of a group become the queries of their key head, so the keys are read once
        q_BJGK = q_BHTK.reshape(batch, kv_heads, -1, key)
        with sdpa_kernel(DECODE_BACKENDS) if q_BHTK.is_cuda else nullcontext():
            o_BJGV = F.scaled_dot_product_attention(q_BJGK, k_BJSK, v_BJSV, attn_mask=allowed, scale=scale)
        return o_BJGV.reshape(batch, heads, 1, value)
    if sinks_H is not None:
        q_BHTK, k_BJSK, v_BJSV = with_sink_key(q_BHTK, k_BJSK, v_BJSV, sinks_H, scale)
        allowed = None if allowed is None else F.pad(allowed, (1, 0), value=True)
    o_BHTV = F.scaled_dot_product_attention(
        q_BHTK, k_BJSK, v_BJSV, attn_mask=allowed, scale=scale, enable_gqa=heads != kv_heads
    )
    return o_BHTV[..., :value]


def _traced(*tensors: Tensor) -> bool:
    """Whether a gradient of these is wanted."""
    return torch.is_grad_enabled() and any(x.requires_grad for x in tensors)


def _causal(q_BHTK: Tensor, k_BJTK: Tensor, v_BJTV: Tensor, scale: float, sinks_H: Tensor | None) -> Tensor:
    """As many queries as keys: order needs no mask."""
    value, grouped = v_BJTV.shape[-1], q_BHTK.shape[1] != k_BJTK.shape[1]
    if sinks_H is None:
        return F.scaled_dot_product_attention(q_BHTK, k_BJTK, v_BJTV, is_causal=True, scale=scale, enable_gqa=grouped)
    q, k, v = with_sink_key(q_BHTK, k_BJTK, v_BJTV, sinks_H, scale)
    q = F.pad(q, (0, 0, 1, 0))  # a query beside the sink's key, so that there are as many as keys again
    o = F.scaled_dot_product_attention(q, k, v, is_causal=True, scale=scale, enable_gqa=grouped)
    return o[:, :, 1:, :value]


def _in_pieces(
    q_BHTK: Tensor,
    k_BJSK: Tensor,
    v_BJSV: Tensor,
    scale: float,
    padding_BS: Tensor | None,
    window: int | None,
    soft_cap: float | None,
    sinks_H: Tensor | None,
) -> Tensor:
    """Queries that follow a past, a window, padding or a soft cap: a mask for each piece of them; o_BHTV."""
    (batch, _, tokens, _), keys = q_BHTK.shape, k_BJSK.shape[2]
    rows = 1 if padding_BS is None else batch
    piece = max(1, min(tokens, MASK_ELEMENTS // (rows * keys)))
    if soft_cap is not None:
        piece = min(piece, EXPLICIT_BLOCK)
        if tokens > piece:  # once, and not again for each piece
            k_BJSK, v_BJSV = k_BJSK.contiguous(), v_BJSV.contiguous()
    outputs = []
    for start in range(0, tokens, piece):
        stop = min(start + piece, tokens)
        length, end = stop - start, keys - tokens + stop  # no later key is visible to this piece
        begin = 0 if window is None else max(0, end - length - window + 1)
        padding = None if padding_BS is None else padding_BS[:, begin:end]
        allowed = allowed_keys(0, length, length, end - begin, q_BHTK.device, window, padding)
        queries, k, v = q_BHTK[:, :, start:stop], k_BJSK[:, :, begin:end], v_BJSV[:, :, begin:end]
        outputs.append(attend_where(queries, k, v, allowed, scale=scale, soft_cap=soft_cap, sinks_H=sinks_H))
    return outputs[0] if len(outputs) == 1 else torch.cat(outputs, dim=2)


def _explicit(
    q_BHTK: Tensor,
    k_BJSK: Tensor,
    v_BJSV: Tensor,
    allowed: Tensor | None,
    scale: float,
    soft_cap: float | None,
    sinks_H: Tensor | None,
) -> Tensor:
    """Products, mask and softmax written out; the softmax is at least fp32."""
    (batch, heads, tokens, key), (kv_heads, keys), value = q_BHTK.shape, k_BJSK.shape[1:3], v_BJSV.shape[-1]
    groups = heads // kv_heads
    queries = (q_BHTK * scale).reshape(batch * kv_heads, groups * tokens, key)
    scores = queries @ k_BJSK.reshape(batch * kv_heads, keys, key).transpose(1, 2)
    if soft_cap is not None:
        scores = soft_cap * torch.tanh(scores / soft_cap)
    scores_BJGTS = scores.view(batch, kv_heads, groups, tokens, keys)
    if allowed is not None:
        bias = torch.zeros(allowed.shape, dtype=scores.dtype, device=scores.device).masked_fill_(~allowed, -torch.inf)
        scores_BJGTS += bias if bias.ndim == 2 else bias[:, :, None]
    at_least_fp32 = torch.promote_types(scores.dtype, torch.float32)
    probabilities = scores_BJGTS.softmax(-1, dtype=at_least_fp32).to(v_BJSV.dtype).view(scores.shape)
    o = (probabilities @ v_BJSV.reshape(batch * kv_heads, keys, value)).view(batch, heads, tokens, value)
    if sinks_H is None:
        return o
    # Z / (Z + exp(sink)) for the sum Z of the softmax that was taken without it
    log_sums_BHT1 = scores_BJGTS.to(at_least_fp32).logsumexp(-1).view(batch, heads, tokens, 1)
    return o * torch.sigmoid(log_sums_BHT1 - sinks_H.to(at_least_fp32)[:, None, None]).to(o.dtype)
