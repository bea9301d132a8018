"""What turns hidden states into logits, as the losses need it: a matrix, and what a family does to its products.

Shapes: N tokens, D width, V vocabulary.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor

from halobench.errors import UserError


@dataclass(frozen=True, kw_only=True)
class Bend:
    """What follows the product with the unembedding: logits = cap * tanh(scale * product / cap).

    scale: the family's own. cap: Gemma's soft cap; None is none.
    """

    scale: float = 1.0
    cap: float | None = None

    def __post_init__(self) -> None:
        if not self.scale > 0 or (self.cap is not None and not self.cap > 0):
            raise UserError(f"the scale and the cap of logits must be above 0, got {self.scale} and {self.cap}")

    def logits(self, products: Tensor) -> Tensor:
        """The logits of products; the very same tensor where there is nothing to do."""
        scaled = products if self.scale == 1 else products * self.scale
        return scaled if self.cap is None else self.cap * torch.tanh(scaled / self.cap)

    def pull(self, slope: Tensor, logits: Tensor) -> Tensor:
        """The gradient in the products, from the one in the logits, which is overwritten."""
        if self.cap is not None:
            slope.mul_(1 - (logits / self.cap) ** 2)
        return slope if self.scale == 1 else slope.mul_(self.scale)


@dataclass(frozen=True, kw_only=True)
class Head:
    """An unembedding: logits_NV = bend(hidden_ND @ weight_VD^T + bias_V)."""

    weight_VD: Tensor
    bias_V: Tensor | None = None
    bend: Bend = field(default_factory=Bend)

    def products(self, hidden_ND: Tensor, out: Tensor | None = None) -> Tensor:
        """What the bend is applied to, (N, V), written into `out` where that is given (without a gradient then)."""
        if self.bias_V is None:
            return torch.mm(hidden_ND, self.weight_VD.T, out=out)
        return torch.addmm(self.bias_V, hidden_ND, self.weight_VD.T, out=out)

    def cast(self, dtype: torch.dtype) -> Head:
        """The same head in another dtype, without gradients; nothing is copied where it is in that dtype already."""
        bias = None if self.bias_V is None else self.bias_V.detach().to(dtype)
        return Head(weight_VD=self.weight_VD.detach().to(dtype), bias_V=bias, bend=self.bend)
