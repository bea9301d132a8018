"""What a batch's mask, positions and cache say, worked out once for a forward call."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from halobench.errors import UserError
from halobench.mixers.cache import HybridCache
from halobench.mixers.contract import MixerContext


@dataclass(frozen=True, kw_only=True, eq=False)
class BatchFacts:
    """A forward call's arguments beside the tokens."""

    batch: int
    tokens: int
    device: torch.device
    attention_mask: Tensor | None
    position_ids: Tensor | None
    cache: Any


def read_batch(facts: BatchFacts, *, kept: bool, mixed: bool) -> dict[str, Any]:
    """The decoder's attention_mask, position_ids and mixer_context.

    Args:
        kept: whether some layer has the source's own attention.
        mixed: whether some layer has a mixer. Without one, all passes through as it came, so that a plan that changes
            nothing gives the source's logits bit for bit.
    """
    if not mixed:
        return {"attention_mask": facts.attention_mask, "position_ids": facts.position_ids}
    if facts.cache is not None and not isinstance(facts.cache, HybridCache):
        got = type(facts.cache).__name__
        raise UserError(f"past_key_values is a {got}, which holds no recurrent state; use model.new_cache()")
    past = 0 if facts.cache is None else facts.cache.get_seq_length()
    mask_BS = _padding(facts, past)
    positions = facts.position_ids
    if positions is None:
        if mask_BS is None:
            positions = torch.arange(past, past + facts.tokens, device=facts.device)[None]
        else:
            positions = (mask_BS.long().cumsum(-1) - 1).clamp(min=0)[:, past:]
    new_BT = None if mask_BS is None else mask_BS[:, past:]
    if facts.position_ids is not None and facts.tokens > 1:
        _check_order(positions, new_BT)
    context = MixerContext(
        positions_BT=positions if positions.ndim == 2 else positions[None],
        padding_mask_BT=None if new_BT is None or bool(new_BT.all()) else new_BT,
        key_padding_mask_BS=mask_BS,
    )
    # A ready-made 4-d mask is passed on as it is; with no source attention to read it, an empty one saves the full one.
    unread = torch.ones(1, 1, 1, 1, dtype=torch.bool, device=facts.device)
    attention_mask = facts.attention_mask if kept else unread
    positions = carrying(positions, context)
    return {"attention_mask": attention_mask, "position_ids": positions, "mixer_context": context}


def _check_order(positions: Tensor, real_BT: Tensor | None) -> None:
    """Refuses several texts packed into one row: a state would run from one into the next."""
    backwards = positions[..., 1:] <= positions[..., :-1]
    if real_BT is not None:
        backwards = backwards & real_BT[:, 1:] & real_BT[:, :-1]
    if bool(backwards.any()):
        raise UserError(
            "position_ids do not rise along a row, as when several texts are packed into one; a state would run from "
            "one text into the next: give each text a row of its own, padded"
        )


# Some families (StableLM) pass no further keyword arguments on to their attention, but all pass the positions on as
# they came: the context travels on that tensor too. Gradient checkpointing keeps it, for it keeps the tensor.


def carrying(positions: Tensor, context: MixerContext) -> Tensor:
    carrier = positions.view(positions.shape)  # not the caller's own object
    carrier.mixer_context = context  # type: ignore[attr-defined]
    return carrier


def carried(positions: Tensor | None) -> MixerContext | None:
    """The context that `read_batch` put on the positions."""
    return getattr(positions, "mixer_context", None)


def _padding(facts: BatchFacts, past: int) -> Tensor | None:
    """(B, past + T) booleans, True at real tokens; None when there is no padding."""
    mask = facts.attention_mask
    if mask is None:
        return None
    expected = (facts.batch, past + facts.tokens)
    if tuple(mask.shape) != expected:
        raise UserError(
            f"attention_mask has shape {tuple(mask.shape)}, expected {expected}: one number for each of "
            f"{past} cached and {facts.tokens} new tokens"
        )
    mask = mask.to(device=facts.device, dtype=torch.bool)
    return None if bool(mask.all()) else mask
