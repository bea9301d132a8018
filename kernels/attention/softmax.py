"""Softmax attention by the fastest form at hand; the numbers do not depend on which one ran.

- scaled_dot_product_attention, without a mask wherever order alone decides (a mask keeps the flash kernels out), and
  with the queries taken in pieces where a mask is needed and would be large. Written-out products were measured
  against it on a CPU, forward and backward at 256 to 1024 tokens, and were no faster.
- a soft cap on the scores is written out, a block of queries at a time: the fused kernels have none.
"""

from __future__ import annotations

from contextlib import nullcontext

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.attention.bias import causal_lower_right

from halobench.kernels.attention.mask import allowed_keys

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
) -> Tensor:
    """Causal softmax attention of the last T of S tokens; returns o_BTHV.

    Args:
        q_BTHK, k_BSJK, v_BSJV: any strides; H is a multiple of J (grouped heads), S at least T.
        scale: factor on the scores before the softmax.
        key_padding_mask_BS: True at real tokens; None when there is no padding, which is faster.
        window: a query sees this many tokens, itself included; None is all.
        soft_cap: scores become cap * tanh(score / cap).
    """
    tokens, keys = q_BTHK.shape[1], k_BSJK.shape[1]
    if window is not None and window >= keys:
        window = None
    if soft_cap is not None:
        return _explicit(q_BTHK, k_BSJK, v_BSJV, scale, key_padding_mask_BS, window, soft_cap)
    q, k, v = (x.transpose(1, 2) for x in (q_BTHK, k_BSJK, v_BSJV))
    if key_padding_mask_BS is None and window is None:
        if tokens == 1:
            return _decode(q, k, v, scale)
        if tokens == keys:
            grouped = q.shape[1] != k.shape[1]
            o = F.scaled_dot_product_attention(q, k, v, is_causal=True, scale=scale, enable_gqa=grouped)
            return o.transpose(1, 2)
    return _masked(q, k, v, scale, key_padding_mask_BS, window)


def _decode(q_BHTK: Tensor, k_BJSK: Tensor, v_BJSV: Tensor, scale: float) -> Tensor:
    """One query: the heads of a group become the queries of their key head, so the keys are read once."""
    batch, heads, _, key = q_BHTK.shape
    q_BJGK = q_BHTK.reshape(batch, k_BJSK.shape[1], -1, key)
    with sdpa_kernel(DECODE_BACKENDS) if q_BHTK.is_cuda else nullcontext():
        o_BJGV = F.scaled_dot_product_attention(q_BJGK, k_BJSK, v_BJSV, scale=scale)
    return o_BJGV.reshape(batch, 1, heads, v_BJSV.shape[-1])


def _masked(
    q_BHTK: Tensor, k_BJSK: Tensor, v_BJSV: Tensor, scale: float, padding_BS: Tensor | None, window: int | None
) -> Tensor:
    """Queries that follow a past, a window, or padding."""
    (batch, heads, tokens, _), keys = q_BHTK.shape, k_BJSK.shape[2]
    grouped = heads != k_BJSK.shape[1]
    if q_BHTK.is_cuda and padding_BS is None and window is None and not q_BHTK.requires_grad:
        bias = causal_lower_right(tokens, keys)  # flash knows this order by itself
        o_BHTV = F.scaled_dot_product_attention(q_BHTK, k_BJSK, v_BJSV, attn_mask=bias, scale=scale, enable_gqa=grouped)
        return o_BHTV.transpose(1, 2)
    rows = 1 if padding_BS is None else batch
    piece = max(1, min(tokens, MASK_ELEMENTS // (rows * keys)))
    outputs = []
    for start in range(0, tokens, piece):
        stop = min(start + piece, tokens)
        end = keys - tokens + stop  # no later key is visible to this piece
        padding = None if padding_BS is None else padding_BS[:, :end]
        mask = allowed_keys(0, stop - start, stop - start, end, q_BHTK.device, window, padding)
        outputs.append(
            F.scaled_dot_product_attention(
                q_BHTK[:, :, start:stop], k_BJSK[:, :, :end], v_BJSV[:, :, :end],
                attn_mask=mask, scale=scale, enable_gqa=grouped,
            )
        )  # fmt: skip
    return (outputs[0] if len(outputs) == 1 else torch.cat(outputs, dim=2)).transpose(1, 2)


def _explicit(
    q_BTHK: Tensor,
    k_BSJK: Tensor,
    v_BSJV: Tensor,
    scale: float,
    padding_BS: Tensor | None,
    window: int | None,
    soft_cap: float,
) -> Tensor:
    """Products, mask and softmax written out, a block of queries at a time; the softmax is at least fp32."""
    batch, tokens, heads, key = q_BTHK.shape
    keys, kv_heads, value = k_BSJK.shape[1], k_BSJK.shape[2], v_BSJV.shape[-1]
    groups = heads // kv_heads
    q = (q_BTHK * scale).unflatten(2, (kv_heads, groups)).permute(0, 2, 3, 1, 4)  # B J G T K
    k = k_BSJK.permute(0, 2, 3, 1).reshape(batch * kv_heads, key, keys)
    v = v_BSJV.transpose(1, 2).reshape(batch * kv_heads, keys, value)
    block = max(1, min(EXPLICIT_BLOCK, MASK_ELEMENTS // keys))
    outputs = []
    for start in range(0, tokens, block):
        stop = min(start + block, tokens)
        length, end = stop - start, keys - tokens + stop
        begin = 0 if window is None else max(0, end - length - window + 1)
        padding = None if padding_BS is None else padding_BS[:, begin:end]
        allowed = allowed_keys(0, length, length, end - begin, q.device, window, padding)
        queries = q[:, :, :, start:stop].reshape(batch * kv_heads, groups * length, key)
        scores = queries @ k[:, :, begin:end]
        scores = soft_cap * torch.tanh(scores / soft_cap)
        bias = torch.zeros(allowed.shape, dtype=scores.dtype, device=q.device).masked_fill_(~allowed, -torch.inf)
        by_group = scores.view(batch, kv_heads, groups, length, end - begin)
        by_group += bias if bias.ndim == 2 else bias[:, :, None]
        at_least_fp32 = torch.promote_types(by_group.dtype, torch.float32)
        probabilities = by_group.softmax(-1, dtype=at_least_fp32).to(v.dtype).view(scores.shape)
        outputs.append((probabilities @ v[:, begin:end]).view(batch, kv_heads, groups, length, value))
    o_BJGTV = outputs[0] if len(outputs) == 1 else torch.cat(outputs, dim=3)
    return o_BJGTV.permute(0, 3, 1, 2, 4).reshape(batch, tokens, heads, value)
