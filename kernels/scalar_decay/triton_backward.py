"""Triton kernels of the gradients: dq walks a segment forwards with the state, the others backwards with its gradient.

    dq_i = scale (sum_{j<=i} exp(b_i - b_j) (do_i . v_j) k_j + exp(b_i) do_i S^T)
    dk_j = scale  sum_{i>=j} exp(b_i - b_j) (do_i . v_j) q_i + exp(b_C - b_j) v_j dS^T
    dv_j = scale  sum_{i>=j} exp(b_i - b_j) (q_i . k_j) do_i + exp(b_C - b_j) k_j dS

S is the state before the chunk and dS the gradient in the state after it.

The gradient of a log decay g_t is the sum of p_ij = do_i . (what token j adds to o_i) over all pairs j < t <= i: the
decays between which t stands. By where i and j lie, with the chunk of t in the middle:

    both in the chunk              running sums of rows and columns of p
    j before, i in the chunk       the sum of q_i . dq_i from before the chunk, over i >= t in the chunk
    j in the chunk, i after        the sum of v_j . dv_j from after the chunk, over j < t in the chunk
    j before, i after              X = exp(b_C) <S, dS>, one number a chunk

X is not a product of two states, which never meet: it is carried from chunk to chunk. With A what the chunk adds to the
state and D what it adds to the gradient, the pairs over its end are Y = <exp(b_C) S + A, dS>, and those over its start
<S, exp(b_C) dS + D>; so X = Y - <A, dS>, and the chunk before has Y = X + <S, D>. Taken with the very A and D that the
kernels add (as rounded), these hold to fp32 rounding. The usual reverse sum of q . dq - k . dk over the whole sequence
instead gathers bf16's rounding errors.
"""

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
    store_tile,
    store_transposed,
    token_offset,
    weighted,
)


@triton.jit
def query_gradients(
    q, k, v, do, log_decay, starts, dq, dg, crossings, table, tokens, per_sequence, heads, scale,
    K: tl.constexpr, V: tl.constexpr, BK: tl.constexpr, BV: tl.constexpr, CHUNK: tl.constexpr, SEGMENT: tl.constexpr,
    PACKED: tl.constexpr, PER_TOKEN: tl.constexpr, STARTED: tl.constexpr, DECAYS: tl.constexpr,
):  # fmt: skip
    """dq of a segment; with DECAYS also the first part of their gradient, and <S, D> of each chunk in `crossings`."""
    program = tl.program_id(0)
    n, head = program // heads, program % heads
    begin, end, _, _, _ = segment_at(n, table, tokens, per_sequence, SEGMENT, PACKED)
    rate = 0.0 if PER_TOKEN else tl.load(log_decay + head) * LOG2E
    place = tl.arange(0, CHUNK)
    state_KV = tl.zeros((BK, BV), tl.float32)
    if STARTED:
        at, real = state_tile(starts + state_offset(n, head, heads, K, V), K, V, BK, BV)
        state_KV = tl.load(at, mask=real, other=0.0)
    chunks = (end - begin + CHUNK - 1).to(tl.int32) // CHUNK
    for c in tl.range(0, chunks):
        token = begin + c * CHUNK
        b, whole = chunk_decay(log_decay, rate, token, end, head, heads, CHUNK, PER_TOKEN)
        k_CK = load_tile(k, token, end, head, heads, K, BK, CHUNK)
        v_CV = load_tile(v, token, end, head, heads, V, BV, CHUNK)
        do_CV = load_tile(do, token, end, head, heads, V, BV, CHUNK)
        from_start = tl.exp2(b) * scale
        dq_KC = tl.dot(state_KV.to(do_CV.dtype), tl.trans(do_CV), input_precision=PRECISION) * from_start[None, :]
        if DECAYS:
            q_CK = load_tile(q, token, end, head, heads, K, BK, CHUNK)
            from_before = tl.sum(tl.trans(q_CK).to(tl.float32) * dq_KC, 0)
            decays = dg + token_offset(token, heads, 1) + head + place * heads
            after = tl.sum(from_before, 0) - tl.cumsum(from_before, 0) + from_before
            tl.store(decays, after, mask=place < (end - token).to(tl.int32))
            added_KV = tl.dot(tl.trans(q_CK), weighted(do_CV, from_start), input_precision=PRECISION)
            crossing = tl.sum(tl.sum(state_KV * added_KV, 1), 0)
            tl.store(crossings + (n.to(tl.int64) * (SEGMENT // CHUNK) + c) * heads + head, crossing)
        pairs_ji = tl.dot(v_CV, tl.trans(do_CV), input_precision=PRECISION) * pair_decay(b, scale, True, CHUNK)
        dq_KC = tl.dot(tl.trans(k_CK), pairs_ji.to(k_CK.dtype), dq_KC, input_precision=PRECISION)
        store_transposed(dq, dq_KC, token, end, head, heads, K, BK, CHUNK)
        state_KV = add_outer(state_KV, k_CK, v_CV, tl.exp2(whole - b), whole)


@triton.jit
def key_value_gradients(
    q, k, v, do, log_decay, d_ends, dk, dv, table, tokens, per_sequence, heads, scale,
    K: tl.constexpr, V: tl.constexpr, BK: tl.constexpr, BV: tl.constexpr, CHUNK: tl.constexpr, SEGMENT: tl.constexpr,
    PACKED: tl.constexpr, PER_TOKEN: tl.constexpr, ENDED: tl.constexpr,
):  # fmt: skip
    """dk and dv of a segment from the gradient in the state after it, `d_ends` (zero unless ENDED)."""
    program = tl.program_id(0)
    n, head = program // heads, program % heads
    begin, end, _, _, _ = segment_at(n, table, tokens, per_sequence, SEGMENT, PACKED)
    rate = 0.0 if PER_TOKEN else tl.load(log_decay + head) * LOG2E
    d_state = tl.zeros((BK, BV), tl.float32)
    if ENDED:
        at, real = state_tile(d_ends + state_offset(n, head, heads, K, V), K, V, BK, BV)
        d_state = tl.load(at, mask=real, other=0.0)
    chunks = (end - begin + CHUNK - 1).to(tl.int32) // CHUNK
    for c in tl.range(0, chunks):
        token = begin + (chunks - 1 - c) * CHUNK
        b, whole = chunk_decay(log_decay, rate, token, end, head, heads, CHUNK, PER_TOKEN)
        q_CK = load_tile(q, token, end, head, heads, K, BK, CHUNK)
        k_CK = load_tile(k, token, end, head, heads, K, BK, CHUNK)
        v_CV = load_tile(v, token, end, head, heads, V, BV, CHUNK)
        do_CV = load_tile(do, token, end, head, heads, V, BV, CHUNK)
        to_end = tl.exp2(whole - b)
        d_rounded = d_state.to(q_CK.dtype)

        pairs_ij = tl.dot(do_CV, tl.trans(v_CV), input_precision=PRECISION) * pair_decay(b, scale, False, CHUNK)
        dk_KC = tl.dot(d_rounded, tl.trans(v_CV), input_precision=PRECISION) * to_end[None, :]
        dk_KC = tl.dot(tl.trans(q_CK), pairs_ij.to(q_CK.dtype), dk_KC, input_precision=PRECISION)
        store_transposed(dk, dk_KC, token, end, head, heads, K, BK, CHUNK)

        # Two products and a sum: one product onto the other would make Triton take both on half of the warps.
        scores_ji = tl.dot(k_CK, tl.trans(q_CK), input_precision=PRECISION) * pair_decay(b, 1.0, True, CHUNK)
        dv_CV = tl.dot(scores_ji.to(do_CV.dtype), do_CV, input_precision=PRECISION) * scale
        dv_CV += tl.dot(k_CK, d_rounded, input_precision=PRECISION) * to_end[:, None]
        store_tile(dv, dv_CV, token, end, head, heads, V, BV, CHUNK)

        d_state = add_outer(d_state, q_CK, do_CV, tl.exp2(b) * scale, whole)


@triton.jit
def decay_gradients(
    q, k, v, do, log_decay, starts, finals, d_ends, dg, crossings, table, tokens, per_sequence, heads, scale,
    K: tl.constexpr, V: tl.constexpr, BK: tl.constexpr, BV: tl.constexpr, CHUNK: tl.constexpr, SEGMENT: tl.constexpr,
    PACKED: tl.constexpr, PER_TOKEN: tl.constexpr, STARTED: tl.constexpr, ENDED: tl.constexpr,
):  # fmt: skip
    """Adds to dg what the queries' walk has not: the second walk of a segment with the gradient of the state.

    A kernel of its own, for dk, dv and this one's matrices together do not fit the registers.

    Args:
        starts, finals: the state before each segment, and the last of each sequence.
        dg, crossings: as `query_gradients` left them.
    """
    program = tl.program_id(0)
    n, head = program // heads, program % heads
    begin, end, sequence, _, last = segment_at(n, table, tokens, per_sequence, SEGMENT, PACKED)
    place = tl.arange(0, CHUNK)
    d_state = tl.zeros((BK, BV), tl.float32)
    over_end = 0.0  # Y
    if ENDED:
        at, real = state_tile(d_ends + state_offset(n, head, heads, K, V), K, V, BK, BV)
        d_state = tl.load(at, mask=real, other=0.0)
        at, real = state_tile(finals + state_offset(sequence, head, heads, K, V), K, V, BK, BV)
        state = tl.load(at, mask=real & (last != 0), other=0.0)
        if STARTED:
            at, real = state_tile(starts + state_offset(n + 1, head, heads, K, V), K, V, BK, BV)
            state += tl.load(at, mask=real & (last == 0) & (begin < end), other=0.0)
        over_end = tl.sum(tl.sum(state * d_state, 1), 0)
    chunks = (end - begin + CHUNK - 1).to(tl.int32) // CHUNK
    for c in tl.range(0, chunks):
        token = begin + (chunks - 1 - c) * CHUNK
        b, whole = chunk_decay(log_decay, 0.0, token, end, head, heads, CHUNK, PER_TOKEN)
        q_CK = load_tile(q, token, end, head, heads, K, BK, CHUNK)
        k_CK = load_tile(k, token, end, head, heads, K, BK, CHUNK)
        v_CV = load_tile(v, token, end, head, heads, V, BV, CHUNK)
        do_CV = load_tile(do, token, end, head, heads, V, BV, CHUNK)
        to_end = tl.exp2(whole - b)

        both_ij = tl.dot(do_CV, tl.trans(v_CV), input_precision=PRECISION) * pair_decay(b, scale, False, CHUNK)
        both_ij *= tl.dot(q_CK, tl.trans(k_CK), input_precision=PRECISION)
        within = tl.sum(both_ij, 1) - tl.sum(both_ij, 0)
        d_values = tl.dot(k_CK, d_state.to(k_CK.dtype), input_precision=PRECISION) * to_end[:, None]
        from_after = tl.sum(v_CV.to(tl.float32) * d_values, 1)
        added_KV = tl.dot(tl.trans(k_CK), weighted(v_CV, to_end), input_precision=PRECISION)
        across = over_end - tl.sum(tl.sum(d_state * added_KV, 1), 0)  # X

        own = tl.sum(within, 0) - tl.cumsum(within, 0) + within + tl.cumsum(from_after, 0) - from_after
        decays = dg + token_offset(token, heads, 1) + head + place * heads
        present = place < (end - token).to(tl.int32)
        tl.store(decays, tl.load(decays, mask=present, other=0.0) + own + across, mask=present)
        chunk = n.to(tl.int64) * (SEGMENT // CHUNK) + chunks - 1 - c
        over_end = across + tl.load(crossings + chunk * heads + head)
        d_state = add_outer(d_state, q_CK, do_CV, tl.exp2(b) * scale, whole)
