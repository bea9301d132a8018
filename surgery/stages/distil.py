"""Stage 2, distillation: the whole student learns the teacher's next-token distribution by KL on every token."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from halobench.kernels.chunked_loss import chunked_loss, forward_kl
from halobench.surgery.heads import final_hidden, head_parameters, unembed
from halobench.surgery.stages.language import embedding_ids


class Distillation:
    """Objective: mean over all tokens of KL(teacher || student). The teacher is frozen and not saved.

    Args:
        student: trains whole.
        teacher: any causal language model with the same vocabulary.
    """

    def __init__(self, student: Any, teacher: Any, name: str = "distil") -> None:
        self.student, self.teacher, self.name = student, teacher, name

    def parameters(self) -> list[tuple[str, nn.Parameter]]:
        """Every parameter of the student."""
        return [(n, p) for n, p in self.student.named_parameters() if p.requires_grad]

    def embeddings(self) -> frozenset[int]:
        """See embedding_ids."""
        return embedding_ids(self.student)

    def loss(self, tokens_BT: Tensor, weights_BT: Tensor) -> tuple[Tensor, Tensor]:
        """Sum over tokens of KL (nats) and the number of tokens. Every token counts alike, as in the paper."""
        inputs = tokens_BT[:, :-1]
        with torch.no_grad():
            target = final_hidden(self.teacher, inputs).flatten(0, 1)
        hidden = final_hidden(self.student, inputs).flatten(0, 1)
        ones = torch.ones(len(hidden), device=hidden.device)

        def chunk(hidden_ND: Tensor, part: slice) -> Tensor:
            with torch.no_grad():
                teacher_NV = unembed(self.teacher, target[part])
            return forward_kl(unembed(self.student, hidden_ND), teacher_NV, ones[part])

        return chunked_loss(chunk, hidden, head_parameters(self.student)), ones.sum()
