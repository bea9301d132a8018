"""The recurrence as batched matrix products: fast on any device, no loop over tokens.

The sequence is cut into chunks of C tokens. With b_i the decay (log) summed over the chunk up to token i:

    within a chunk      o_i  = sum_{j<=i} exp(b_i - b_j) (q_i . k_j) v_j
    from before it      o_i += exp(b_i) q_i S
    what it leaves      S'   = exp(b_C) S + sum_j exp(b_C - b_j) k_j^T v_j

All chunks of a superblock are multiplied at once, in buffers that the next superblock writes again: on a CPU they stay
in its caches, and memory beyond the output is bounded at any length. The gradients are written out below and run the
same way, from the last superblock to the first; of the forward pass they need the scores and the states.
Exponents are fp32 (fp64 for fp64 inputs) and at most 0, so that nothing overflows, and bf16 never holds a decay
product. b_i - b_j is a difference of two sums and as exact as the larger: decays are bounded below (`bounded_decay`).
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from halobench.kernels.chunks import chunks_in_cache, in_chunks, starting_state, superblocks, without_autocast
from halobench.kernels.decays import bounded_decay, lower_exp


def scalar_decay_chunked(
    q_BTHK: Tensor,
    k_BTHK: Tensor,
    v_BTHV: Tensor,
    log_decay: Tensor,
    *,
    scale: float,
    initial_state_BHKV: Tensor | None = None,
    chunk_size: int = 64,
) -> tuple[Tensor, Tensor]:
    """S_t = exp(g_t) S_{t-1} + k_t^T v_t, o_t = scale q_t S_t, in chunks.

    Args:
        log_decay: g, at most 0: (H,) the same at every token, or (B, T, H) for each token.
        scale: factor on the output, usually 1 / sqrt(K).
        initial_state_BHKV: the state before the first token; zeros by default.
        chunk_size: tokens in a chunk; any T is accepted, a last shorter chunk is computed as it is.

    Returns:
        o_BTHV in the dtype of q, and the state after the last token (fp32, or fp64 for fp64 inputs).
    """
    state = starting_state(k_BTHK, v_BTHV, initial_state_BHKV)
    decay = bounded_decay(log_decay, state.dtype)
    tensors = (q_BTHK, k_BTHK.to(q_BTHK.dtype), v_BTHV.to(q_BTHK.dtype), decay, state)
    traced = torch.is_grad_enabled() and any(x.requires_grad for x in tensors)
    o_BTHV, last_BHKV = _ScalarDecay.apply(*tensors, scale, chunk_size, traced)
    return o_BTHV, last_BHKV


@dataclass(frozen=True, kw_only=True, eq=False)
class _Decays:
    """Factors of one superblock, broadcastable to (N, B, H, ...); all but the scale in [0, 1]."""

    within_CC: Tensor  # scale exp(b_i - b_j), zero above the diagonal; in the products' dtype, as the next two
    from_start_C1: Tensor  # scale exp(b_i)
    to_end_C1: Tensor  # exp(b_C - b_j)
    whole_N11: Tensor  # exp(b_C) of each chunk, in the state's dtype


@dataclass(frozen=True, kw_only=True, eq=False)
class _Part:
    """One superblock: where it stands, its tokens and its factors."""

    span: slice
    q_BTHK: Tensor
    k_BTHK: Tensor
    v_BTHV: Tensor
    chunk: int
    decays: _Decays


class _Buffers:
    """Tensors by name, (N, B, H, rows, columns), in one dtype, that live as long as superblocks have one shape."""

    def __init__(self, dtype: torch.dtype) -> None:
        self.dtype = dtype
        self.lead: tuple[int, ...] = ()
        self.chunk = 0
        self._held: dict[str, Tensor] = {}

    def begin(self, part: _Part) -> None:
        """To be called at each superblock: forgets what has another shape."""
        batch, tokens, heads, _ = part.q_BTHK.shape
        lead = tokens // part.chunk, batch, heads
        if self.lead != lead or self.chunk != part.chunk:
            self.lead, self.chunk, self.like, self._held = lead, part.chunk, part.q_BTHK, {}

    def empty(self, name: str, rows: int, columns: int) -> Tensor:
        """A buffer, not filled."""
        if name not in self._held:
            self._held[name] = self.like.new_empty(*self.lead, rows, columns, dtype=self.dtype)
        return self._held[name]

    def tokens(self, name: str, x_BTHD: Tensor) -> Tensor:
        """A buffer that holds the tokens of x."""
        return self.empty(name, self.chunk, x_BTHD.shape[-1]).copy_(in_chunks(x_BTHD, self.chunk))

    def scaled(self, name: str, x: Tensor, factor: Tensor) -> Tensor:
        """A buffer that holds x * factor."""
        return torch.mul(x, factor, out=self.empty(name, *x.shape[-2:]))

    def product(self, name: str, left: Tensor, right: Tensor) -> Tensor:
        """A buffer that holds left @ right."""
        out = self.empty(name, left.shape[-2], right.shape[-1])
        torch.bmm(left.flatten(0, 2), right.flatten(0, 2), out=out.flatten(0, 2))
        return out

    def hand_out(self, *names: str) -> list[Tensor]:
        """Buffers that shall not be written again."""
        return [self._held.pop(name) for name in names]

    def states(self, name: str, state_BHKV: Tensor) -> Tensor:
        """A buffer for the states before and after each chunk, in the state's dtype."""
        if name not in self._held:
            self._held[name] = state_BHKV.new_empty(self.lead[0] + 1, *state_BHKV.shape)
        return self._held[name]


def _add_product(x: Tensor, left: Tensor, right: Tensor) -> Tensor:
    """x += left @ right for every chunk."""
    x.flatten(0, 2).baddbmm_(left.flatten(0, 2), right.flatten(0, 2))
    return x


def _parts(
    inputs: Sequence[Tensor],
    log_decay: Tensor,
    state: Tensor,
    scale: float,
    size: int,
    dtype: torch.dtype,
    *,
    last_first: bool = False,
) -> Iterator[_Part]:
    """The superblocks of (q, k, v), with factors in `dtype`.

    A constant decay's factors are built once for all but the superblock with the tail.
    """
    by_token = [log_decay] if log_decay.ndim == 3 else []
    chunks = chunks_in_cache(inputs[0], size) if state.device.type == "cpu" else None
    cut = list(superblocks([*inputs, *by_token], size, chunks))
    ends = list(accumulate(parts[0].shape[1] for parts, _ in cut))
    decays, built = None, 0
    for (parts, chunk), end in list(zip(cut, ends, strict=True))[:: -1 if last_first else 1]:
        q, k, v, *g_BTH = parts
        if g_BTH:
            decays = _factors(in_chunks(g_BTH[0][..., None], chunk).squeeze(-1).to(state.dtype), scale, dtype)
        elif decays is None or built != chunk:
            decays, built = _factors(log_decay.to(state.dtype)[:, None].expand(-1, chunk), scale, dtype), chunk
        span = slice(end - q.shape[1], end)
        yield _Part(span=span, q_BTHK=q, k_BTHK=k, v_BTHV=v, chunk=chunk, decays=decays)


def _factors(g_NC: Tensor, scale: float, dtype: torch.dtype) -> _Decays:
    """From the log decays in the state's dtype, (N, B, H, C) or, the same for all chunks, (H, C)."""
    b_NC = g_NC.cumsum(-1)
    return _Decays(
        within_CC=(lower_exp(b_NC) * scale).to(dtype),
        from_start_C1=(b_NC.exp() * scale).to(dtype)[..., None],
        to_end_C1=(b_NC[..., -1:] - b_NC).exp().to(dtype)[..., None],
        whole_N11=b_NC[..., -1, None, None].exp(),
    )


def _states(part: _Part, buffers: _Buffers, k: Tensor, v: Tensor, state_BHKV: Tensor) -> Tensor:
    """The states before and after each chunk, (N + 1, B, H, K, V), from keys under the decay to their chunk's end."""
    added = buffers.product("added", k.mT, v).to(state_BHKV.dtype)
    states = buffers.states("states", state_BHKV)
    states[0].copy_(state_BHKV)
    whole = part.decays.whole_N11.expand(*buffers.lead, 1, 1)
    for n in range(buffers.lead[0]):
        torch.addcmul(added[n], states[n], whole[n], out=states[n + 1])
    return states


def _outputs(part: _Part, buffers: _Buffers, state_BHKV: Tensor, o_BTHV: Tensor) -> Tensor:
    """Writes the outputs of one superblock; the state at its end."""
    buffers.begin(part)
    decays = part.decays
    q, k, v = (buffers.tokens(*named) for named in (("q", part.q_BTHK), ("k", part.k_BTHK), ("v", part.v_BTHV)))
    scores = buffers.product("scores", q, k.mT).mul_(decays.within_CC)
    states = _states(part, buffers, k.mul_(decays.to_end_C1), v, state_BHKV)
    o = buffers.product("o", q.mul_(decays.from_start_C1), states[:-1].to(q.dtype))
    in_chunks(o_BTHV[:, part.span], part.chunk).copy_(_add_product(o, scores, v))
    return states[-1].clone()


@dataclass(frozen=True, kw_only=True, eq=False)
class _Gradients:
    """Of the whole sequence, filled superblock by superblock; log_decay is None where it is not wanted."""

    q_BTHK: Tensor
    k_BTHK: Tensor
    v_BTHV: Tensor
    log_decay_BTH: Tensor | None


def _gradients(
    part: _Part,
    buffers: _Buffers,
    scores: Tensor,
    states: Tensor,
    d_o_BTHV: Tensor,
    d_last_BHKV: Tensor,
    into: _Gradients,
) -> Tensor:
    """Writes the gradients of one superblock; the gradient of the state at its start.

    That of g_t is the sum over all pairs j < t <= i of what token j adds to the loss through token i: of pairs in the
    chunk, of q_i . dq_i from before the chunk, of k_j . dk_j from after it, and <S, dS'> for those that pass over it.
    The usual sum of q . dq - k . dk subtracts nearly equal numbers where decays are strong.
    """
    buffers.begin(part)
    decays, dtype = part.decays, buffers.dtype
    q, k, v = (buffers.tokens(*named) for named in (("q", part.q_BTHK), ("k", part.k_BTHK), ("v", part.v_BTHV)))
    d_o = buffers.tokens("d_o", d_o_BTHV[:, part.span])
    if scores.dtype != dtype:
        scores = buffers.product("scores", q, k.mT).mul_(decays.within_CC)
    d_scores = buffers.product("d_scores", d_o, v.mT)
    d_decays = None if into.log_decay_BTH is None else _decays_of_pairs(scores, d_scores)
    d_scores.mul_(decays.within_CC)
    d_q, d_k = buffers.product("d_q", d_scores, k), buffers.product("d_k", d_scores.mT, q)
    d_v = buffers.product("d_v", scores.mT, d_o)
    q_start = buffers.scaled("q_start", q, decays.from_start_C1)
    read = buffers.product("read", q_start.mT, d_o).to(states.dtype)
    d_states = buffers.states("d_states", d_last_BHKV)
    d_states[-1].copy_(d_last_BHKV)
    whole = decays.whole_N11.expand(*buffers.lead, 1, 1)
    for n in reversed(range(buffers.lead[0])):
        torch.addcmul(read[n], d_states[n + 1], whole[n], out=d_states[n])
    before, d_after = states[:-1].to(dtype), d_states[1:].to(dtype)
    d_q_before, d_k_after = buffers.product("d_q_before", d_o, before.mT), buffers.product("d_k_after", v, d_after.mT)
    d_q.addcmul_(d_q_before, decays.from_start_C1)
    d_k.addcmul_(d_k_after, decays.to_end_C1)
    k_end = buffers.scaled("k_end", k, decays.to_end_C1)
    _add_product(d_v, k_end, d_after)
    for whole_BTHD, d_x in ((into.q_BTHK, d_q), (into.k_BTHK, d_k), (into.v_BTHV, d_v)):
        in_chunks(whole_BTHD[:, part.span], part.chunk).copy_(d_x)
    if into.log_decay_BTH is not None and d_decays is not None:
        d_decays += _from((q_start * d_q_before).sum(-1))
        from_after = (k_end * d_k_after).sum(-1)
        d_decays += from_after.cumsum(-1) - from_after
        d_decays += ((states[:-1] * d_states[1:]).sum((-2, -1), keepdim=True) * whole).squeeze(-1)
        in_chunks(into.log_decay_BTH[:, part.span, :, None], part.chunk).copy_(d_decays[..., None])
    return d_states[0].clone()


def _decays_of_pairs(scores: Tensor, d_weights: Tensor) -> Tensor:
    """The share in the decays' gradient of pairs within a chunk, (N, B, H, C), from scores and d_o . v."""
    pairs = (scores * d_weights).tril_(-1)
    return _from(pairs.sum(-1) - pairs.sum(-2))


def _from(x_NC: Tensor) -> Tensor:
    """Of each token and all later ones in its chunk, the sum."""
    return x_NC.flip(-1).cumsum(-1).flip(-1)


class _ScalarDecay(torch.autograd.Function):
    """The loop over superblocks, and the same loop backwards."""

    @staticmethod
    def forward(
        ctx: Any,
        q_BTHK: Tensor,
        k_BTHK: Tensor,
        v_BTHV: Tensor,
        log_decay: Tensor,
        state: Tensor,
        scale: float,
        size: int,
        traced: bool,
    ) -> tuple[Tensor, Tensor]:
        o_BTHV = q_BTHK.new_empty(*q_BTHK.shape[:3], v_BTHV.shape[-1])
        buffers, kept, last = _Buffers(q_BTHK.dtype), [], state
        with without_autocast(q_BTHK):
            for part in _parts((q_BTHK, k_BTHK, v_BTHV), log_decay, state, scale, size, q_BTHK.dtype):
                last = _outputs(part, buffers, last, o_BTHV)
                if traced:
                    kept += buffers.hand_out("scores", "states")
        ctx.save_for_backward(q_BTHK, k_BTHK, v_BTHV, log_decay, *kept)
        ctx.scale, ctx.size = scale, size
        return o_BTHV, last

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, d_o: Tensor, d_last: Tensor) -> tuple[Tensor | None, ...]:
        q, k, v, log_decay, *kept = ctx.saved_tensors
        d_decay = q.new_empty(q.shape[:3], dtype=d_last.dtype) if ctx.needs_input_grad[3] else None
        into = _Gradients(
            q_BTHK=q.new_empty(q.shape), k_BTHK=k.new_empty(k.shape), v_BTHV=v.new_empty(v.shape), log_decay_BTH=d_decay
        )
        # The decays' gradient is a small sum of large numbers of either sign: its products are not taken in bf16.
        dtype = q.dtype if d_decay is None else d_last.dtype
        buffers = _Buffers(dtype)
        with without_autocast(q):
            for part in _parts((q, k, v), log_decay, d_last, ctx.scale, ctx.size, dtype, last_first=True):
                states, scores = kept.pop(), kept.pop()
                d_last = _gradients(part, buffers, scores, states, d_o, d_last, into)
        if d_decay is not None:
            d_decay = (d_decay.sum((0, 1)) if log_decay.ndim == 1 else d_decay).to(log_decay.dtype)
        return into.q_BTHK, into.k_BTHK, into.v_BTHV, d_decay, d_last, None, None, None
