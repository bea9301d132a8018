"""Stage 2, distillation: the whole student learns the teacher's next-token distribution by KL on every token."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from halobench.kernels.chunked_loss import SoftTargets, distillation
from halobench.surgery.heads import check_head, final_hidden, head
from halobench.surgery.objective import Objective


class Distillation(Objective):
    """Objective: mean over all tokens of (1 - share) T^2 KL(teacher || student) + share CE(next token).

    Every token counts alike, as in the paper, whose form is T = 1, share = 0 and no top k. The teacher is frozen and
    not saved.

    Args:
        student: trains whole.
        teacher: any causal language model with the same vocabulary.
        temperature: T, by which both logits are divided in the KL.
        ce_share: of the cross entropy with the text, 0 to 1.
        top_k: how many of the teacher's likeliest tokens the KL tells apart, with one bucket for the rest; None is all.
        backend: the form of the loss, "auto", "triton", "torch" or "naive".

    Raises:
        UserError: the logits of either are not what the loss would make of its hidden states; see `check_head`.
    """

    def __init__(
        self,
        student: Any,
        teacher: Any,
        name: str = "distil",
        *,
        temperature: float = 1.0,
        ce_share: float = 0.0,
        top_k: int | None = None,
        backend: str = "auto",
    ) -> None:
        self.asked = SoftTargets(temperature=temperature, top_k=top_k, ce_share=ce_share)
        self.student, self.teacher, self.name, self.backend = student, teacher, name, backend
        self.module = student
        self.frozen = (teacher,)
        for model in (student, teacher):  # before either is sharded
            check_head(model)
        vocabulary = teacher.config.get_text_config(decoder=True).vocab_size
        self.ceiling = math.log(vocabulary) * ((1 - ce_share) * temperature**2 + ce_share)

    def loss(self, tokens_BT: Tensor, weights_BT: Tensor) -> tuple[Tensor, Tensor]:
        """Sum over tokens of the loss (nats), and the number of tokens."""
        inputs, next_tokens = tokens_BT[:, :-1], tokens_BT[:, 1:].flatten()
        with torch.no_grad():
            target = final_hidden(self.teacher, inputs).flatten(0, 1)
        hidden = final_hidden(self.student, inputs).flatten(0, 1)
        ones = torch.ones(len(hidden), device=hidden.device)
        total = distillation(
            head(self.student),
            head(self.teacher),
            hidden,
            target,
            ones,
            next_tokens,
            asked=self.asked,
            backend=self.backend,
        )
        return total, ones.sum()
