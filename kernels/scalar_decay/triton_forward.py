"""Triton kernels of the forward pass, and of the states at the borders of segments in either direction."""

# mypy: allow-untyped-defs
# What a kernel is given are Triton's values, which have no Python types.

from __future__ import annotations

import triton
import triton.language as tl

from halobench.kernels.scalar_decay.triton_parts import (
    LOG2E,
    PRECISION,
    add_outer,
    chunk_decay,
    load_tile,
    pair_decay,
    segment_at,
    state_offset,
    state_tile,
    store_transposed,
    token_offset,
    transposed_state_tile,
)

# What decays below 2^-32 within a segment is not summed: it is less than fp32 resolves, even of a sum 500 times larger.
NEGLIGIBLE = tl.constexpr(-32.0)


@triton.jit
def segment_sums(
    left, right, log_decay, sums, totals, table, tokens, per_sequence, heads, scale,
    K: tl.constexpr, V: tl.constexpr, BK: tl.constexpr, BV: tl.constexpr, CHUNK: tl.constexpr, SEGMENT: tl.constexpr,
    PACKED: tl.constexpr, PER_TOKEN: tl.constexpr, REVERSE: tl.constexpr, ENDING: tl.constexpr,
):  # fmt: skip
    """What a segment adds to the state that passes through it, and its summed decay (log2).

        forward   sum_j exp(decay after j) k_j^T v_j                   to the state after it
        reverse   sum_i scale exp(decay up to and with i) q_i^T do_i   to the gradient in the state before it

    Only tokens whose factor is not negligible are read, and none of the segment that the scan ends with unless ENDING.
    """
    program = tl.program_id(0)
    n, head = program // heads, program % heads
    begin, end, _, first, last = segment_at(n, table, tokens, per_sequence, SEGMENT, PACKED)
    length = (end - begin).to(tl.int32)
    place = tl.arange(0, SEGMENT)
    rate = 0.0
    if PER_TOKEN:
        at = log_decay + token_offset(begin, heads, 1) + head + place * heads
        upto = tl.cumsum(tl.load(at, mask=place < length, other=0.0), 0) * LOG2E
        total = tl.min(upto, 0)
    else:
        rate = tl.load(log_decay + head) * LOG2E
        upto = rate * tl.minimum(place + 1, length).to(tl.float32)
        total = rate * length.to(tl.float32)
    tl.store(totals + n.to(tl.int64) * heads + head, total)
    chunks = (length + CHUNK - 1) // CHUNK
    if REVERSE:  # tokens from `low` on, before chunk `high`
        low = 0
        high = tl.minimum(chunks, (tl.sum((upto >= NEGLIGIBLE).to(tl.int32), 0) + CHUNK - 1) // CHUNK)
        if not ENDING:
            high = tl.where(first != 0, 0, high)
    else:
        low = tl.minimum(chunks, tl.sum((total - upto < NEGLIGIBLE).to(tl.int32), 0) // CHUNK)
        high = chunks
        if not ENDING:
            high = tl.where(last != 0, low, chunks)

    state = tl.zeros((BK, BV), tl.float32)
    for c in tl.range(0, high - low):
        token = begin + ((high - 1 - c) if REVERSE else (low + c)) * CHUNK
        b, whole = chunk_decay(log_decay, rate, token, end, head, heads, CHUNK, PER_TOKEN)
        x = load_tile(left, token, end, head, heads, K, BK, CHUNK)
        y = load_tile(right, token, end, head, heads, V, BV, CHUNK)
        weight = tl.exp2(b) * scale if REVERSE else tl.exp2(whole - b)
        state = add_outer(state, x, y, weight, whole)
    at, real = state_tile(sums + state_offset(n, head, heads, K, V), K, V, BK, BV)
    tl.store(at, state, mask=real)


@triton.jit
def segment_scan(
    sums, totals, given, ending, firsts, per_sequence, heads,
    STATE: tl.constexpr, BLOCK: tl.constexpr, PACKED: tl.constexpr, REVERSE: tl.constexpr, GIVEN: tl.constexpr,
    ENDING: tl.constexpr,
):  # fmt: skip
    """Turns what segments add into the state before each (reverse: the gradient in the state after each), in place.

    The scan starts from `given` (sequences, H, STATE), if GIVEN, and writes what it ends with to `ending`, if ENDING. A
    state is STATE numbers, of which a program takes BLOCK.
    """
    sequence, head = tl.program_id(0) // heads, tl.program_id(0) % heads
    if PACKED:
        first = tl.load(firsts + sequence)
        count = (tl.load(firsts + sequence + 1) - first).to(tl.int32)
    else:
        first = sequence.to(tl.int64) * per_sequence
        count = per_sequence
    at = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    real = at < STATE
    state = tl.zeros((BLOCK,), tl.float32)
    if GIVEN:
        state = tl.load(given + (sequence.to(tl.int64) * heads + head) * STATE + at, mask=real, other=0.0)
    for c in tl.range(0, count):
        n = first + ((count - 1 - c) if REVERSE else c)
        here = sums + (n * heads + head) * STATE + at
        added = tl.load(here, mask=real, other=0.0)
        decay = tl.exp2(tl.load(totals + n * heads + head))
        tl.store(here, state, mask=real)
        state = state * decay + added
    if ENDING:
        tl.store(ending + (sequence.to(tl.int64) * heads + head) * STATE + at, state, mask=real)


@triton.jit
def outputs(
    q, k, v, log_decay, starts, o, finals, table, tokens, per_sequence, heads, scale,
    K: tl.constexpr, V: tl.constexpr, BK: tl.constexpr, BV: tl.constexpr, CHUNK: tl.constexpr, SEGMENT: tl.constexpr,
    PACKED: tl.constexpr, PER_TOKEN: tl.constexpr, STARTED: tl.constexpr,
):  # fmt: skip
    """Outputs of a segment from the state before it (zero unless STARTED), and a sequence's last state.

    o_i = scale (sum_{j<=i} exp(b_i - b_j) (q_i . k_j) v_j + exp(b_i) q_i S)
    """
    program = tl.program_id(0)
    n, head = program // heads, program % heads
    begin, end, _, _, _ = segment_at(n, table, tokens, per_sequence, SEGMENT, PACKED)
    rate = 0.0 if PER_TOKEN else tl.load(log_decay + head) * LOG2E
    state_VK = tl.zeros((BV, BK), tl.float32)
    if STARTED:
        at, real = transposed_state_tile(starts + state_offset(n, head, heads, K, V), K, V, BK, BV)
        state_VK = tl.load(at, mask=real, other=0.0)
    chunks = (end - begin + CHUNK - 1).to(tl.int32) // CHUNK
    for c in tl.range(0, chunks):
        token = begin + c * CHUNK
        b, whole = chunk_decay(log_decay, rate, token, end, head, heads, CHUNK, PER_TOKEN)
        q_CK = load_tile(q, token, end, head, heads, K, BK, CHUNK)
        k_CK = load_tile(k, token, end, head, heads, K, BK, CHUNK)
        v_CV = load_tile(v, token, end, head, heads, V, BV, CHUNK)
        scores_ji = tl.dot(k_CK, tl.trans(q_CK), input_precision=PRECISION) * pair_decay(b, scale, True, CHUNK)
        o_VC = (
            tl.dot(state_VK.to(q_CK.dtype), tl.trans(q_CK), input_precision=PRECISION) * (tl.exp2(b) * scale)[None, :]
        )
        o_VC = tl.dot(tl.trans(v_CV), scores_ji.to(v_CV.dtype), o_VC, input_precision=PRECISION)
        store_transposed(o, o_VC, token, end, head, heads, V, BV, CHUNK)
        state_VK = add_outer(state_VK, v_CV, k_CK, tl.exp2(whole - b), whole)
    # Asked again, not kept in registers that the loop needs.
    _, _, sequence, _, last = segment_at(n, table, tokens, per_sequence, SEGMENT, PACKED)
    at, real = transposed_state_tile(finals + state_offset(sequence, head, heads, K, V), K, V, BK, BV)
    tl.store(at, state_VK, mask=real & (last != 0))
