"""Lower-triangular matrices worked on by halves: blocks below the diagonal of 1, 2, 4, ... rows, all in one product.

Shapes: Z any number of matrices, C rows (a power of two), M = C / (2 h) blocks of h rows.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from halobench.kernels.chunks import without_autocast


def half_blocks(x_ZCC: Tensor, blocks: int, row: int, column: int) -> Tensor:
    """A view (Z, M, h, h): of each of the M diagonal blocks of 2 h rows, the quarter in that row and column.

    Rows and columns of the matrix may differ in number by a factor, and so do those of the blocks.
    """
    matrices, rows, columns = x_ZCC.shape
    cut = x_ZCC.view(matrices, blocks, 2, rows // (2 * blocks), blocks, 2, columns // (2 * blocks))
    return cut.diagonal(dim1=1, dim2=4)[:, row, :, column].permute(0, 3, 1, 2)


class _UnitLowerInverse(torch.autograd.Function):
    """Inverse by halves: of ((X, 0), (L, Y)) it is ((X', 0), (-Y' L X', Y')), with ' for the inverse.

    It is substitution, ordered so that it is batched products; a series in powers of L would lose all its digits when
    keys repeat.
    """

    @staticmethod
    def forward(ctx: Any, lower_ZCC: Tensor) -> Tensor:
        size = lower_ZCC.shape[-1]
        inverse = torch.eye(size, dtype=lower_ZCC.dtype, device=lower_ZCC.device).expand_as(lower_ZCC).contiguous()
        blocks = size // 2
        while blocks:
            product = half_blocks(lower_ZCC, blocks, 1, 0)
            if blocks < size // 2:  # blocks of one row have the inverse 1
                product = half_blocks(inverse, blocks, 1, 1) @ product @ half_blocks(inverse, blocks, 0, 0)
            half_blocks(inverse, blocks, 1, 0).copy_(product.neg())
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
