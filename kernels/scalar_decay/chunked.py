"""The recurrence as batched matrix products: fast on any device, no loop over tokens.

The sequence is cut into chunks of C tokens. With b_i the decay (log) summed over the chunk up to token i:

    within a chunk      o_i  = sum_{j<=i} exp(b_i - b_j) (q_i . k_j) v_j
    from before it      o_i += exp(b_i) q_i S_prev
    what it adds        S    = sum_j exp(b_C - b_j) k_j^T v_j

The states between chunks are themselves a recurrence with one decay per chunk, solved for a superblock of chunks by one
small lower-triangular product. Only superblocks are looped over, so memory stays bounded at any length. Every exponent
is a sum of non-positive numbers, taken in fp32: nothing overflows, and bf16 never holds a decay product.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from halobench.kernels.chunks import add_product, superblocks, without_autocast, zero_state
from halobench.kernels.decays import lower_exp


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
    state = zero_state(k_BTHK[:, 0], v_BTHV[:, 0]) if initial_state_BHKV is None else initial_state_BHKV
    inputs = [x.to(q_BTHK.dtype) for x in (q_BTHK, k_BTHK, v_BTHV)]
    if log_decay.ndim == 3:
        inputs.append(log_decay)
    outputs = []
    decays: tuple[int, int] | None = None
    with without_autocast(q_BTHK):
        for (q, k, v, *token_decay), chunk in superblocks(inputs, chunk_size):
            if token_decay:
                factors = _token_decays(token_decay[0], chunk, state.dtype)
            elif decays != (q.shape[1], chunk):  # the same for every superblock but the last
                decays = (q.shape[1], chunk)
                factors = _constant_decays(log_decay, q.shape[1] // chunk, chunk, state.dtype)
            o_BTHV, state = _superblock(q, k, v, factors, scale, state)
            outputs.append(o_BTHV)
    return (outputs[0] if len(outputs) == 1 else torch.cat(outputs, dim=1)), state


@dataclass(frozen=True, kw_only=True, eq=False)
class _Decays:
    """Factors of one superblock, broadcastable to (B, H, N, ...); all in [0, 1]."""

    within_CC: Tensor  # exp(b_i - b_j), zero above the diagonal
    from_start_C1: Tensor  # exp(b_i)
    to_end_C1: Tensor  # exp(b_C - b_j)
    between_NN: Tensor  # chunk m's own sum as it stands at the end of chunk n, zero for m > n
    past_N1: Tensor  # the superblock's initial state as it stands at the end of chunk n


def _constant_decays(log_decay_H: Tensor, chunks: int, chunk: int, dtype: torch.dtype) -> _Decays:
    """Factors for a decay that is the same at every token; shapes (H, 1, ...), built once for all superblocks."""
    g_HN = log_decay_H.to(dtype)[:, None].expand(-1, chunk)
    return _factors(g_HN.cumsum(-1)[:, None], (log_decay_H.to(dtype) * chunk)[:, None].expand(-1, chunks).cumsum(-1))


def _token_decays(log_decay_BTH: Tensor, chunk: int, dtype: torch.dtype) -> _Decays:
    """Factors for a decay of each token; shapes (B, H, N, ...)."""
    batch, _, heads = log_decay_BTH.shape
    within_BHNC = log_decay_BTH.to(dtype).transpose(1, 2).reshape(batch, heads, -1, chunk).cumsum(-1)
    return _factors(within_BHNC, within_BHNC[..., -1].cumsum(-1))


def _factors(b_NC: Tensor, ends_N: Tensor) -> _Decays:
    """From b (summed decays in the chunk, (..., N, C)) and the decays summed up to each chunk's end (..., N)."""
    return _Decays(
        within_CC=lower_exp(b_NC),
        from_start_C1=b_NC.exp()[..., None],
        to_end_C1=(b_NC[..., -1:] - b_NC).exp()[..., None],
        between_NN=lower_exp(ends_N),
        past_N1=ends_N.exp()[..., None],
    )


def _superblock(
    q_BTHK: Tensor, k_BTHK: Tensor, v_BTHV: Tensor, decays: _Decays, scale: float, state_BHKV: Tensor
) -> tuple[Tensor, Tensor]:
    """Outputs of one superblock and the state at its end."""
    batch, tokens, heads, key = q_BTHK.shape
    value, dtype, chunk = v_BTHV.shape[-1], q_BTHK.dtype, decays.within_CC.shape[-1]
    chunks = tokens // chunk
    q = q_BTHK.transpose(1, 2).contiguous().view(batch, heads, chunks, chunk, key)
    k = k_BTHK.transpose(1, 2).contiguous().view(batch, heads, chunks, chunk, key)
    v = v_BTHV.transpose(1, 2).contiguous().view(batch, heads, chunks, chunk, value)

    scores_CC = (q @ k.transpose(-1, -2)) * (decays.within_CC * scale).to(dtype)
    added_KV = ((k * decays.to_end_C1.to(dtype)).transpose(-1, -2) @ v).to(state_BHKV.dtype)
    ends_KV = (decays.between_NN @ added_KV.flatten(-2)).view(added_KV.shape)
    ends_KV = torch.addcmul(ends_KV, decays.past_N1[..., None], state_BHKV[:, :, None])
    before_KV = torch.cat((state_BHKV[:, :, None], ends_KV[:, :, :-1]), dim=2).to(dtype)
    o = add_product((q * (decays.from_start_C1 * scale).to(dtype)) @ before_KV, scores_CC, v)
    return o.view(batch, heads, tokens, value).transpose(1, 2), ends_KV[:, :, -1]
