"""The losses of naive.py a few rows of logits at a time, with their gradients written down rather than traced.

Autograd would hold five and more copies of the logits; here there are the logits, their gradient in the same dtype, and
temporaries of `BLOCK_BYTES`, whatever the vocabulary. Shapes: N tokens, R rows of a block, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from halobench.errors import UserError
from halobench.kernels.chunked_loss.naive import wide

BLOCK_BYTES = 32 << 20  # of one temporary: 55 rows of 151,936 logits, enough to keep a GPU busy

# (logits of the rows, fp32 or fp64; which rows) -> (sum of the loss, its gradient with respect to those logits)
RowsLoss = Callable[[Tensor, slice], tuple[Tensor, Tensor]]


class _SumOverRows(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, rows_loss: RowsLoss, logits_NV: Tensor) -> Tensor:
        count, vocabulary = logits_NV.shape
        total = torch.zeros((), dtype=torch.promote_types(logits_NV.dtype, torch.float32), device=logits_NV.device)
        gradient = torch.empty_like(logits_NV) if ctx.needs_input_grad[1] else None
        rows = max(1, BLOCK_BYTES // (vocabulary * total.element_size()))
        for start in range(0, count, rows):
            part = slice(start, min(start + rows, count))
            loss, slope_RV = rows_loss(wide(logits_NV[part]), part)
            total += loss
            if gradient is not None:
                gradient[part] = slope_RV
        ctx.save_for_backward(gradient)
        return total

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_total: Tensor) -> tuple[None, Tensor]:
        (gradient,) = ctx.saved_tensors
        return None, gradient * grad_total.to(gradient.dtype)


def forward_kl(student_NV: Tensor, teacher_NV: Tensor, weights_N: Tensor, temperature: float = 1.0) -> Tensor:
    """As naive.forward_kl. The gradient, weight * T (softmax(student / T) - softmax(teacher / T)), is the student's.

    Raises:
        UserError: the temperature is not above zero, or the two vocabularies differ.
    """
    if not temperature > 0:
        raise UserError(f"temperature must be above 0, got {temperature}; 1 is the plain KL")
    if student_NV.shape != teacher_NV.shape:
        raise UserError(
            f"the student's logits are {tuple(student_NV.shape)} and the teacher's {tuple(teacher_NV.shape)}; KL needs "
            "two distributions over one vocabulary"
        )

    def rows(student_RV: Tensor, part: slice) -> tuple[Tensor, Tensor]:
        log_teacher = F.log_softmax(wide(teacher_NV[part]) / temperature, -1)
        log_student = F.log_softmax(student_RV / temperature, -1)
        teacher, weights = log_teacher.exp(), weights_N[part].to(student_RV.dtype)
        per_token = log_teacher.sub_(log_student).mul_(teacher).sum(-1)
        slope = log_student.exp_().sub_(teacher).mul_((temperature * weights)[:, None])
        return temperature**2 * (per_token * weights).sum(), slope

    return _SumOverRows.apply(rows, student_NV)


def cross_entropy(logits_NV: Tensor, targets_N: Tensor, weights_N: Tensor) -> Tensor:
    """As naive.cross_entropy, every target a token of the vocabulary. Gradient: weight * (softmax - one-hot)."""

    def rows(logits_RV: Tensor, part: slice) -> tuple[Tensor, Tensor]:
        logs, targets = F.log_softmax(logits_RV, -1), targets_N[part, None]
        weights = weights_N[part, None].to(logs.dtype)
        loss = -(logs.gather(1, targets) * weights).sum()
        slope = logs.exp_().mul_(weights).scatter_add_(1, targets, -weights)
        return loss, slope

    return _SumOverRows.apply(rows, logits_NV)
