"""Training on text alone: pre-training the embedded teacher, and HALO's stage 3 at long context."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from halobench.kernels.chunked_loss import chunked_loss, cross_entropy
from halobench.surgery.heads import final_hidden, head_parameters, unembed
from halobench.surgery.objective import Objective


class LanguageModelling(Objective):
    """Objective: next-token cross entropy, each target with its own weight; every parameter of the model trains."""

    def __init__(self, model: Any, name: str) -> None:
        self.model, self.name = model, name
        self.module = model

    def loss(self, tokens_BT: Tensor, weights_BT: Tensor) -> tuple[Tensor, Tensor]:
        """Sum of weight * cross entropy (nats), and the sum of the weights."""
        hidden = final_hidden(self.model, tokens_BT[:, :-1]).flatten(0, 1)
        targets, weights = tokens_BT[:, 1:].flatten(), weights_BT[:, 1:].flatten()

        def chunk(hidden_ND: Tensor, part: slice) -> Tensor:
            return cross_entropy(unembed(self.model, hidden_ND), targets[part], weights[part])

        return chunked_loss(chunk, hidden, head_parameters(self.model)), weights.sum()
