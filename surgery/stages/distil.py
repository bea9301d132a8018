"""Stage 2, distillation: the whole student learns the teacher's next-token distribution by KL on every token."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from halobench.errors import UserError
from halobench.kernels.chunked_loss import chunked_loss, cross_entropy, forward_kl
from halobench.surgery.heads import final_hidden, head_parameters, unembed
from halobench.surgery.objective import Objective


def check_loss(temperature: float, ce_share: float) -> None:
    """Raises UserError for what is no temperature or no share; see Distillation."""
    if not temperature > 0:
        raise UserError(f"temperature is {temperature}; it must be above 0 (1 is the paper's)")
    if not 0 <= ce_share <= 1:
        raise UserError(f"ce_share is {ce_share}; it is a share from 0 (KL alone) to 1 (text alone)")


class Distillation(Objective):
    """Objective: mean over all tokens of (1 - share) T^2 KL(teacher || student) + share CE(next token).

    Every token counts alike, as in the paper, whose form is T = 1 and share = 0. The teacher is frozen and not saved.

    Args:
        student: trains whole.
        teacher: any causal language model with the same vocabulary.
        temperature: T, by which both logits are divided in the KL.
        ce_share: of the cross entropy with the text, 0 to 1.
    """

    def __init__(
        self, student: Any, teacher: Any, name: str = "distil", *, temperature: float = 1.0, ce_share: float = 0.0
    ) -> None:
        check_loss(temperature, ce_share)
        self.student, self.teacher, self.name = student, teacher, name
        self.temperature, self.ce_share = temperature, ce_share
        self.module = student
        self.frozen = (teacher,)
        vocabulary = teacher.config.get_text_config(decoder=True).vocab_size
        self.ceiling = math.log(vocabulary) * ((1 - ce_share) * temperature**2 + ce_share)

    def loss(self, tokens_BT: Tensor, weights_BT: Tensor) -> tuple[Tensor, Tensor]:
        """Sum over tokens of the loss (nats), and the number of tokens."""
        inputs, next_tokens = tokens_BT[:, :-1], tokens_BT[:, 1:].flatten()
        with torch.no_grad():
            target = final_hidden(self.teacher, inputs).flatten(0, 1)
        hidden = final_hidden(self.student, inputs).flatten(0, 1)
        ones = torch.ones(len(hidden), device=hidden.device)

        def chunk(hidden_ND: Tensor, part: slice) -> Tensor:
            logits = unembed(self.student, hidden_ND)
            total = logits.new_zeros((), dtype=torch.promote_types(logits.dtype, torch.float32))
            if self.ce_share < 1:
                with torch.no_grad():
                    teacher_NV = unembed(self.teacher, target[part])
                kl = forward_kl(logits, teacher_NV, ones[part], temperature=self.temperature)
                total = total + (1 - self.ce_share) * kl
            if self.ce_share > 0:
                total = total + self.ce_share * cross_entropy(logits, next_tokens[part], ones[part])
            return total

        return chunked_loss(chunk, hidden, head_parameters(self.student)), ones.sum()
