"""The losses by definition, on whole logits: what every faster form must equal.

Shapes: N tokens, V vocabulary. Sums and softmaxes are taken in fp32 (fp64 when the logits are).
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from halobench.errors import UserError


@dataclass(frozen=True, kw_only=True)
class SoftTargets:
    """What is asked of a student: (1 - ce_share) T^2 KL(teacher || student) + ce_share CE(text), of each token.

    temperature: T, by which both logits are divided in the KL. top_k: how many of the teacher's likeliest tokens the KL
    tells apart (see `forward_kl`); None is all. ce_share: of the cross entropy, 0 to 1.

    Raises:
        UserError: a temperature not above 0, a top_k below 1, or a share outside 0 to 1.
    """

    temperature: float = 1.0
    top_k: int | None = None
    ce_share: float = 0.0

    def __post_init__(self) -> None:
        if not self.temperature > 0:
            raise UserError(f"temperature must be above 0, got {self.temperature}; 1 is the plain KL")
        if self.top_k is not None and self.top_k < 1:
            raise UserError(f"top_k must be at least 1 token, got {self.top_k}; null is the whole vocabulary")
        if not 0 <= self.ce_share <= 1:
            raise UserError(f"ce_share is {self.ce_share}; it is a share from 0 (KL alone) to 1 (text alone)")

    def threshold(self, teacher_NV: Tensor) -> Tensor | None:
        """The teacher's k-th largest logit, (N, 1): the tokens from it upwards are told apart. None: all are."""
        if self.top_k is None or self.top_k >= teacher_NV.shape[-1]:
            return None
        return teacher_NV.topk(self.top_k, dim=-1, sorted=False).values.amin(-1, keepdim=True)


def wide(logits: Tensor) -> Tensor:
    """The logits in the type that sums are taken in: fp64 stays, everything else becomes fp32."""
    return logits if logits.dtype == torch.float64 else logits.float()


def remainder(logs_NV: Tensor, inside_NV: Tensor) -> Tensor:
    """Log of the probability outside `inside`, (N, 1); a finite number as good as minus infinity where that is 0."""
    return logs_NV.masked_fill(inside_NV, torch.finfo(logs_NV.dtype).min).logsumexp(-1, keepdim=True)


def forward_kl(
    student_NV: Tensor, teacher_NV: Tensor, weights_N: Tensor, temperature: float = 1.0, top_k: int | None = None
) -> Tensor:
    """Sum over tokens of weight * T^2 KL(teacher || student) in nats, both softmaxes taken of logits / T.

    HALO's stage 2 at T = 1. The factor T^2 keeps gradients of one size as T grows (Hinton et al., arXiv 1503.02531).

    With `top_k` the two distributions are over k + 1 outcomes: the teacher's k likeliest tokens, and any other token.
    That is a KL of two distributions still, never above the whole one (data processing inequality) and 0 where they
    agree; the k tokens alone are none without renormalising, which forgets how much the student puts elsewhere.
    Tokens as likely as the k-th are all told apart.

    Returns:
        a scalar.
    """
    student = F.log_softmax(wide(student_NV) / temperature, -1)
    teacher = F.log_softmax(wide(teacher_NV) / temperature, -1)
    threshold = SoftTargets(temperature=temperature, top_k=top_k).threshold(teacher_NV)
    per_token = teacher.exp() * (teacher - student)
    if threshold is not None:
        inside = teacher_NV >= threshold
        rest, student_rest = remainder(teacher, inside), remainder(student, inside)
        per_token = torch.cat([per_token * inside, rest.exp() * (rest - student_rest)], -1)
    return temperature**2 * (per_token.sum(-1) * weights_N.to(per_token.dtype)).sum()


def cross_entropy(logits_NV: Tensor, targets_N: Tensor, weights_N: Tensor) -> Tensor:
    """Sum over tokens of weight * cross entropy in nats (HALO, stage 3). Returns a scalar."""
    per_token = F.cross_entropy(wide(logits_NV), targets_N, reduction="none")
    return (per_token * weights_N.to(per_token.dtype)).sum()


def distillation(
    student_NV: Tensor, teacher_NV: Tensor, weights_N: Tensor, targets_N: Tensor | None, asked: SoftTargets
) -> Tensor:
    """Sum over tokens of weight * what `asked` says. targets_N: the text's tokens; None where ce_share is 0."""
    kl = forward_kl(student_NV, teacher_NV, weights_N, asked.temperature, asked.top_k)
    if targets_N is None:
        return kl
    return (1 - asked.ce_share) * kl + asked.ce_share * cross_entropy(student_NV, targets_N, weights_N)
