"""Distillation from the hidden states of student and teacher: products and gradients a chunk of tokens at a time.

No autograd inside a chunk. Of each chunk: the products of both unembeddings, into two buffers that all chunks share;
the loss, whose gradient takes the student's place (rows.py); that gradient times the unembedding is the gradient of the
hidden states, and its transpose times the hidden states is added to the unembedding's, in fp32 whatever the factors'
dtype. Scaling by the incoming gradient comes later.

The arithmetic at N = 16,384 tokens, D = 2,048, V = 151,936 in bf16, for 790 TFLOP/s and 4.3 TB/s:
  four products of 2 N D V operations (student, teacher, two gradients)   40.8 TFLOP   51.6 ms
  the rows, 10 N V bytes (triton_rows.py)                                 24.9 GB       5.8 ms
  the fp32 gradient of the unembedding, read and written by each of the
  11 chunks, in the shadow of its product where the library overlaps it   27.4 GB       6.4 ms
so 57 ms are the floor, and a chunk is as long as its logits fit into 1 GB (1,536 tokens, 0.93 GB): half of it would
double the last line.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from halobench.errors import UserError
from halobench.kernels.backend import choose, compute_dtype
from halobench.kernels.chunked_loss import naive
from halobench.kernels.chunked_loss.head import Head
from halobench.kernels.chunked_loss.naive import SoftTargets
from halobench.kernels.chunked_loss.rows import DistilRows, check_same_vocabulary

# Bytes of the student's and the teacher's logits that are alive at once, by device: on a CPU, products of 128 rows are
# as fast as longer ones, and memory is dearer.
LIVE_BYTES = {"cuda": 1_000_000_000, "cpu": 192 << 20}
TILE, FEWEST_TOKENS, MOST_TOKENS = 128, 16, 4096


def chunk_tokens(vocabulary: int, bytes_a_pair: int, device: str) -> int:
    """Tokens of a chunk: those whose logits fit into `LIVE_BYTES`, in whole tiles of 128 where there is room for one.

    1,536 at a vocabulary of 151,936 in bf16 on a GPU. Never below 16, nor above 4,096, beyond which nothing is gained.

    Args:
        bytes_a_pair: of a student's and a teacher's logit.
    """
    room = min(MOST_TOKENS, LIVE_BYTES.get(device, LIVE_BYTES["cuda"]) // (vocabulary * bytes_a_pair))
    return max(FEWEST_TOKENS, room if room < TILE else room // TILE * TILE)


def add_product(total: Tensor, a: Tensor, b: Tensor) -> None:
    """total += a @ b, with a total in fp32 of factors in bf16 or fp16 which are not copied to fp32.

    On a GPU the product never exists in less than fp32. A CPU has no such product: there each one is rounded to the
    factors' dtype once before it is added.
    """
    if total.dtype == a.dtype:
        total.addmm_(a, b)
    elif total.is_cuda:
        torch.addmm(total, a, b, out_dtype=total.dtype, out=total)
    else:
        total += a @ b


@dataclass(frozen=True, kw_only=True)
class _Chunks:
    """All a pass over the chunks needs; tensors without gradients, the student's in one dtype, the teacher's in one."""

    student: Head
    teacher: Head
    hidden_ND: Tensor
    target_NE: Tensor
    weights_N: Tensor
    targets_N: Tensor | None
    rows: DistilRows
    chunk: int

    def run(self, wanted: tuple[bool, bool, bool]) -> tuple[Tensor, list[Tensor | None]]:
        """The loss, and its gradients in hidden states, weight and bias where they are wanted."""
        hidden, weight = self.hidden_ND, self.student.weight_VD
        sums = torch.promote_types(hidden.dtype, torch.float32)
        gradients = [
            torch.empty_like(hidden) if wanted[0] else None,
            torch.zeros_like(weight, dtype=sums) if wanted[1] else None,
            torch.zeros(len(weight), dtype=sums, device=weight.device) if wanted[2] else None,
        ]
        length = min(self.chunk, len(hidden))
        students = hidden.new_empty(length, len(weight))
        teachers = self.target_NE.new_empty(length, len(self.teacher.weight_VD))
        total = torch.zeros((), dtype=sums, device=hidden.device)
        for start in range(0, len(hidden), self.chunk):
            part = slice(start, min(start + self.chunk, len(hidden)))
            size = part.stop - part.start
            student = self.student.products(hidden[part], out=students[:size])
            teacher = self.teacher.products(self.target_NE[part], out=teachers[:size])
            targets = None if self.targets_N is None else self.targets_N[part]
            gradient = student if any(wanted) else None
            total += self.rows(student, teacher, self.weights_N[part], targets, gradient)
            self._gather(gradients, student, part)
        return total, gradients

    def _gather(self, gradients: list[Tensor | None], slope_CV: Tensor, part: slice) -> None:
        """Adds a chunk's gradient in the products to the gradients of what they are made of."""
        hidden, weight, bias = gradients
        if hidden is not None:
            torch.mm(slope_CV, self.student.weight_VD, out=hidden[part])
        if weight is not None:
            add_product(weight, slope_CV.T, self.hidden_ND[part])
        if bias is not None:
            bias += slope_CV.sum(0, dtype=bias.dtype)


class _Distillation(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, chunks: _Chunks, *sources: Tensor | None) -> Tensor:
        hidden, weight, bias = ctx.needs_input_grad[1:]
        total, gradients = chunks.run((hidden, weight, bias))
        ctx.save_for_backward(*gradients)  # freed with the graph, and one backward alone
        ctx.dtypes = [None if x is None else x.dtype for x in sources]
        return total

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_total: Tensor) -> tuple[Tensor | None, ...]:
        scaled = [
            None if gradient is None else torch.mul(gradient, grad_total, out=torch.empty_like(gradient, dtype=dtype))
            for gradient, dtype in zip(ctx.saved_tensors, ctx.dtypes, strict=True)
        ]
        return None, *scaled


def _check_targets(targets_N: Tensor | None, vocabulary: int) -> None:
    """A target that is no token would be read from beyond the row. On a GPU nothing waits for the assertion."""
    if targets_N is not None and len(targets_N):
        fits = (targets_N.amin() >= 0) & (targets_N.amax() < vocabulary)
        torch._assert_async(
            fits, f"a target is no token of the vocabulary of {vocabulary}; weigh tokens with 0 instead"
        )


def distillation(
    student: Head,
    teacher: Head,
    hidden_ND: Tensor,
    target_NE: Tensor,
    weights_N: Tensor,
    targets_N: Tensor | None = None,
    *,
    asked: SoftTargets,
    chunk: int | None = None,
    backend: str = "auto",
) -> Tensor:
    """Sum over tokens of weight * what `asked` says, differentiable in the student's hidden states and unembedding.

    Beyond the weights and hidden states it holds `LIVE_BYTES` of logits, the temporaries of a few rows, the gradients
    of the hidden states and of the unembedding (the latter in fp32) and, while autograd takes them, both scaled. Under
    autocast, products are in its dtype, and so is one copy of each unembedding that is not.

    Args:
        student: its unembedding, differentiated where it asks for a gradient.
        teacher: its unembedding; never differentiated.
        hidden_ND: the student's hidden states, N tokens of width D.
        target_NE: the teacher's, of width E.
        weights_N: what each token counts.
        targets_N: the text's next tokens; needed where ce_share is above 0.
        asked: temperature, top k and share of cross entropy.
        chunk: tokens whose logits are held at once; by default `chunk_tokens`.
        backend: "auto", "triton", "torch" or "naive" (see kernels/backend.py).

    Returns:
        a scalar, fp32 (fp64 for fp64 input).

    Raises:
        UserError: vocabularies that differ, a share of cross entropy without a text, or a backend that cannot run.
    """
    check_same_vocabulary((len(hidden_ND), len(student.weight_VD)), (len(target_NE), len(teacher.weight_VD)))
    if asked.ce_share > 0 and targets_N is None:
        raise UserError(f"ce_share is {asked.ce_share} but no text was given; give the next tokens, or ce_share 0")
    texts = targets_N if asked.ce_share > 0 else None
    _check_targets(texts, len(student.weight_VD))
    form = choose("loss", backend, hidden_ND)
    if form == "naive":
        whole = student.bend.logits(student.products(hidden_ND)), teacher.bend.logits(teacher.products(target_NE))
        return naive.distillation(whole[0], whole[1].detach(), weights_N, texts, asked)
    dtype, teacher_dtype = compute_dtype(hidden_ND), compute_dtype(target_NE)
    size = dtype.itemsize + teacher_dtype.itemsize
    chunks = _Chunks(
        student=student.cast(dtype),
        teacher=teacher.cast(teacher_dtype),
        hidden_ND=hidden_ND.detach().to(dtype),
        target_NE=target_NE.detach().to(teacher_dtype),
        weights_N=weights_N,
        targets_N=texts,
        rows=DistilRows(asked=asked, form=form, student=student.bend, teacher=teacher.bend),
        chunk=chunk or chunk_tokens(len(student.weight_VD), size, hidden_ND.device.type),
    )
    with torch.autocast(hidden_ND.device.type, enabled=False):  # each dtype is chosen above
        if torch.is_grad_enabled():
            return _Distillation.apply(chunks, hidden_ND, student.weight_VD, student.bias_V)
        return chunks.run((False, False, False))[0]
