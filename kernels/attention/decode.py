"""One query a row over preallocated keys and values, of which only the first `lengths` are text.

    o = sum_{s < length} softmax_s(cap(scale * q . k_s)) v_s

The length is a tensor on the device, so that a step captured once can be replayed while the text grows. Two forms:
split-KV kernels in Triton (decode_triton.py), and torch. On a CPU the torch form reads the length and cuts the buffers
to it; on a GPU it masks the whole buffer, which is only for comparison. Products of matrices were measured against
scaled_dot_product_attention there: on a CPU they are level at 64K keys and slower at a few hundred.
"""

from __future__ import annotations

import importlib

import torch
from torch import Tensor
from torch.utils._python_dispatch import _get_current_dispatch_mode

from halobench.kernels.attention.softmax import attend_where
from halobench.kernels.backend import choose, explain


def decode_form(requested: str, like: Tensor, head: int | None = None) -> str:
    """ "triton" or "torch" for tensors like this one.

    Args:
        requested: one of `kernels.backend.BACKENDS`; "naive" and "fla" have no form of their own here and are "torch"
            and "auto".
        head: size of a head; by default the last size of `like`.

    Raises:
        UserError: an unknown name, or "triton" where it cannot run.
    """
    requested = {"naive": "torch", "fla": "auto"}.get(requested, requested)
    return choose("decode_attention", requested, like, head)


def explain_decode(requested: str, like: Tensor, head: int | None = None) -> str:
    """`decode_form` with its reason, in one line."""
    if requested in ("auto", "fla"):
        return explain("decode_attention", like, head)
    return f"{decode_form(requested, like, head)} (asked for)"


def decode_attention(
    q_BHK: Tensor,
    k_BJRK: Tensor,
    v_BJRV: Tensor,
    lengths_B: Tensor,
    *,
    scale: float,
    soft_cap: float | None = None,
    sinks_H: Tensor | None = None,
    backend: str = "auto",
) -> Tensor:
    """Softmax attention of one query a row; returns o_BHV in q's dtype.

    Args:
        q_BHK: H is a multiple of J (grouped heads).
        k_BJRK, v_BJRV: buffers with room for R tokens; what stands behind a row's length must be finite,
            for torch multiplies it by zero; where all lengths are the same, that is so on a GPU alone.
        lengths_B: int32 or int64, on the device of the rest; from 1 to R.
        scale: factor on the scores before the softmax.
        soft_cap: scores become cap * tanh(score / cap).
        sinks_H: a score for each head that joins the softmax's denominator and carries no value.
        backend: as in `decode_form`.
    """
    if decode_form(backend, q_BHK) == "triton":
        kernels = importlib.import_module("halobench.kernels.attention.decode_triton")
        return kernels.decode_attention_triton(
            q_BHK, k_BJRK, v_BJRV, lengths_B, scale=scale, soft_cap=soft_cap, sinks_H=sinks_H
        )
    if q_BHK.device.type == "cpu" and _get_current_dispatch_mode() is not None:
        # One operation to whoever notes them: it reads the length anew each time.
        return torch.ops.halobench.decode_attention(q_BHK, k_BJRK, v_BJRV, lengths_B, scale, soft_cap, sinks_H)
    return decode_attention_torch(q_BHK, k_BJRK, v_BJRV, lengths_B, scale=scale, soft_cap=soft_cap, sinks_H=sinks_H)


def decode_attention_torch(
    q_BHK: Tensor,
    k_BJRK: Tensor,
    v_BJRV: Tensor,
    lengths_B: Tensor,
    *,
    scale: float,
    soft_cap: float | None = None,
    sinks_H: Tensor | None = None,
) -> Tensor:
    """`decode_attention` in torch."""
    allowed = None
    if q_BHK.device.type == "cpu":  # reading the lengths costs nothing here
        lengths = lengths_B.tolist()
        longest = max(lengths)
        k_BJRK, v_BJRV = k_BJRK[:, :, :longest], v_BJRV[:, :, :longest]
        if min(lengths) < longest:
            allowed = torch.arange(longest) < lengths_B[:, None, None, None]
    else:
        allowed = torch.arange(k_BJRK.shape[2], device=q_BHK.device) < lengths_B[:, None, None, None]
    o_BH1V = attend_where(q_BHK[:, :, None], k_BJRK, v_BJRV, allowed, scale=scale, soft_cap=soft_cap, sinks_H=sinks_H)
    return o_BH1V[:, :, 0]


def _operator(
    q: Tensor, k: Tensor, v: Tensor, lengths: Tensor, scale: float, soft_cap: float | None, sinks: Tensor | None
) -> Tensor:
    return decode_attention_torch(q, k, v, lengths, scale=scale, soft_cap=soft_cap, sinks_H=sinks)


_LIBRARY = torch.library.Library("halobench", "FRAGMENT")
_LIBRARY.define(
    "decode_attention(Tensor q, Tensor k, Tensor v, Tensor lengths, float scale, float? soft_cap, Tensor? sinks)"
    " -> Tensor"
)
_LIBRARY.impl("decode_attention", _operator, "CPU")
