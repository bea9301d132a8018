"""What the chunked forms share: cutting a sequence into chunks, and handing the state from one chunk to the next.

Shapes: B batch, T tokens, H heads, K key size, V value size; G = B * H, C tokens in a chunk, N chunks; D any last size.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

# A superblock bounds the memory of a chunked form at any length. It has so many chunks that the loop over superblocks
# costs nothing: at least 16, and where heads are few and small as many as make tensors of this many numbers, beyond
# which a CPU's caches overflow.
CHUNKS_IN_SUPERBLOCK = 16
NUMBERS_IN_SUPERBLOCK = 2**17


def starting_state(k_BTHK: Tensor, v_BTHV: Tensor, given_BHKV: Tensor | None) -> Tensor:
    """The given state, or zeros (B, H, K, V), in fp32 (fp64 for fp64 inputs): long sums do not survive bf16."""
    dtype = torch.float64 if k_BTHK.dtype == torch.float64 else torch.float32
    if given_BHKV is not None:
        return given_BHKV.to(dtype)
    batch, _, heads, key = k_BTHK.shape
    return torch.zeros(batch, heads, key, v_BTHV.shape[-1], dtype=dtype, device=k_BTHK.device)


def without_autocast(like: Tensor) -> AbstractContextManager[object]:
    """Autocast off on the tensor's device: under it, products of decays and of states would be taken in bf16."""
    device = like.device.type
    if torch.amp.is_autocast_available(device):
        return torch.autocast(device, enabled=False)
    return nullcontext()


def superblocks(
    inputs: Sequence[Tensor], chunk: int, chunks: int | None = None
) -> Iterator[tuple[tuple[Tensor, ...], int]]:
    """(the inputs' share, chunk size) of each superblock; the ragged tail is a superblock of one short chunk.

    Inputs are (B, T, ...). They are split, not sliced: each slice would fill a gradient of the whole length with zeros.

    Args:
        chunks: in a superblock; by default at least CHUNKS_IN_SUPERBLOCK.
    """
    tokens = inputs[0].shape[1]
    if chunks is None:
        chunks = max(CHUNKS_IN_SUPERBLOCK, NUMBERS_IN_SUPERBLOCK * tokens // max(1, inputs[0].numel() * chunk))
    whole, step = tokens - tokens % chunk, chunk * chunks
    lengths = [min(step, whole - start) for start in range(0, whole, step)]
    if whole < tokens:
        lengths.append(tokens - whole)
    for parts in zip(*(x.split(lengths, dim=1) for x in inputs), strict=True):
        yield parts, min(chunk, parts[0].shape[1])


def chunks_in_cache(x_BTHD: Tensor, chunk: int) -> int:
    """Chunks whose tokens are as many bytes as NUMBERS_IN_SUPERBLOCK in fp32: a CPU's caches hold several such."""
    batch, _, heads, size = x_BTHD.shape
    return max(1, 4 * NUMBERS_IN_SUPERBLOCK // (batch * chunk * heads * size * x_BTHD.element_size()))


def padded_superblocks(inputs: Sequence[Tensor], chunk: int) -> Iterator[tuple[tuple[Tensor, ...], int]]:
    """`superblocks` whose chunk is always a power of two: `cut` fills the tail up with zeros.

    A token of zeros (key, value, write strength and log decay) takes nothing from the state and adds nothing to it.
    """
    if chunk < 1 or chunk & (chunk - 1):
        raise ValueError(f"chunk_size must be a power of two, got {chunk}")
    for parts, size in superblocks(inputs, chunk):
        yield parts, 1 << (size - 1).bit_length()


def cut(x_BTHD: Tensor, chunk: int, dtype: torch.dtype) -> Tensor:
    """(N, G, C, D) in `dtype`, the last chunk filled up with zeros."""
    # Contiguous once, here: batched products would otherwise copy it at every use. Chunks first, for the hand-over.
    return in_chunks(x_BTHD, chunk).to(dtype).contiguous().flatten(1, 2)


def cut_together(kinds_BTHD: Sequence[Tensor], chunk: int, dtype: torch.dtype) -> Tensor:
    """`cut` of R tensors, stacked so that a chunk's tokens of all kinds are the rows of one matrix: (N, G, R, C, D)."""
    return torch.stack([in_chunks(x, chunk).to(dtype) for x in kinds_BTHD], dim=3).flatten(1, 2)


def in_chunks(x_BTHD: Tensor, chunk: int) -> Tensor:
    """(N, B, H, C, D), a view where no chunk has to be filled up with zeros."""
    missing = -x_BTHD.shape[1] % chunk
    if missing:
        x_BTHD = F.pad(x_BTHD, (0, 0, 0, 0, 0, missing))
    return x_BTHD.unflatten(1, (-1, chunk)).permute(1, 0, 3, 2, 4)


def join(x_NGCD: Tensor, heads: int, tokens: int) -> Tensor:
    """The opposite of `cut`: (B, T, H, D), without what was filled up."""
    return x_NGCD.unflatten(1, (-1, heads)).permute(1, 0, 3, 2, 4).flatten(1, 2)[:, :tokens]


def hand_over(decay_NGK1: Tensor, added_NGKV: Tensor, state_GKV: Tensor) -> tuple[Tensor, Tensor]:
    """S_n = decay_n S_{n-1} + added_n over the chunks: the state before each chunk (N, G, K, V), and the last one.

    The one loop over chunks; its work is small beside that within the chunks.
    """
    before = []
    for decay_GK1, added_GKV in zip(decay_NGK1.unbind(), added_NGKV.unbind(), strict=True):
        before.append(state_GKV)
        state_GKV = torch.addcmul(added_GKV, state_GKV, decay_GK1)
    return torch.stack(before), state_GKV


class _CorrectedHandOver(torch.autograd.Function):
    """The loop of `hand_over_corrected`, in place, and the same loop backwards.

    A step is a few tiny products, so what autograd and new tensors cost at each would be most of it.
    """

    @staticmethod
    def forward(
        ctx: Any, decay: Tensor, added: Tensor | None, ends: Tensor, own: Tensor, read: Tensor, state: Tensor
    ) -> tuple[Tensor, Tensor]:
        written = own.clone(memory_format=torch.contiguous_format)
        states = state.new_empty(own.shape[0] + 1, *state.shape)
        if added is None:
            states[0] = state
        else:
            torch.cat((state[None], added), out=states)
        steps = zip(*(x.unbind() for x in (decay, ends, read, written)), strict=True)
        before, *after = states.unbind()
        for (decay_n, ends_n, read_n, u_n), after_n in zip(steps, after, strict=True):
            u_n.baddbmm_(read_n, before)
            if added is None:
                torch.mul(before, decay_n, out=after_n)
            else:
                after_n.addcmul_(before, decay_n)
            before = after_n.baddbmm_(ends_n.mT, u_n)
        ctx.save_for_backward(decay, ends, read, written, states)
        ctx.has_added = added is not None
        return written, states

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, d_written: Tensor, d_states: Tensor) -> tuple[Tensor | None, ...]:
        decay, ends, read, written, states = ctx.saved_tensors
        d_written, d_states = (x.clone(memory_format=torch.contiguous_format) for x in (d_written, d_states))
        with without_autocast(states):
            steps = zip(*(x.unbind() for x in (decay, ends, read, d_written)), strict=True)
            *d_before, d_after = d_states.unbind()
            for (decay_n, ends_n, read_n, d_u), d_earlier in zip(
                reversed(list(steps)), reversed(d_before), strict=True
            ):
                d_u.baddbmm_(ends_n, d_after)
                d_after = d_earlier.addcmul_(d_after, decay_n).baddbmm_(read_n.mT, d_u)
            before, d_after = states[:-1], d_states[1:]
            d_decay = (before * d_after).sum(-1, keepdim=True).sum_to_size(decay.shape)
            d_ends, d_read = written @ d_after.mT, d_written @ before.mT
        return d_decay, d_after if ctx.has_added else None, d_ends, d_written, d_read, d_states[0]


def hand_over_corrected(
    decay_NGK1: Tensor,
    added_NGKV: Tensor | None,
    ends_NGCK: Tensor,
    own_NGCV: Tensor,
    read_NGCK: Tensor,
    state_GKV: Tensor,
) -> tuple[Tensor, Tensor, Tensor]:
    """The hand-over when what a chunk writes depends on the state it finds, as in the delta rules:

        U_n = own_n + read_n S_{n-1}        S_n = decay_n S_{n-1} + ends_n^T U_n + added_n

    Returns U (N, G, C, V), the state before each chunk (N, G, K, V), and the last state.
    """
    written, states = _CorrectedHandOver.apply(decay_NGK1, added_NGKV, ends_NGCK, own_NGCV, read_NGCK, state_GKV)
    return written, states[:-1], states[-1]


def add_product(x_NGCV: Tensor, left_NGCJ: Tensor, right_NGJV: Tensor) -> Tensor:
    """x + left @ right for every chunk, in one pass."""
    flat = torch.baddbmm(*(x.flatten(0, -3) for x in (x_NGCV, left_NGCJ, right_NGJV)))
    return flat.view(x_NGCV.shape)
