"""Split-KV decode attention in Triton: each multiprocessor reads a part of the keys, then parts are combined.

The query heads that share a key/value head are the rows of one tile, so keys and values are read once. A part keeps its
own maximum and sum (online softmax in base 2, fp32); the second kernel weighs the parts. The number of parts is fixed
by the shapes and not by the length, which is read on the device: a part without keys returns at once.
"""

# What Triton compiles takes pointers and numbers of its own types.
# mypy: allow-untyped-defs

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from halobench.kernels.aot import CompileCase

LOG2_E = tl.constexpr(1.4426950408889634)
SMALLEST_TILE = 16  # rows of a product of matrices
PARTS_PER_SM = 2
WARPS, STAGES = 4, 3
MOST_PARTS = 256
AT_ONCE = 16  # parts weighed at once: 256 columns of them are 32 registers a thread
INTERPRETED_PARTS = 4  # parts where there is no GPU to count multiprocessors of


@triton.jit
def attend_part(
    q_ptr, k_ptr, v_ptr, lengths_ptr, sums_ptr, most_ptr, total_ptr,
    scale, cap, kv_heads,
    q_b, q_h, k_b, k_j, k_r, v_b, v_j, v_r,
    GROUPS: tl.constexpr, KEY: tl.constexpr, VALUE: tl.constexpr, ROWS: tl.constexpr,
    KEY_TILE: tl.constexpr, VALUE_TILE: tl.constexpr, BLOCK: tl.constexpr, PARTS: tl.constexpr, CAPPED: tl.constexpr,
):  # fmt: skip
    """Program (b * J + j, part): scores, maximum, sum and weighted values of one part of a row's keys.

    sums (B, H, PARTS, VALUE_TILE), most and total (B, H, PARTS), all fp32. `scale` and `cap` as in `decode_attention`.
    """
    row, part = tl.program_id(0), tl.program_id(1)
    b, j = (row // kv_heads).to(tl.int64), (row % kv_heads).to(tl.int64)
    length = tl.load(lengths_ptr + b).to(tl.int32)
    span = tl.cdiv(tl.cdiv(length, PARTS), BLOCK) * BLOCK
    start = part * span
    end = tl.minimum(start + span, length)

    g, dk, dv = tl.arange(0, ROWS), tl.arange(0, KEY_TILE), tl.arange(0, VALUE_TILE)
    heads = j * GROUPS + g
    q_at = q_ptr + b * q_b + heads[:, None] * q_h + dk[None, :]
    q = tl.load(q_at, mask=(g < GROUPS)[:, None] & (dk < KEY)[None, :], other=0.0)
    most = tl.full((ROWS,), float("-inf"), tl.float32)
    total = tl.zeros((ROWS,), tl.float32)
    sums = tl.zeros((ROWS, VALUE_TILE), tl.float32)
    k_base, v_base = k_ptr + b * k_b + j * k_j, v_ptr + b * v_b + j * v_j
    for first in range(start, end, BLOCK):
        place = first + tl.arange(0, BLOCK)
        real = place < end
        at = place.to(tl.int64)
        k = tl.load(k_base + at[None, :] * k_r + dk[:, None], mask=real[None, :] & (dk < KEY)[:, None], other=0.0)
        scores = tl.dot(q, k, input_precision="ieee") * scale
        if CAPPED:
            scores = cap * (2.0 * tl.sigmoid(2.0 * scores / cap) - 1.0)
        scores = tl.where(real[None, :], scores * LOG2_E, float("-inf"))
        higher = tl.maximum(most, tl.max(scores, 1))
        shrink = tl.exp2(most - higher)
        weights = tl.exp2(scores - higher[:, None])
        v = tl.load(v_base + at[:, None] * v_r + dv[None, :], mask=real[:, None] & (dv < VALUE)[None, :], other=0.0)
        total = total * shrink + tl.sum(weights, 1)
        sums = sums * shrink[:, None] + tl.dot(weights.to(v.dtype), v, input_precision="ieee")
        most = higher
    slot = (b * kv_heads * GROUPS + heads) * PARTS + part
    tl.store(most_ptr + slot, most, mask=g < GROUPS)
    tl.store(total_ptr + slot, total, mask=g < GROUPS)
    tl.store(sums_ptr + slot[:, None] * VALUE_TILE + dv[None, :], sums, mask=(g < GROUPS)[:, None])


@triton.jit
def combine_parts(
    sums_ptr, most_ptr, total_ptr, sinks_ptr, o_ptr, heads,
    VALUE: tl.constexpr, VALUE_TILE: tl.constexpr, PARTS: tl.constexpr, PARTS_TILE: tl.constexpr,
    AT_ONCE: tl.constexpr, SINKS: tl.constexpr,
):  # fmt: skip
    """Program b * H + h: the parts of one head, weighed; o (B, H, VALUE)."""
    row = tl.program_id(0).to(tl.int64)
    p, dv = tl.arange(0, PARTS_TILE), tl.arange(0, VALUE_TILE)
    highest = tl.max(tl.load(most_ptr + row * PARTS + p, mask=p < PARTS, other=float("-inf")), 0)
    whole = 0.0
    if SINKS:
        sink = tl.load(sinks_ptr + row % heads).to(tl.float32) * LOG2_E
        highest = tl.maximum(highest, sink)
        whole += tl.exp2(sink - highest)
    o = tl.zeros((VALUE_TILE,), tl.float32)
    for first in range(0, PARTS, AT_ONCE):
        some = first + tl.arange(0, AT_ONCE)
        there = some < PARTS
        weight = tl.exp2(tl.load(most_ptr + row * PARTS + some, mask=there, other=float("-inf")) - highest)
        whole += tl.sum(tl.load(total_ptr + row * PARTS + some, mask=there, other=0.0) * weight, 0)
        at = sums_ptr + (row * PARTS + some)[:, None] * VALUE_TILE + dv[None, :]
        o += tl.sum(tl.load(at, mask=there[:, None], other=0.0) * weight[:, None], 0)
    tl.store(o_ptr + row * VALUE + dv, (o / whole).to(o_ptr.dtype.element_ty), mask=dv < VALUE)


def tiles(groups: int, key: int, value: int, number_bytes: int) -> dict[str, int]:
    """Sizes of a part's tiles: the larger a head, the fewer keys at once, so that three blocks in flight fit."""
    key_tile, value_tile = (max(SMALLEST_TILE, triton.next_power_of_2(size)) for size in (key, value))
    block = max(16, min(128, 16384 // (max(key_tile, value_tile) * number_bytes)))
    return {
        "ROWS": max(SMALLEST_TILE, triton.next_power_of_2(groups)),
        "KEY_TILE": key_tile,
        "VALUE_TILE": value_tile,
        "BLOCK": block,
    }


def part_count(rows: int, room: int, block: int, device: torch.device) -> int:
    """Parts of each row's keys: enough programs for all multiprocessors, and none without a block of keys to read."""
    if device.type != "cuda":
        return max(1, min(INTERPRETED_PARTS, -(-room // block)))
    processors = torch.cuda.get_device_properties(device).multi_processor_count
    return max(1, min(MOST_PARTS, -(-room // block), -(-PARTS_PER_SM * processors // rows)))


def decode_attention_triton(
    q_BHK: Tensor,
    k_BJRK: Tensor,
    v_BJRV: Tensor,
    lengths_B: Tensor,
    *,
    scale: float,
    soft_cap: float | None = None,
    sinks_H: Tensor | None = None,
    parts: int | None = None,
) -> Tensor:
    """`decode_attention`; the last dimension of the buffers must be contiguous.

    Args:
        parts: of each row's keys; by default `part_count`.
    """
    (batch, heads, key), (kv_heads, room), value = q_BHK.shape, k_BJRK.shape[1:3], v_BJRV.shape[-1]
    q = q_BHK if q_BHK.stride(-1) == 1 else q_BHK.contiguous()
    sizes = tiles(heads // kv_heads, key, value, k_BJRK.element_size())
    count = parts or part_count(batch * kv_heads, room, sizes["BLOCK"], q.device)
    sums = torch.empty(batch, heads, count, sizes["VALUE_TILE"], dtype=torch.float32, device=q.device)
    most, total = (torch.empty(batch, heads, count, dtype=torch.float32, device=q.device) for _ in range(2))
    o_BHV = torch.empty(batch, heads, value, dtype=q.dtype, device=q.device)
    attend_part[(batch * kv_heads, count)](
        q, k_BJRK, v_BJRV, lengths_B, sums, most, total,
        scale, 1.0 if soft_cap is None else soft_cap, kv_heads,
        *q.stride()[:2], *k_BJRK.stride()[:3], *v_BJRV.stride()[:3],
        GROUPS=heads // kv_heads, KEY=key, VALUE=value, PARTS=count, CAPPED=soft_cap is not None, **sizes,
        num_warps=WARPS, num_stages=STAGES,
    )  # fmt: skip
    combine_parts[(batch * heads,)](
        sums, most, total, most if sinks_H is None else sinks_H, o_BHV, heads,
        VALUE=value, VALUE_TILE=sizes["VALUE_TILE"], PARTS=count, PARTS_TILE=triton.next_power_of_2(count),
        AT_ONCE=AT_ONCE, SINKS=sinks_H is not None, num_warps=WARPS, num_stages=STAGES,
    )  # fmt: skip
    return o_BHV


def compile_cases() -> list[CompileCase]:
    """Both kernels in bf16, over head sizes and query heads to a key head."""
    strides = dict.fromkeys(("q_b", "q_h", "k_b", "k_j", "k_r", "v_b", "v_j", "v_r"), "i32")
    pointers = {"q_ptr": "*bf16", "k_ptr": "*bf16", "v_ptr": "*bf16", "lengths_ptr": "*i64"}
    sums = {"sums_ptr": "*fp32", "most_ptr": "*fp32", "total_ptr": "*fp32"}
    reading = {**pointers, **sums, "scale": "fp32", "cap": "fp32", "kv_heads": "i32", **strides}
    joining = {**sums, "sinks_ptr": "*bf16", "o_ptr": "*bf16", "heads": "i32"}
    cases = []
    for size, groups, capped in ((64, 4, True), (128, 1, False), (128, 8, False), (256, 4, False)):
        constants = {"GROUPS": groups, "KEY": size, "VALUE": size, "PARTS": 33, "CAPPED": capped}
        cases.append(CompileCase(attend_part, reading, {**constants, **tiles(groups, size, size, 2)}, WARPS, STAGES))
    for size, sinks in ((128, False), (256, True)):
        constants = {
            "VALUE": size,
            "VALUE_TILE": size,
            "PARTS": 33,
            "PARTS_TILE": 64,
            "AT_ONCE": AT_ONCE,
            "SINKS": sinks,
        }
        cases.append(CompileCase(combine_parts, joining, constants, WARPS, STAGES))
    return cases
