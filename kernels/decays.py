"""Sums of products under decay, safe for any decay.

The products within a chunk are A_ij = sum_c r_ic k_jc exp(g_{j+1,c} + ... + g_ic) for j <= i. With one decay for all
channels the exponentials stand outside the sum. With one per channel they must be split between row and column, and
the usual split exp(b_i) exp(-b_j) overflows. Secondary chunking (Gated Linear Attention, arXiv 2312.06635) splits at a
token m between them instead, exp(b_i - b_m) exp(b_m - b_j), both at most 1. Here it is carried to its end: the chunk is
halved, the halves are halved, and so on; the block below the diagonal at each level is one matrix product that splits
at its corner. The decays to and from the corners of all levels are products of those of the level below.

Where all chunks decay so mildly that the usual split cannot overflow it is taken, on a CPU: it is twice as fast.

Shapes: Z = N * G chunks of C tokens, a power of two; R and S kinds of rows and of columns that share the decays
(a query and a key, say); K key size, D = K or 1.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

from halobench.kernels.chunks import without_autocast
from halobench.kernels.triangular import half_blocks

# The largest decay (log) over a chunk whose inverse is taken: exp(20) leaves fp32 room for any product, and a sum of
# decays of this size is rounded to 1e-6, which is what the token loop loses in as many products.
MILD = 20.0
# Decays (log) below these leave nothing that the dtype holds beside a token's own values: exp(-40) is 4e-18 and
# exp(-80) 2e-35. Far lower ones would take the digits of the sums that they are part of, and -inf would make them NaN.
LOWEST = {torch.float32: -40.0, torch.float64: -80.0}


@dataclass(frozen=True, kw_only=True, eq=False)
class Pairs:
    """Decayed products of every chunk, and its rows and columns decayed to the chunk's ends (no factor exceeds 1)."""

    scores_RCSC: Tensor  # A, zero for j > i: (N, G, R, C, S, C), in the rows' dtype
    from_start_RCK: Tensor  # rows under the decay from the chunk's start up to and with their token
    to_end_SCK: Tensor  # columns under the decay after their token to the chunk's end
    whole_D1: Tensor  # decay of the whole chunk: (N, G, D, 1)


def decayed_pairs(rows_RCK: Tensor, columns_SCK: Tensor, log_decay_CD: Tensor) -> Pairs:
    """A_ij = sum_c r_ic k_jc exp(sum of g_c over the tokens j+1 ... i), for j <= i, within each chunk.

    Where no chunk decays by more than exp(-MILD), A is one product, of r_i exp(b_i) and k_j exp(-b_j). That is found by
    looking at the decays, which on a GPU would wait for it: there the forms that hold for any decay are taken.

    Args:
        rows_RCK, columns_SCK: (N, G, R, C, K) and (N, G, S, C, K); C is a power of two for decays of each channel.
        log_decay_CD: g, at most 0, in the state's dtype: (N, G, C, K), or (N, G, C, 1) for one decay of all channels.
    """
    looked_at = log_decay_CD.device.type == "cpu" and rows_RCK.dtype != torch.float16  # exp(MILD) overflows in fp16
    if looked_at and bool(log_decay_CD.detach().sum(-2).amin() > -MILD):
        return _pairs_where_mild(rows_RCK, columns_SCK, log_decay_CD)
    if log_decay_CD.shape[-1] > 1:
        return _pairs_by_halves(rows_RCK, columns_SCK, log_decay_CD)
    return _pairs_of_one_decay(rows_RCK, columns_SCK, bounded_decay(log_decay_CD, log_decay_CD.dtype))


def _pairs_where_mild(rows_RCK: Tensor, columns_SCK: Tensor, log_decay_CD: Tensor) -> Pairs:
    """No chunk decays by more than exp(-MILD); one decay or one of each channel."""
    b_CD, dtype, chunk = log_decay_CD.cumsum(-2), rows_RCK.dtype, log_decay_CD.shape[-2]
    from_start_1CD, whole_D1 = b_CD.exp()[:, :, None], b_CD[..., -1, :, None].exp()
    rows = (rows_RCK * from_start_1CD).to(dtype)
    columns = columns_SCK * from_start_1CD.reciprocal()
    causal_C1C = torch.ones(chunk, chunk, dtype=dtype, device=b_CD.device).tril()[:, None]
    return Pairs(
        scores_RCSC=_products(rows, columns.to(dtype)) * causal_C1C,
        from_start_RCK=rows,
        to_end_SCK=(columns * whole_D1.mT[:, :, None]).to(dtype),
        whole_D1=whole_D1,
    )


def _pairs_of_one_decay(rows_RCK: Tensor, columns_SCK: Tensor, log_decay_C1: Tensor) -> Pairs:
    """A bounded decay of all channels: the exponentials stand outside the sum over channels."""
    b_C = log_decay_C1.squeeze(-1).cumsum(-1)
    after_C = F.pad(log_decay_C1.squeeze(-1)[..., 1:], (0, 1)).flip(-1).cumsum(-1).flip(-1)
    products = _products(rows_RCK, columns_SCK)
    return Pairs(
        scores_RCSC=products * lower_exp(b_C).to(products.dtype)[:, :, None, :, None],
        from_start_RCK=(rows_RCK * b_C.exp()[:, :, None, :, None]).to(rows_RCK.dtype),
        to_end_SCK=(columns_SCK * after_C.exp()[:, :, None, :, None]).to(columns_SCK.dtype),
        whole_D1=b_C[..., -1, None, None].exp(),
    )


def _products(rows_RCK: Tensor, columns_SCK: Tensor) -> Tensor:
    """Every row by every column of its chunk: (N, G, R, C, S, C)."""
    flat = rows_RCK.flatten(2, 3) @ columns_SCK.flatten(2, 3).mT
    return flat.view(*rows_RCK.shape[:-1], *columns_SCK.shape[2:4])


def _pairs_by_halves(rows_RCK: Tensor, columns_SCK: Tensor, log_decay_CK: Tensor) -> Pairs:
    """Any decay of each channel: see the top of this file."""
    lead = rows_RCK.shape[:2]
    flat = (x.flatten(0, 1) for x in (rows_RCK.transpose(2, 3), columns_SCK.transpose(2, 3), log_decay_CK))
    scores, from_start, to_end = (x.unflatten(0, lead) for x in _ChannelPairs.apply(*flat))
    return Pairs(
        scores_RCSC=scores.permute(0, 1, 3, 2, 5, 4),
        from_start_RCK=(rows_RCK * from_start[:, :, None]).to(rows_RCK.dtype),
        to_end_SCK=(columns_SCK * to_end[:, :, None]).to(columns_SCK.dtype),
        whole_D1=log_decay_CK.sum(-2).exp()[..., None],
    )


def bounded_decay(log_decay: Tensor, dtype: torch.dtype) -> Tensor:
    """The log decay in fp32 or fp64, no lower than matters there; the gradient is zero below."""
    return log_decay.to(dtype).clamp(min=LOWEST[dtype])


def lower_exp(sums_L: Tensor) -> Tensor:
    """exp(sum_i - sum_j) for j <= i, else 0. Masked before exp: above the diagonal the exponent is positive."""
    length = sums_L.shape[-1]
    above = torch.ones(length, length, dtype=torch.bool, device=sums_L.device).triu(1)
    return (sums_L[..., :, None] - sums_L[..., None, :]).masked_fill(above, -torch.inf).exp()


def _halves(x: Tensor, blocks: int) -> tuple[Tensor, Tensor]:
    """Views of the first and the second half of each block: (Z * M, h, ...) of x (Z, C, ...)."""
    cut = x.view(x.shape[0] * blocks, 2, x.shape[1] // (2 * blocks), *x.shape[2:])
    return cut[:, 0], cut[:, 1]


class _Factors:
    """The decays of every level, from single tokens up: `levels` walks them, and leaves those of the whole chunk."""

    def __init__(self, log_decay_ZCK: Tensor) -> None:
        self.from_start_ZCK = log_decay_ZCK.exp()
        self.to_end_ZCK = torch.ones_like(self.from_start_ZCK)

    def levels(self) -> Iterator[tuple[int, Tensor, Tensor]]:
        """(M, from the corner to each row, from each column to the corner); both (Z * M, h, 1, K), valid until next."""
        blocks = self.from_start_ZCK.shape[1] // 2
        while blocks:
            (early_from, late_from), (early_to, _) = (
                _halves(x, blocks) for x in (self.from_start_ZCK, self.to_end_ZCK)
            )
            yield blocks, late_from[:, :, None], early_to[:, :, None]
            early_to *= late_from[:, -1:]
            late_from *= early_from[:, -1:]
            blocks //= 2


def _corner_rows(x_ZCRK: Tensor, blocks: int, half: int, factor: Tensor) -> Tensor:
    """One half's rows (or columns) brought to the corner by their factor: (Z * M, h * R, K)."""
    return (_halves(x_ZCRK, blocks)[half] * factor).to(x_ZCRK.dtype).flatten(1, 2)


class _ChannelPairs(torch.autograd.Function):
    """Scores, from_start and to_end for a decay of each channel; recomputes the levels in the backward pass."""

    @staticmethod
    def forward(ctx: Any, rows: Tensor, columns: Tensor, log_decay: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        rows, columns = rows.contiguous(), columns.contiguous()
        (chunks, size, kinds, _), kinds_S = rows.shape, columns.shape[2]
        scores = rows.new_zeros(chunks, size, kinds, size, kinds_S)
        scores.diagonal(dim1=1, dim2=3).copy_((rows @ columns.mT).permute(0, 2, 3, 1))
        matrices = scores.view(chunks, size * kinds, size * kinds_S)
        factors = _Factors(log_decay)
        for blocks, from_corner, to_corner in factors.levels():
            left = _corner_rows(rows, blocks, 1, from_corner)
            right = _corner_rows(columns, blocks, 0, to_corner)
            below = half_blocks(matrices, blocks, 1, 0)
            below.copy_((left @ right.mT).view(below.shape))
        ctx.save_for_backward(rows, columns, log_decay)
        return scores, factors.from_start_ZCK, factors.to_end_ZCK

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, d_scores: Tensor, d_from: Tensor, d_to: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """With b the summed decay: dr_i = sum_j dA_ij k_j exp(b_i - b_j), d b_i = r_i dr_i, d b_j = - k_j dk_j."""
        rows, columns, log_decay = ctx.saved_tensors
        (chunks, size, kinds, _), kinds_S = rows.shape, columns.shape[2]
        d_rows, d_columns = (torch.zeros_like(x, dtype=log_decay.dtype) for x in (rows, columns))
        matrices = d_scores.contiguous().view(chunks, size * kinds, size * kinds_S)
        factors = _Factors(log_decay)
        with without_autocast(rows):
            for blocks, from_corner, to_corner in factors.levels():
                left = _corner_rows(rows, blocks, 1, from_corner)
                right = _corner_rows(columns, blocks, 0, to_corner)
                below = half_blocks(matrices, blocks, 1, 0).flatten(0, 1)
                late_rows, early_columns = _halves(d_rows, blocks)[1], _halves(d_columns, blocks)[0]
                late_rows.addcmul_((below @ right).view(late_rows.shape).to(late_rows.dtype), from_corner)
                early_columns.addcmul_((below.mT @ left).view(early_columns.shape).to(early_columns.dtype), to_corner)
            d_sums = (rows * d_rows).sum(2) - (columns * d_columns).sum(2) + factors.from_start_ZCK * d_from
            d_after = factors.to_end_ZCK * d_to
            # b sums the decays up to a token, so each decay gathers all later sums; to_end sums those after a token.
            d_log_decay = d_sums.flip(1).cumsum(1).flip(1) + (d_after.cumsum(1) - d_after)
            diagonal = d_scores.diagonal(dim1=1, dim2=3).permute(0, 3, 1, 2)
            d_rows += diagonal @ columns
            d_columns += diagonal.mT @ rows
        return d_rows.to(rows.dtype), d_columns.to(columns.dtype), d_log_decay
