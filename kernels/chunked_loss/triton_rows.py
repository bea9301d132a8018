"""Distillation on rows of logits in Triton: one program a row, two passes over it, the gradient in the logits' place.

The first pass is the online softmax of student and teacher together. The second takes log-probabilities from it, sums
the KL and writes the gradient: the sum is taken there, not in the first pass, because a KL is a small difference of
large numbers until the two normalisers are known.

Bytes of a row of V bf16 logits: 4 V read by each pass and 2 V written, 10 V in all. At 16,384 tokens and V = 151,936
that is 24.9 GB, 5.8 ms at 4.3 TB/s; the two exponentials of each pass take 11 us a row of an SM's time (16 a clock)
where its share of the bandwidth takes 19, so memory sets the pace. The kernel needs no shared memory beyond that of its
reductions, and the latency of loads is hidden by several rows on each SM.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
import triton
import triton.language as tl
from torch import Tensor

from halobench.kernels.aot import CompileCase

if TYPE_CHECKING:
    from halobench.kernels.chunked_loss.rows import DistilRows

BLOCK, WARPS, STAGES = 4096, 8, 3  # logits of a row at once, 16 of each model's to a thread: 48 registers


@triton.jit
def _bend(x: tl.tensor, scale: tl.tensor, cap: tl.tensor, CAPPED: tl.constexpr) -> tl.tensor:
    """Logits of products, as head.Bend gives them."""
    y = x.to(tl.float32) * scale
    if CAPPED:
        e = tl.exp(-2 * tl.abs(y / cap))
        size = cap * (1 - e) / (1 + e)
        y = tl.where(y < 0, -size, size)
    return y


@triton.jit
def _join(top: tl.tensor, total: tl.tensor, y: tl.tensor) -> tl.tensor:
    """An online softmax (largest, sum of exp(y - largest)) with a block of logits joined to it, -inf where masked."""
    largest = tl.maximum(top, tl.max(y, 0))
    anchor = tl.where(largest == float("-inf"), 0.0, largest)  # nothing seen yet: no difference of two infinities
    return largest, total * tl.exp(top - anchor) + tl.sum(tl.exp(y - anchor), 0)


@triton.jit
def _merge(top_a: tl.tensor, total_a: tl.tensor, top_b: tl.tensor, total_b: tl.tensor) -> tl.tensor:
    """(largest, log of the sum of exp(y - largest)) of two online softmaxes, one of which may be empty."""
    top = tl.maximum(top_a, top_b)
    return top, tl.log(total_a * tl.exp(top_a - top) + total_b * tl.exp(top_b - top))


@triton.jit
def _normalisers(
    STUDENT: tl.tensor, TEACHER: tl.tensor, threshold: tl.tensor, vocabulary: tl.tensor, cold: tl.tensor,
    student_scale: tl.tensor, student_cap: tl.tensor, teacher_scale: tl.tensor, teacher_cap: tl.tensor,
    TOP_K: tl.constexpr, TEXT: tl.constexpr, STUDENT_CAPPED: tl.constexpr, TEACHER_CAPPED: tl.constexpr,
    BLOCK: tl.constexpr,
) -> tl.tensor:  # fmt: skip
    """Pass 1: (largest, log of the sum over it) of student and teacher at the temperature and of the student at 1.

    By top k, tokens inside and the rest are told apart. Outside its top k the teacher shares its remainder out as the
    student does (rows.DistilRows); the last number is log teacher - log student there.
    """
    empty = float("-inf")
    s_top, s_sum, t_top, t_sum = empty, 0.0, empty, 0.0
    sr_top, sr_sum, tr_top, tr_sum = empty, 0.0, empty, 0.0
    x_top, x_sum = empty, 0.0
    for start in range(0, vocabulary, BLOCK):
        column = start + tl.arange(0, BLOCK)
        there = column < vocabulary
        s = _bend(tl.load(STUDENT + column, mask=there, other=0.0), student_scale, student_cap, STUDENT_CAPPED)
        product = tl.load(TEACHER + column, mask=there, other=0.0)
        t = _bend(product, teacher_scale, teacher_cap, TEACHER_CAPPED) * cold
        if TEXT:
            x_top, x_sum = _join(x_top, x_sum, tl.where(there, s, empty))
        s = s * cold
        if TOP_K:
            inside = product.to(tl.float32) >= threshold
            rest = there & (product.to(tl.float32) < threshold)
            sr_top, sr_sum = _join(sr_top, sr_sum, tl.where(rest, s, empty))
            tr_top, tr_sum = _join(tr_top, tr_sum, tl.where(rest, t, empty))
            there = there & inside
        s_top, s_sum = _join(s_top, s_sum, tl.where(there, s, empty))
        t_top, t_sum = _join(t_top, t_sum, tl.where(there, t, empty))
    shift = 0.0
    if TOP_K:  # both remainders are 0 together, and then no token reads the shift
        shift = (tr_top + tl.log(tr_sum)) - (sr_top + tl.log(sr_sum))
    s_top, s_log = _merge(s_top, s_sum, sr_top, sr_sum)
    t_top, t_log = _merge(t_top, t_sum, tr_top, tr_sum)
    if TOP_K:
        shift = shift - (t_top + t_log) + (s_top + s_log)
    x_log = 0.0
    if TEXT:
        x_log = tl.log(x_sum)
    return s_top, s_log, t_top, t_log, x_top, x_log, shift


@triton.jit
def _distil_rows(
    STUDENT: tl.tensor, TEACHER: tl.tensor, GRADIENT: tl.tensor, WEIGHTS: tl.tensor, TARGETS: tl.tensor,
    THRESHOLDS: tl.tensor, LOSSES: tl.tensor, vocabulary: tl.tensor, student_stride: tl.tensor,
    teacher_stride: tl.tensor, gradient_stride: tl.tensor, temperature: tl.tensor, ce_share: tl.tensor,
    student_scale: tl.tensor, student_cap: tl.tensor, teacher_scale: tl.tensor, teacher_cap: tl.tensor,
    TOP_K: tl.constexpr, TEXT: tl.constexpr, STUDENT_CAPPED: tl.constexpr, TEACHER_CAPPED: tl.constexpr,
    WRITE: tl.constexpr, BLOCK: tl.constexpr,
) -> None:  # fmt: skip
    """One row: its loss, and with WRITE its gradient."""
    row = tl.program_id(0).to(tl.int64)
    STUDENT += row * student_stride
    TEACHER += row * teacher_stride
    GRADIENT += row * gradient_stride
    cold = 1.0 / temperature
    threshold = 0.0
    if TOP_K:
        threshold = tl.load(THRESHOLDS + row).to(tl.float32)
    if TEXT:  # read before the gradient takes its place: every pass below ends in a reduction of the whole program
        target = tl.load(TARGETS + row)
        told = _bend(tl.load(STUDENT + target), student_scale, student_cap, STUDENT_CAPPED)
    s_top, s_log, t_top, t_log, x_top, x_log, shift = _normalisers(
        STUDENT, TEACHER, threshold, vocabulary, cold, student_scale, student_cap, teacher_scale, teacher_cap,
        TOP_K, TEXT, STUDENT_CAPPED, TEACHER_CAPPED, BLOCK,
    )  # fmt: skip
    weight = tl.load(WEIGHTS + row)
    kl_weight = weight * (1 - ce_share) * temperature
    text_weight = weight * ce_share
    kl = tl.zeros([BLOCK], dtype=tl.float32)
    for start in range(0, vocabulary, BLOCK):  # pass 2
        column = start + tl.arange(0, BLOCK)
        there = column < vocabulary
        x = _bend(tl.load(STUDENT + column, mask=there, other=0.0), student_scale, student_cap, STUDENT_CAPPED)
        product = tl.load(TEACHER + column, mask=there, other=0.0)
        log_student = x * cold - s_top - s_log
        log_teacher = _bend(product, teacher_scale, teacher_cap, TEACHER_CAPPED) * cold - t_top - t_log
        if TOP_K:
            log_teacher = tl.where(product.to(tl.float32) >= threshold, log_teacher, log_student + shift)
        teacher = tl.exp(log_teacher)
        kl += tl.where(there, teacher * (log_teacher - log_student), 0.0)
        if WRITE:
            slope = kl_weight * (tl.exp(log_student) - teacher)
            if TEXT:
                text = tl.exp(x - x_top - x_log)
                slope += text_weight * tl.where(column == target, text - 1.0, text)
            if STUDENT_CAPPED:
                slope *= 1 - (x / student_cap) * (x / student_cap)
            tl.store(GRADIENT + column, (slope * student_scale).to(GRADIENT.dtype.element_ty), mask=there)
    loss = kl_weight * temperature * tl.sum(kl, 0)
    if TEXT:
        loss += text_weight * (x_top + x_log - told)
    tl.store(LOSSES + row, loss)


def distil_rows(
    rows: DistilRows,
    student_NV: Tensor,
    teacher_NV: Tensor,
    weights_N: Tensor,
    targets_N: Tensor | None,
    gradient_NV: Tensor | None,
) -> Tensor:
    """See rows.DistilRows.__call__: products of up to fp32 with contiguous rows; the sum is fp32."""
    count, vocabulary = student_NV.shape
    student, teacher, asked = student_NV, teacher_NV, rows.asked
    if student.stride(1) != 1:
        student = student.contiguous()
    if teacher.stride(1) != 1:
        teacher = teacher.contiguous()
    losses = torch.empty(count, dtype=torch.float32, device=student.device)
    threshold = asked.threshold(teacher)
    gradient = student if gradient_NV is None else gradient_NV
    _distil_rows[(count,)](
        student, teacher, gradient, weights_N.to(torch.float32).contiguous(),
        losses if targets_N is None else targets_N.contiguous(),
        losses if threshold is None else threshold,
        losses, vocabulary, student.stride(0), teacher.stride(0), gradient.stride(0),
        asked.temperature, 0.0 if targets_N is None else asked.ce_share,
        rows.student.scale, rows.student.cap or 1.0, rows.teacher.scale, rows.teacher.cap or 1.0,
        TOP_K=threshold is not None, TEXT=targets_N is not None, STUDENT_CAPPED=rows.student.cap is not None,
        TEACHER_CAPPED=rows.teacher.cap is not None, WRITE=gradient_NV is not None, BLOCK=BLOCK,
        num_warps=WARPS, num_stages=STAGES,
    )  # fmt: skip
    return losses.sum()


def compile_cases() -> list[CompileCase]:
    """The kernel bare, with a top k, and with all it can do; with the gradient and without."""
    bare = {"TOP_K": False, "TEXT": False, "STUDENT_CAPPED": False, "TEACHER_CAPPED": False}
    numbers = {
        **{"WEIGHTS": "*fp32", "TARGETS": "*i64", "LOSSES": "*fp32"},
        **dict.fromkeys(("vocabulary", "student_stride", "teacher_stride", "gradient_stride"), "i32"),
        **dict.fromkeys(("temperature", "ce_share", "student_scale", "student_cap"), "fp32"),
        **dict.fromkeys(("teacher_scale", "teacher_cap"), "fp32"),
    }
    return [
        CompileCase(
            kernel=_distil_rows,
            signature=dict.fromkeys(("STUDENT", "TEACHER", "GRADIENT", "THRESHOLDS"), logits) | numbers,
            constexprs={**bare, **dict.fromkeys(wanted, True), "WRITE": write, "BLOCK": BLOCK},
            num_warps=WARPS,
            num_stages=STAGES,
        )
        for logits in ("*bf16", "*fp32")
        for wanted in ((), ("TOP_K",), tuple(bare))
        for write in (True, False)
    ]
