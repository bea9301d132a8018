"""The kernels of fused_step.py: a program takes some value columns of one head's state, for one row of the batch."""

# What Triton compiles takes pointers and numbers of its own types.
# mypy: allow-untyped-defs

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from halobench.kernels.aot import CompileCase
from halobench.kernels.scalar_decay.fused_step import StepParts

WARPS, STAGES = 4, 2
VALUE_TILE = 32  # columns of a state in one program: 16 heads x 128 columns are 64 programs


@triton.jit
def prepared(
    x_ptr, weight_ptr, cos_ptr, sin_ptr, eps,
    KEY: tl.constexpr, KEY_TILE: tl.constexpr, TURNED: tl.constexpr, INTERLEAVED: tl.constexpr, NORM: tl.constexpr,
):  # fmt: skip
    """A head's K numbers at x_ptr, normalised and rotated, in fp32; zeros from K on."""
    i = tl.arange(0, KEY_TILE)
    x = tl.load(x_ptr + i, mask=i < KEY, other=0.0).to(tl.float32)
    if NORM:
        size = tl.rsqrt(tl.sum(x * x, 0) / KEY + eps)
        x = x * size * tl.load(weight_ptr + i, mask=i < KEY, other=0.0).to(tl.float32)
    if TURNED > 0:
        half: tl.constexpr = TURNED // 2
        if INTERLEAVED:
            pair, first, partner = i // 2, i % 2 == 0, i ^ 1
        else:
            pair, first, partner = i % half, i < half, tl.where(i < half, i + half, i - half)
        turned = i < TURNED
        other = tl.load(x_ptr + partner, mask=turned, other=0.0).to(tl.float32)
        if NORM:
            other = other * size * tl.load(weight_ptr + partner, mask=turned, other=0.0).to(tl.float32)
        cos = tl.load(cos_ptr + pair, mask=turned, other=1.0).to(tl.float32)
        sin = tl.load(sin_ptr + pair, mask=turned, other=0.0).to(tl.float32)
        x = x * cos + tl.where(first, -other, other) * sin
    return x


@triton.jit
def update_and_read(
    q_ptr, k_ptr, v_ptr, decay_ptr, state_ptr, q_norm_ptr, k_norm_ptr, cos_ptr, sin_ptr, gate_ptr, o_ptr, squares_ptr,
    scale, eps, heads, q_b, k_b, v_b, gate_b, q_weight_h, k_weight_h, table_b,
    GROUPS: tl.constexpr, KEY: tl.constexpr, VALUE: tl.constexpr, KEY_TILE: tl.constexpr, COLUMNS: tl.constexpr,
    TURNED: tl.constexpr, INTERLEAVED: tl.constexpr, Q_NORM: tl.constexpr, K_NORM: tl.constexpr,
    O_NORM: tl.constexpr, GATE: tl.constexpr,
):  # fmt: skip
    """Program (b * H + h, columns): state and read-out of some columns. o (B, H, V); squares (B, H, programs)."""
    row, part = tl.program_id(0), tl.program_id(1)
    b, h = (row // heads).to(tl.int64), row % heads
    j = h // GROUPS
    cos, sin = cos_ptr + b * table_b, sin_ptr + b * table_b
    q = prepared(
        q_ptr + b * q_b + h * KEY,
        q_norm_ptr + h * q_weight_h,
        cos,
        sin,
        eps,
        KEY,
        KEY_TILE,
        TURNED,
        INTERLEAVED,
        Q_NORM,
    )
    k = prepared(
        k_ptr + b * k_b + j * KEY,
        k_norm_ptr + j * k_weight_h,
        cos,
        sin,
        eps,
        KEY,
        KEY_TILE,
        TURNED,
        INTERLEAVED,
        K_NORM,
    )
    dk, dv = tl.arange(0, KEY_TILE), part * COLUMNS + tl.arange(0, COLUMNS)
    v = tl.load(v_ptr + b * v_b + j * VALUE + dv, mask=dv < VALUE, other=0.0).to(tl.float32)
    at = state_ptr + row.to(tl.int64) * KEY * VALUE + dk[:, None] * VALUE + dv[None, :]
    there = (dk < KEY)[:, None] & (dv < VALUE)[None, :]
    state = tl.load(at, mask=there, other=0.0)
    state = state * tl.exp(tl.load(decay_ptr + h)) + k[:, None] * v[None, :]
    tl.store(at, state, mask=there)
    o = tl.sum(q[:, None] * state, 0) * scale
    if O_NORM:
        tl.store(squares_ptr + row.to(tl.int64) * tl.num_programs(1) + part, tl.sum(o * o, 0))
    elif GATE:
        o = o * tl.sigmoid(tl.load(gate_ptr + b * gate_b + h * VALUE + dv, mask=dv < VALUE, other=0.0).to(tl.float32))
    tl.store(o_ptr + row.to(tl.int64) * VALUE + dv, o.to(o_ptr.dtype.element_ty), mask=dv < VALUE)


@triton.jit
def normalise_and_gate(
    o_ptr, squares_ptr, weight_ptr, gate_ptr, y_ptr, eps, heads, gate_b,
    VALUE: tl.constexpr, TILE: tl.constexpr, NUMBERS: tl.constexpr, SQUARES: tl.constexpr, SQUARES_TILE: tl.constexpr,
    TOGETHER: tl.constexpr, GATE: tl.constexpr,
):  # fmt: skip
    """Program b * H + h: one head's o over the root mean square of its group of NUMBERS features, weighted and gated.

    SQUARES sums of squares belong to a group: those of all heads with TOGETHER, else the head's own.
    """
    row = tl.program_id(0).to(tl.int64)
    b, h = row // heads, row % heads
    i, n = tl.arange(0, TILE), tl.arange(0, SQUARES_TILE)
    group = b if TOGETHER else row
    mean = tl.sum(tl.load(squares_ptr + group * SQUARES + n, mask=n < SQUARES, other=0.0), 0) / NUMBERS
    y = tl.load(o_ptr + row * VALUE + i, mask=i < VALUE, other=0.0) * tl.rsqrt(mean + eps)
    y = y * tl.load(weight_ptr + h * VALUE + i, mask=i < VALUE, other=0.0).to(tl.float32)
    if GATE:
        y = y * tl.sigmoid(tl.load(gate_ptr + b * gate_b + h * VALUE + i, mask=i < VALUE, other=0.0).to(tl.float32))
    tl.store(y_ptr + row * VALUE + i, y.to(y_ptr.dtype.element_ty), mask=i < VALUE)


def fused_step_triton(
    q_BHK: Tensor,
    k_BJK: Tensor,
    v_BJV: Tensor,
    log_decay_H: Tensor,
    state_BHKV: Tensor,
    *,
    scale: float,
    parts: StepParts,
) -> Tensor:
    """`fused_step`."""
    (batch, heads, key), value, kv_heads = q_BHK.shape, v_BJV.shape[-1], k_BJK.shape[1]
    q, k, v = (x.flatten(1).contiguous() for x in (q_BHK, k_BJK, v_BJV))
    gate = None if parts.gate is None else parts.gate.contiguous()
    columns = min(VALUE_TILE, triton.next_power_of_2(value))
    pieces = triton.cdiv(value, columns)
    normed = parts.o_norm is not None
    o = torch.empty(batch, heads, value, dtype=torch.float32 if normed else q.dtype, device=q.device)
    squares = torch.empty(batch, heads, pieces, dtype=torch.float32, device=q.device) if normed else o
    table = parts.cos if parts.cos is None or parts.cos.stride(-1) == 1 else parts.cos.contiguous()
    sines = parts.sin if parts.sin is None or parts.sin.stride(-1) == 1 else parts.sin.contiguous()
    update_and_read[(batch * heads, pieces)](
        q, k, v, log_decay_H, state_BHKV,
        _or(parts.q_norm, q), _or(parts.k_norm, q), _or(table, q), _or(sines, q), _or(gate, q), o, squares,
        scale, parts.norm_eps, heads, q.stride(0), k.stride(0), v.stride(0), _row_stride(gate),
        _head_stride(parts.q_norm), _head_stride(parts.k_norm), _row_stride(table),
        GROUPS=heads // kv_heads, KEY=key, VALUE=value, KEY_TILE=triton.next_power_of_2(key), COLUMNS=columns,
        TURNED=0 if table is None else 2 * table.shape[-1], INTERLEAVED=parts.interleaved,
        Q_NORM=parts.q_norm is not None, K_NORM=parts.k_norm is not None, O_NORM=normed, GATE=gate is not None,
        num_warps=WARPS, num_stages=STAGES,
    )  # fmt: skip
    if not normed:
        return o.flatten(1)
    together = parts.o_groups == 1
    sums = heads * pieces if together else pieces
    y = torch.empty(batch, heads, value, dtype=q.dtype, device=q.device)
    normalise_and_gate[(batch * heads,)](
        o, squares, parts.o_norm, _or(gate, q), y, parts.o_eps, heads, _row_stride(gate),
        VALUE=value, TILE=triton.next_power_of_2(value), NUMBERS=heads * value // parts.o_groups,
        SQUARES=sums, SQUARES_TILE=triton.next_power_of_2(sums), TOGETHER=together, GATE=gate is not None,
        num_warps=WARPS, num_stages=STAGES,
    )  # fmt: skip
    return y.flatten(1)


def _or(tensor: Tensor | None, unread: Tensor) -> Tensor:
    """A pointer that a kernel may be given in the place of one that it will not read."""
    return unread if tensor is None else tensor


def _row_stride(tensor: Tensor | None) -> int:
    """From one row of the batch to the next; 0 for one row that all share."""
    return 0 if tensor is None or tensor.shape[0] == 1 else tensor.stride(0)


def _head_stride(weight: Tensor | None) -> int:
    """From one head's weights to the next; 0 where all share them."""
    return 0 if weight is None or weight.ndim == 1 else weight.stride(0)


def compile_cases() -> list[CompileCase]:
    """Both kernels in bf16 for 16 heads: as in the released hybrids, without norms, and with neighbours turned."""
    numbers = ("heads", "q_b", "k_b", "v_b", "gate_b", "q_weight_h", "k_weight_h", "table_b")
    updating = {
        **dict.fromkeys(("q_ptr", "k_ptr", "v_ptr", "q_norm_ptr", "k_norm_ptr"), "*bf16"),
        **dict.fromkeys(("cos_ptr", "sin_ptr", "gate_ptr"), "*bf16"),
        **dict.fromkeys(("decay_ptr", "state_ptr", "o_ptr", "squares_ptr"), "*fp32"),
        **{"scale": "fp32", "eps": "fp32"},
        **dict.fromkeys(numbers, "i32"),
    }
    finishing = {
        **{"o_ptr": "*fp32", "squares_ptr": "*fp32", "weight_ptr": "*bf16", "gate_ptr": "*bf16", "y_ptr": "*bf16"},
        **{"eps": "fp32", "heads": "i32", "gate_b": "i32"},
    }
    cases = []
    for size, normed, turned, interleaved in ((128, True, 128, False), (128, False, 0, False), (64, True, 32, True)):
        shapes = {"GROUPS": 1, "KEY": size, "VALUE": size, "KEY_TILE": size, "COLUMNS": VALUE_TILE}
        flags = {"Q_NORM": normed, "K_NORM": normed, "O_NORM": normed, "GATE": True}
        constants = {**shapes, **flags, "TURNED": turned, "INTERLEAVED": interleaved}
        signature = updating if normed else updating | {"o_ptr": "*bf16"}
        cases.append(CompileCase(update_and_read, signature, constants, WARPS, STAGES))
    for together in (True, False):
        heads = 16 if together else 1
        sums = {"NUMBERS": heads * 128, "SQUARES": heads * 4, "SQUARES_TILE": heads * 4, "TOGETHER": together}
        constants = {"VALUE": 128, "TILE": 128, **sums, "GATE": True}
        cases.append(CompileCase(normalise_and_gate, finishing, constants, WARPS, STAGES))
    return cases
