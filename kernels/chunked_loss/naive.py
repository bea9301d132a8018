"""The losses by definition, on whole logits: what every faster form must equal.

Shapes: N tokens, V vocabulary. Sums and softmaxes are taken in fp32 (fp64 when the logits are).
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


def wide(logits: Tensor) -> Tensor:
    """The logits in the type that sums are taken in: fp64 stays, everything else becomes fp32."""
    return logits if logits.dtype == torch.float64 else logits.float()


def forward_kl(student_NV: Tensor, teacher_NV: Tensor, weights_N: Tensor, temperature: float = 1.0) -> Tensor:
    """Sum over tokens of weight * T^2 KL(teacher || student) in nats, both softmaxes taken of logits / T.

    HALO's stage 2 at T = 1. The factor T^2 keeps gradients of one size as T grows (Hinton et al., arXiv 1503.02531).
    Returns a scalar.
    """
    student = F.log_softmax(wide(student_NV) / temperature, -1)
    teacher = F.log_softmax(wide(teacher_NV) / temperature, -1)
    per_token = (teacher.exp() * (teacher - student)).sum(-1)
    return temperature**2 * (per_token * weights_N.to(per_token.dtype)).sum()


def cross_entropy(logits_NV: Tensor, targets_N: Tensor, weights_N: Tensor) -> Tensor:
    """Sum over tokens of weight * cross entropy in nats (HALO, stage 3). Returns a scalar."""
    per_token = F.cross_entropy(wide(logits_NV), targets_N, reduction="none")
    return (per_token * weights_N.to(per_token.dtype)).sum()
