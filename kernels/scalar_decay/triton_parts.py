"""What the Triton kernels of the operator share: segments, tiles, decays of a chunk, products.

Tokens of all sequences lie in one row of N tokens, (N, H, K): a batch is sequences of one length. A program works on
one segment of one head. Offsets of tokens and of states are int64; only those inside a chunk are int32.

On Hopper, Triton 3.4 to 3.7.0 miscompiles a product whose left operand is the transpose of another product's result.
The kernels transpose only what they loaded and its elementwise multiples; where the other orientation of a result is
needed, the product itself is taken the other way round.
"""

# mypy: allow-untyped-defs
# What a kernel is given are Triton's values, which have no Python types.

from __future__ import annotations

import triton
import triton.language as tl

# The columns of the table that `segments_of` makes for packed sequences.
COLUMNS = tl.constexpr(5)
LOG2E = tl.constexpr(1.4426950408889634)
# Of products of fp32 operands: Triton's default is TF32. Those of bf16 are exact, with an fp32 sum.
PRECISION = tl.constexpr("ieee")


@triton.jit
def token_offset(token, heads, size):
    """Where a token's numbers start in (N, H, size): int64, for N * H * size passes 2^31 at long contexts."""
    return token.to(tl.int64) * heads * size


@triton.jit
def state_offset(index, head, heads, K: tl.constexpr, V: tl.constexpr):
    """Where a state starts in (segments or sequences, H, K, V), int64."""
    return (index.to(tl.int64) * heads + head) * (K * V)


@triton.jit
def segment_at(n, table, tokens, per_sequence, SEGMENT: tl.constexpr, PACKED: tl.constexpr):
    """Segment n: its first token, the token after its last, its sequence, and whether it is that one's first, last."""
    if PACKED:
        row = table + n.to(tl.int64) * COLUMNS
        begin = tl.load(row)
        end = tl.load(row + 1)
        sequence = tl.load(row + 2)
        first = tl.load(row + 3)
        last = tl.load(row + 4)
    else:
        sequence = (n // per_sequence).to(tl.int64)
        place = (n % per_sequence).to(tl.int64)
        begin = sequence * tokens + place * SEGMENT
        end = tl.minimum(begin + SEGMENT, (sequence + 1) * tokens)
        first = (place == 0).to(tl.int64)
        last = (place == per_sequence - 1).to(tl.int64)
    return begin, end, sequence, first, last


@triton.jit
def chunk_decay(log_decay, rate, token, end, head, heads, CHUNK: tl.constexpr, PER_TOKEN: tl.constexpr):
    """The decay (log2, fp32) summed over a chunk up to and with each of its tokens, and over all of it."""
    place = tl.arange(0, CHUNK)
    real = (end - token).to(tl.int32)
    if PER_TOKEN:
        at = log_decay + token_offset(token, heads, 1) + head + place * heads
        each = tl.load(at, mask=place < real, other=0.0) * LOG2E
        upto, whole = tl.cumsum(each, 0), tl.sum(each, 0)
    else:
        upto = rate * tl.minimum(place + 1, real).to(tl.float32)
        whole = rate * tl.minimum(CHUNK, real).to(tl.float32)
    return upto, whole


@triton.jit
def pair_decay(b, scale, TRANSPOSED: tl.constexpr, CHUNK: tl.constexpr):
    """scale * exp2(b_i - b_j) for j <= i, else zero: (i, j), or (j, i) if TRANSPOSED."""
    place = tl.arange(0, CHUNK)
    if TRANSPOSED:
        apart = tl.where(place[:, None] <= place[None, :], b[None, :] - b[:, None], float("-inf"))
    else:
        apart = tl.where(place[:, None] >= place[None, :], b[:, None] - b[None, :], float("-inf"))
    return tl.exp2(apart) * scale


@triton.jit
def tile_offsets(heads, SIZE: tl.constexpr, BLOCK: tl.constexpr, CHUNK: tl.constexpr):
    """Offsets of a chunk's tokens (C, BLOCK) of one head from its first number."""
    return tl.arange(0, CHUNK)[:, None] * (heads * SIZE) + tl.arange(0, BLOCK)[None, :]


@triton.jit
def tile_mask(token, end, SIZE: tl.constexpr, BLOCK: tl.constexpr, CHUNK: tl.constexpr):
    """Which numbers of a tile exist."""
    real = tl.arange(0, CHUNK)[:, None] < (end - token).to(tl.int32)
    if SIZE != BLOCK:
        real = real & (tl.arange(0, BLOCK)[None, :] < SIZE)
    return real


@triton.jit
def load_tile(x, token, end, head, heads, SIZE: tl.constexpr, BLOCK: tl.constexpr, CHUNK: tl.constexpr):
    """A chunk's tokens of one head of x (N, H, SIZE) as (C, BLOCK), filled up with zeros."""
    at = x + (token_offset(token, heads, SIZE) + head * SIZE) + tile_offsets(heads, SIZE, BLOCK, CHUNK)
    return tl.load(at, mask=tile_mask(token, end, SIZE, BLOCK, CHUNK), other=0.0)


@triton.jit
def store_transposed(x, tile, token, end, head, heads, SIZE: tl.constexpr, BLOCK: tl.constexpr, CHUNK: tl.constexpr):
    """The opposite of `load_tile` for a tile (BLOCK, C), in x's dtype."""
    at = x + (token_offset(token, heads, SIZE) + head * SIZE) + tl.trans(tile_offsets(heads, SIZE, BLOCK, CHUNK))
    mask = tl.trans(tile_mask(token, end, SIZE, BLOCK, CHUNK))
    tl.store(at, tile.to(x.dtype.element_ty), mask=mask)


@triton.jit
def store_tile(x, tile, token, end, head, heads, SIZE: tl.constexpr, BLOCK: tl.constexpr, CHUNK: tl.constexpr):
    """The opposite of `load_tile`, in x's dtype."""
    at = x + (token_offset(token, heads, SIZE) + head * SIZE) + tile_offsets(heads, SIZE, BLOCK, CHUNK)
    tl.store(at, tile.to(x.dtype.element_ty), mask=tile_mask(token, end, SIZE, BLOCK, CHUNK))


@triton.jit
def state_tile(x, K: tl.constexpr, V: tl.constexpr, BK: tl.constexpr, BV: tl.constexpr):
    """Pointers to a state at x as (BK, BV), and which of them exist."""
    row, column = tl.arange(0, BK)[:, None], tl.arange(0, BV)[None, :]
    return x + row * V + column, (row < K) & (column < V)


@triton.jit
def transposed_state_tile(x, K: tl.constexpr, V: tl.constexpr, BK: tl.constexpr, BV: tl.constexpr):
    """`state_tile` as (BV, BK)."""
    row, column = tl.arange(0, BK)[None, :], tl.arange(0, BV)[:, None]
    return x + row * V + column, (row < K) & (column < V)


@triton.jit
def add_outer(state, left, right, weight, whole):
    """exp2(whole) state + left^T (weight right) over a chunk's tokens: one chunk's step of either recurrence."""
    return tl.dot(tl.trans(left), weighted(right, weight), state * tl.exp2(whole), input_precision=PRECISION)


@triton.jit
def weighted(x, weight):
    """The rows of x by one fp32 factor each, rounded to x's dtype: an operand of a product."""
    return (x.to(tl.float32) * weight[:, None]).to(x.dtype)
