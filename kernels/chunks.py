"""What the chunked forms share: cutting a sequence into chunks, and handing the state from one chunk to the next.

Shapes: B batch, T tokens, H heads, K key size, V value size; G = B * H, C tokens in a chunk, N chunks; D any last size.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext

import torch
from torch import Tensor
from torch.nn import functional as F

# Bounds the memory of a chunked form at any length; large enough that the loop over superblocks costs nothing.
CHUNKS_IN_SUPERBLOCK = 16


def zero_state(k_BHK: Tensor, v_BHV: Tensor) -> Tensor:
    """The empty state (B, H, K, V), in fp32 (fp64 for fp64 inputs): sums over long ranges do not survive bf16."""
    dtype = torch.float64 if k_BHK.dtype == torch.float64 else torch.float32
    return torch.zeros(*k_BHK.shape, v_BHV.shape[-1], dtype=dtype, device=k_BHK.device)


def without_autocast(like: Tensor) -> AbstractContextManager[object]:
    """Autocast off on the tensor's device: under it, products of decays and of states would be taken in bf16."""
    device = like.device.type
    if torch.amp.is_autocast_available(device):
        return torch.autocast(device, enabled=False)
    return nullcontext()


def superblocks(inputs: Sequence[Tensor], chunk: int) -> Iterator[tuple[tuple[Tensor, ...], int]]:
    """(the inputs' share, chunk size) of each superblock; the ragged tail is a superblock of one short chunk.

    Inputs are (B, T, ...). They are split, not sliced: each slice would fill a gradient of the whole length with zeros.
    """
    tokens = inputs[0].shape[1]
    whole, step = tokens - tokens % chunk, chunk * CHUNKS_IN_SUPERBLOCK
    lengths = [min(step, whole - start) for start in range(0, whole, step)]
    if whole < tokens:
        lengths.append(tokens - whole)
    for parts in zip(*(x.split(lengths, dim=1) for x in inputs), strict=True):
        yield parts, min(chunk, parts[0].shape[1])


def padded_superblocks(inputs: Sequence[Tensor], chunk: int) -> Iterator[tuple[tuple[Tensor, ...], int]]:
    """`superblocks` whose chunk is always a power of two: `cut` fills the tail up with zeros.

    A token of zeros (key, value, write strength and log decay) takes nothing from the state and adds nothing to it.
    """
    if chunk < 1 or chunk & (chunk - 1):
        raise ValueError(f"chunk_size must be a power of two, got {chunk}")
    for parts, size in superblocks(inputs, chunk):
        yield parts, 1 << (size - 1).bit_length()


def cut(x_BTHD: Tensor, chunk: int, dtype: torch.dtype) -> Tensor:
    """(G, N, C, D) in `dtype`, the last chunk filled up with zeros."""
    # Contiguous once, here: batched products would otherwise copy it at every use.
    return _chunks(x_BTHD, chunk).to(dtype).contiguous().flatten(0, 1)


def cut_together(kinds_BTHD: Sequence[Tensor], chunk: int, dtype: torch.dtype) -> Tensor:
    """`cut` of R tensors, stacked so that a chunk's tokens of all kinds are the rows of one matrix: (G, N, R, C, D)."""
    return torch.stack([_chunks(x, chunk).to(dtype) for x in kinds_BTHD], dim=3).flatten(0, 1)


def _chunks(x_BTHD: Tensor, chunk: int) -> Tensor:
    """(B, H, N, C, D), a view where no chunk has to be filled up with zeros."""
    missing = -x_BTHD.shape[1] % chunk
    if missing:
        x_BTHD = F.pad(x_BTHD, (0, 0, 0, 0, 0, missing))
    return x_BTHD.unflatten(1, (-1, chunk)).permute(0, 3, 1, 2, 4)


def join(x_GNCD: Tensor, heads: int, tokens: int) -> Tensor:
    """The opposite of `cut`: (B, T, H, D), without what was filled up."""
    return x_GNCD.reshape(-1, heads, x_GNCD.shape[1] * x_GNCD.shape[2], x_GNCD.shape[3]).transpose(1, 2)[:, :tokens]


def hand_over(decay_GNK1: Tensor, added_GNKV: Tensor, state_GKV: Tensor) -> tuple[Tensor, Tensor]:
    """S_n = decay_n S_{n-1} + added_n over the chunks: the state before each chunk (G, N, K, V), and the last one.

    The one loop over chunks; its work is small beside that within the chunks.
    """
    before = []
    for decay_GK1, added_GKV in zip(decay_GNK1.unbind(1), added_GNKV.unbind(1), strict=True):
        before.append(state_GKV)
        state_GKV = torch.addcmul(added_GKV, state_GKV, decay_GK1)
    return torch.stack(before, dim=1), state_GKV


def hand_over_corrected(
    decay_GNK1: Tensor,
    added_GNKV: Tensor | None,
    ends_GNCK: Tensor,
    own_GNCV: Tensor,
    read_GNCK: Tensor,
    state_GKV: Tensor,
) -> tuple[Tensor, Tensor, Tensor]:
    """The hand-over when what a chunk writes depends on the state it finds, as in the delta rules:

        U_n = own_n + read_n S_{n-1}        S_n = decay_n S_{n-1} + ends_n^T U_n + added_n

    Returns U (G, N, C, V), the state before each chunk (G, N, K, V), and the last state.
    """
    before, written = [], []
    chunks = zip(*(x.unbind(1) for x in (decay_GNK1, ends_GNCK, own_GNCV, read_GNCK)), strict=True)
    added = [None] * own_GNCV.shape[1] if added_GNKV is None else added_GNKV.unbind(1)
    for (decay_GK1, ends_GCK, own_GCV, read_GCK), added_GKV in zip(chunks, added, strict=True):
        before.append(state_GKV)
        u_GCV = torch.baddbmm(own_GCV, read_GCK, state_GKV)
        kept_GKV = state_GKV * decay_GK1 if added_GKV is None else torch.addcmul(added_GKV, state_GKV, decay_GK1)
        state_GKV = torch.baddbmm(kept_GKV, ends_GCK.mT, u_GCV)
        written.append(u_GCV)
    return torch.stack(written, dim=1), torch.stack(before, dim=1), state_GKV


def add_product(x_GNCV: Tensor, left_GNCJ: Tensor, right_GNJV: Tensor) -> Tensor:
    """x + left @ right for every chunk, in one pass."""
    flat = torch.baddbmm(x_GNCV.flatten(0, 1), left_GNCJ.flatten(0, 1), right_GNJV.flatten(0, 1))
    return flat.view(x_GNCV.shape)
