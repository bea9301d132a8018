"""The losses by definition, on whole logits: what every faster form must equal.

Shapes: N tokens, V vocabulary. Sums and softmaxes are taken in fp32 (fp64 when the logits are).
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


def _wide(logits: Tensor) -> Tensor:
    return logits if logits.dtype == torch.float64 else logits.float()


def forward_kl(student_NV: Tensor, teacher_NV: Tensor, weights_N: Tensor) -> Tensor:
    """Sum over tokens of weight * KL(teacher || student) in nats (HALO, stage 2). Returns a scalar."""
    student, teacher = F.log_softmax(_wide(student_NV), -1), F.log_softmax(_wide(teacher_NV), -1)
    per_token = (teacher.exp() * (teacher - student)).sum(-1)
    return torch.dot(per_token, weights_N.to(per_token.dtype))


def cross_entropy(logits_NV: Tensor, targets_N: Tensor, weights_N: Tensor) -> Tensor:
    """Sum over tokens of weight * cross entropy in nats (HALO, stage 3). Returns a scalar."""
    per_token = F.cross_entropy(_wide(logits_NV), targets_N, reduction="none")
    return torch.dot(per_token, weights_N.to(per_token.dtype))
