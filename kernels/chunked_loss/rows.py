"""The losses of naive.py a few rows of logits at a time, with their gradients written down rather than traced.

Autograd would hold five and more copies of the logits; here there are the logits, their gradient in the same dtype (in
their place, where the caller says so), and temporaries of `BLOCK_BYTES`, whatever the vocabulary.
Shapes: N tokens, R rows of a block, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from halobench.errors import HalobenchError, UserError
from halobench.kernels.backend import choose
from halobench.kernels.chunked_loss import naive
from halobench.kernels.chunked_loss.head import Bend
from halobench.kernels.chunked_loss.naive import SoftTargets, remainder, wide

# Of one temporary, by device: 55 rows of 151,936 logits keep a GPU busy; a CPU is as fast with 6.
BLOCK_BYTES = {"cuda": 32 << 20, "cpu": 4 << 20}

# (logits of the rows, fp32 or fp64; which rows) -> (sum of the loss, its gradient with respect to those logits)
RowsLoss = Callable[[Tensor, slice], tuple[Tensor, Tensor]]
# (logits; where their gradient goes, which may be the logits themselves, or None) -> sum of the loss
Writer = Callable[[Tensor, Tensor | None], Tensor]


def by_blocks(rows_loss: RowsLoss, logits_NV: Tensor, gradient_NV: Tensor | None) -> Tensor:
    """The sum of a loss over all rows; its gradient is written to `gradient_NV`, which may be `logits_NV` itself."""
    count, vocabulary = logits_NV.shape
    total = torch.zeros((), dtype=torch.promote_types(logits_NV.dtype, torch.float32), device=logits_NV.device)
    room = BLOCK_BYTES.get(logits_NV.device.type, BLOCK_BYTES["cuda"])
    rows = max(1, room // (vocabulary * total.element_size()))
    for start in range(0, count, rows):
        part = slice(start, min(start + rows, count))
        loss, slope_RV = rows_loss(wide(logits_NV[part]), part)
        total += loss
        if gradient_NV is not None:
            gradient_NV[part] = slope_RV
    return total


class _SumOverRows(torch.autograd.Function):
    """A writer made differentiable. The gradient is not put in the logits' place: another loss may read them."""

    @staticmethod
    def forward(ctx: Any, write: Writer, logits_NV: Tensor) -> Tensor:
        gradient = logits_NV.new_empty(logits_NV.shape) if ctx.needs_input_grad[1] else None  # rows contiguous
        total = write(logits_NV, gradient)
        ctx.save_for_backward(gradient)
        return total

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_total: Tensor) -> tuple[None, Tensor]:
        (gradient,) = ctx.saved_tensors
        return None, gradient * grad_total.to(gradient.dtype)


@dataclass(frozen=True, kw_only=True)
class DistilRows:
    """Distillation on rows of products (logits before the bend), in the form named "torch" or "triton"."""

    asked: SoftTargets
    form: str
    student: Bend = field(default_factory=Bend)
    teacher: Bend = field(default_factory=Bend)

    def __post_init__(self) -> None:
        if self.form not in ("torch", "triton"):
            raise HalobenchError(f"the rows of the loss have no form {self.form}; they have torch and triton")

    def __call__(
        self,
        student_NV: Tensor,
        teacher_NV: Tensor,
        weights_N: Tensor,
        targets_N: Tensor | None,
        gradient_NV: Tensor | None,
    ) -> Tensor:
        """As naive.distillation; the gradient in the student's products goes to `gradient_NV`, or into their place.

        The KL's gradient in the logits is weight * T (softmax(student / T) - softmax(teacher / T)). With a top k, the
        teacher shares its remainder out as the student does: the KL and its gradient are those of such a teacher.
        """
        if self.form == "triton":  # imported here: a machine without a GPU may have no Triton
            from halobench.kernels.chunked_loss.triton_rows import distil_rows

            return distil_rows(self, student_NV, teacher_NV, weights_N, targets_N, gradient_NV)

        def rows(products_RV: Tensor, part: slice) -> tuple[Tensor, Tensor]:
            logits, weights = self.student.logits(products_RV), weights_N[part, None].to(products_RV.dtype)
            loss, slope = self._kl(logits, teacher_NV[part], weights)
            if targets_N is not None:
                share = self.asked.ce_share
                text, text_slope = _text_rows(logits, targets_N[part, None], weights)
                loss = loss.mul_(1 - share).add_(text, alpha=share)
                slope = slope.mul_(1 - share).add_(text_slope, alpha=share)
            return loss, self.student.pull(slope, logits)

        return by_blocks(rows, student_NV, gradient_NV)

    def _kl(self, student_RV: Tensor, teacher_products_RV: Tensor, weights_R1: Tensor) -> tuple[Tensor, Tensor]:
        """(sum, gradient in the logits) of the KL over a block of rows."""
        temperature = self.asked.temperature
        log_teacher = _log_softmax(self.teacher.logits(wide(teacher_products_RV)), temperature)
        log_student = _log_softmax(student_RV, temperature)
        threshold = self.asked.threshold(teacher_products_RV)
        if threshold is not None:
            inside = teacher_products_RV >= threshold
            shift = remainder(log_teacher, inside) - remainder(log_student, inside)
            log_teacher = torch.where(inside, log_teacher, log_student + shift)
        teacher = log_teacher.exp()
        per_token = log_teacher.sub_(log_student).mul_(teacher).sum(-1, keepdim=True)
        slope = log_student.exp_().sub_(teacher).mul_(temperature * weights_R1)
        return temperature**2 * (per_token * weights_R1).sum(), slope


def _log_softmax(logits: Tensor, temperature: float) -> Tensor:
    return F.log_softmax(logits if temperature == 1 else logits / temperature, -1)


def _text_rows(logits_RV: Tensor, targets_R1: Tensor, weights_R1: Tensor) -> tuple[Tensor, Tensor]:
    """(sum, gradient) of the cross entropy over a block of rows."""
    logs = F.log_softmax(logits_RV, -1)
    loss = -(logs.gather(1, targets_R1) * weights_R1).sum()
    return loss, logs.exp_().mul_(weights_R1).scatter_add_(1, targets_R1, -weights_R1)


def check_same_vocabulary(student: tuple[int, ...], teacher: tuple[int, ...]) -> None:
    """Raises UserError unless the logits of student and teacher have one shape."""
    if student != teacher:
        raise UserError(
            f"the student's logits are {student} and the teacher's {teacher}; KL needs two distributions over one "
            "vocabulary"
        )


def forward_kl(
    student_NV: Tensor,
    teacher_NV: Tensor,
    weights_N: Tensor,
    temperature: float = 1.0,
    top_k: int | None = None,
    backend: str = "auto",
) -> Tensor:
    """As naive.forward_kl, differentiable in the student's logits, by the form that `choose` gives.

    Raises:
        UserError: what is no temperature, top_k or backend, or two vocabularies that differ.
    """
    check_same_vocabulary(tuple(student_NV.shape), tuple(teacher_NV.shape))
    form = choose("loss", backend, student_NV)
    if form == "naive":
        return naive.forward_kl(student_NV, teacher_NV, weights_N, temperature, top_k)
    rows = DistilRows(asked=SoftTargets(temperature=temperature, top_k=top_k), form=form)
    return _SumOverRows.apply(
        lambda logits_NV, gradient_NV: rows(logits_NV, teacher_NV, weights_N, None, gradient_NV), student_NV
    )


def cross_entropy(logits_NV: Tensor, targets_N: Tensor, weights_N: Tensor) -> Tensor:
    """As naive.cross_entropy, every target a token of the vocabulary. Gradient: weight * (softmax - one-hot)."""

    def rows(logits_RV: Tensor, part: slice) -> tuple[Tensor, Tensor]:
        return _text_rows(logits_RV, targets_N[part, None], weights_N[part, None].to(logits_RV.dtype))

    return _SumOverRows.apply(lambda logits_NV, gradient_NV: by_blocks(rows, logits_NV, gradient_NV), logits_NV)
