"""Lower-triangular matrices worked on by halves: blocks below the diagonal of 1, 2, 4, ... rows, all in one product.

Shapes: Z any number of matrices, C rows (a power of two), M = C / (2 h) blocks of h rows.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from halobench.kernels.chunks import without_autocast

# Rows of the blocks that are inverted by elimination; larger ones are put together from them.
ELIMINATED = 8


def half_blocks(x_ZCC: Tensor, blocks: int, row: int, column: int) -> Tensor:
    """A view (Z, M, h, h): of each of the M diagonal blocks of 2 h rows, the quarter in that row and column.

    Rows and columns of the matrix may differ in number by a factor, and so do those of the blocks.
    """
    matrices, rows, columns = x_ZCC.shape
    cut = x_ZCC.view(matrices, blocks, 2, rows // (2 * blocks), blocks, 2, columns // (2 * blocks))
    return cut.diagonal(dim1=1, dim2=4)[:, row, :, column].permute(0, 3, 1, 2)


def _eliminate(lower_ZCC: Tensor, size: int) -> Tensor:
    """Inverses of the diagonal blocks of `size` rows, (Z, M, size, size), by substitution column after column.

    The matrices stand in the last dimension, so a step is one operation on long vectors; as batched products, blocks
    this small would cost more in calls than in arithmetic.
    """
    blocks = lower_ZCC.unflatten(2, (-1, size)).unflatten(1, (-1, size)).diagonal(dim1=1, dim2=3)
    lower = blocks.permute(1, 2, 0, 3).contiguous()  # (size, size, Z, M)
    inverse = torch.zeros_like(lower)
    inverse.diagonal().fill_(1)
    for j in range(size - 1):
        inverse[j + 1 :, : j + 1].addcmul_(lower[j + 1 :, j : j + 1], inverse[j : j + 1, : j + 1], value=-1)
    return inverse.permute(2, 3, 0, 1)


class _UnitLowerInverse(torch.autograd.Function):
    """Inverse by halves: of ((X, 0), (L, Y)) it is ((X', 0), (-Y' L X', Y')), with ' for the inverse.

    It is substitution, ordered so that it is batched products; a series in powers of L would lose all its digits when
    keys repeat.
    """

    @staticmethod
    def forward(ctx: Any, lower_ZCC: Tensor) -> Tensor:
        size = lower_ZCC.shape[-1]
        start = min(size, ELIMINATED)
        inverse = torch.zeros_like(lower_ZCC)
        inverse.unflatten(2, (-1, start)).unflatten(1, (-1, start)).diagonal(dim1=1, dim2=3).copy_(
            _eliminate(lower_ZCC, start).permute(0, 2, 3, 1)
        )
        blocks = size // (2 * start)
        while blocks:
            corner = half_blocks(inverse, blocks, 1, 1) @ half_blocks(lower_ZCC, blocks, 1, 0)
            half_blocks(inverse, blocks, 1, 0).copy_((corner @ half_blocks(inverse, blocks, 0, 0)).neg_())
            blocks //= 2
        ctx.save_for_backward(inverse)
        return inverse

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient_ZCC: Tensor) -> Tensor:
        (inverse,) = ctx.saved_tensors
        with without_autocast(inverse):
            return -(inverse.mT @ gradient_ZCC @ inverse.mT).tril(-1)


def unit_lower_inverse(lower_NCC: Tensor) -> Tensor:
    """(I + L)^-1 for strictly lower-triangular L (..., C, C), C a power of two, in L's dtype (give it fp32)."""
    size = lower_NCC.shape[-1]
    flat: Tensor = _UnitLowerInverse.apply(lower_NCC.reshape(-1, size, size))
    return flat.view(lower_NCC.shape)
