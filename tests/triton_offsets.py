"""A kernel that only computes where the scalar decay's kernels read and write, for a test of sizes no memory holds."""

from __future__ import annotations

import triton
import triton.language as tl

from halobench.kernels.scalar_decay.triton_parts import state_offset, token_offset


@triton.jit
def offsets(out, token, heads, index, K: tl.constexpr):
    """The offsets of a token's numbers and of head 3's state, whose indices are 32-bit integers in memory."""
    tl.store(out, token_offset(tl.load(token), heads, K))
    tl.store(out + 1, state_offset(tl.load(index), 3, heads, K, K))
