"""Window attention at a cost of tokens * (window + sinks): blocks of queries against the band of keys they see.

Padding is sorted behind the text first. Then a window of positions is a band of places, whatever the padding was, and a
block of queries sees the `window - 1` keys before it, its own, the first ones, and near the start what the memory has.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from halobench.kernels.attention.softmax import EXPLICIT_BLOCK, MASK_ELEMENTS, attend, attend_where
from halobench.kernels.window_attention.memory import WindowMemory, empty_memory, remember

SMALLEST_BLOCK, LARGEST_BLOCK = 128, 1024  # queries; a block as long as the window computes half of it in vain


@dataclass(frozen=True, kw_only=True, eq=False)
class _Rule:
    """What is seen and how it is scored."""

    window: int
    sinks: int
    scale: float
    soft_cap: float | None
    sinks_H: Tensor | None

    def sees(self, query_BT: Tensor, key_BS: Tensor) -> Tensor:
        """(B, T, S), for positions that are -1 where there is no token."""
        query_BT1, key_B1S = query_BT[:, :, None], key_BS[:, None, :]
        near_BTS = key_B1S > query_BT1 - self.window
        if self.sinks:
            near_BTS = near_BTS | (key_B1S < self.sinks)
        return near_BTS & (key_B1S <= query_BT1) & (key_B1S >= 0)

    def attend(self, q_BTHK: Tensor, k_BSJK: Tensor, v_BSJV: Tensor, allowed_BTS: Tensor) -> Tensor:
        """Softmax attention under a mask, o_BTHV."""
        q, k, v = (x.transpose(1, 2) for x in (q_BTHK, k_BSJK, v_BSJV))
        o_BHTV = attend_where(
            q, k, v, allowed_BTS[:, None], scale=self.scale, soft_cap=self.soft_cap, sinks_H=self.sinks_H
        )
        return o_BHTV.transpose(1, 2)


def window_attention(
    q_BTHK: Tensor,
    k_BTJK: Tensor,
    v_BTJV: Tensor,
    *,
    positions_BT: Tensor,
    padding_mask_BT: Tensor | None = None,
    memory: tuple[Tensor, ...] | None = None,
    window: int,
    sinks: int = 0,
    scale: float,
    soft_cap: float | None = None,
    sinks_H: Tensor | None = None,
    keep_memory: bool = True,
    in_place: bool = False,
) -> tuple[Tensor, WindowMemory | None]:
    """A whole text, or the tokens that follow a memory: a query at p sees real s <= p if p - s < window or s < sinks.

    Args:
        positions_BT: counted over real tokens, of the new tokens; B may be 1. Anything at padding.
        padding_mask_BT: True at real tokens; None when all new tokens are real, which is faster.
        memory: what an earlier call returned for the same sequences; None at the text's start.
        window: tokens that a query sees, itself included; at least 1.
        sinks: first tokens that stay visible.
        scale: factor on the scores before the softmax.
        soft_cap: scores become cap * tanh(score / cap).
        sinks_H: learned scores in the softmax's denominator, as in `attend`; nothing to do with `sinks`.
        keep_memory: False to return None for the memory, in training.
        in_place: write into `memory` where that is possible (not under autograd) and not into a copy of it. For
            decoding, when nobody holds the old one.

    Returns:
        o_BTHV, finite but of no meaning at padded queries, and the memory after these tokens.
    """
    rule = _Rule(window=window, sinks=sinks, scale=scale, soft_cap=soft_cap, sinks_H=sinks_H)
    past = None if memory is None else WindowMemory(*memory)
    real_BT = None if padding_mask_BT is None else padding_mask_BT.bool()
    places_BT = positions_BT if real_BT is None else positions_BT.masked_fill(~real_BT, -1)

    def remembered() -> WindowMemory:
        before = empty_memory(k_BTJK, v_BTJV, window, sinks) if past is None else past
        rows_BT = places_BT.expand(k_BTJK.shape[0], -1)
        return remember(
            before, k_BTJK, v_BTJV, rows_BT, window=window, sinks=sinks,
            padded=real_BT is not None, in_place=in_place or past is None,
        )  # fmt: skip

    if past is not None and q_BTHK.shape[1] == 1:
        after = remembered()
        allowed_B1M = rule.sees(places_BT, after.positions_BM)
        if real_BT is not None:
            allowed_B1M = allowed_B1M | ~real_BT[..., None]  # else a query that sees nothing would be NaN
        return rule.attend(q_BTHK, after.k_BMJK, after.v_BMJV, allowed_B1M), after if keep_memory else None
    o_BTHV = _whole(q_BTHK, k_BTJK, v_BTJV, places_BT, real_BT, past, rule)
    return o_BTHV, remembered() if keep_memory else None


def _whole(
    q_BTHK: Tensor,
    k_BTJK: Tensor,
    v_BTJV: Tensor,
    places_BT: Tensor,
    real_BT: Tensor | None,
    past: WindowMemory | None,
    rule: _Rule,
) -> Tensor:
    """Several tokens; o_BTHV."""
    if real_BT is None:
        if past is None and k_BTJK.shape[1] <= rule.window:  # order alone decides
            return attend(q_BTHK, k_BTJK, v_BTJV, scale=rule.scale, soft_cap=rule.soft_cap, sinks_H=rule.sinks_H)
        return _bands(q_BTHK, k_BTJK, v_BTJV, places_BT, past, rule)
    order_BT = torch.argsort((~real_BT).to(torch.uint8), dim=1, stable=True)
    q, k, v = (x.take_along_dim(order_BT[..., None, None], dim=1) for x in (q_BTHK, k_BTJK, v_BTJV))
    o_BTHV = _bands(q, k, v, places_BT.take_along_dim(order_BT, dim=1), past, rule)
    return o_BTHV.take_along_dim(order_BT.argsort(dim=1)[..., None, None], dim=1)


def _bands(
    q_BTHK: Tensor, k_BTJK: Tensor, v_BTJV: Tensor, places_BT: Tensor, past: WindowMemory | None, rule: _Rule
) -> Tensor:
    """Blocks of queries of texts whose padding is all at the end."""
    tokens, outputs = q_BTHK.shape[1], []
    block = EXPLICIT_BLOCK if rule.soft_cap is not None else min(max(rule.window, SMALLEST_BLOCK), LARGEST_BLOCK)
    block = max(1, min(block, MASK_ELEMENTS // (places_BT.shape[0] * (rule.window + block))))
    for start in range(0, tokens, block):
        stop = min(start + block, tokens)
        begin = max(0, start - rule.window + 1)
        parts = []
        if past is not None:  # only the first queries still see its ring
            held = slice(0, None if start < rule.window - 1 else rule.sinks)
            parts.append((past.k_BMJK[:, held], past.v_BMJV[:, held], past.positions_BM[:, held]))
        # First tokens that the band has left behind, and the band.
        for part in (slice(0, min(rule.sinks, begin)), slice(begin, stop)):
            places = places_BT[:, part] if past is None else places_BT[:, part].expand(k_BTJK.shape[0], -1)
            parts.append((k_BTJK[:, part], v_BTJV[:, part], places))
        k, v, key_places = (_joined(kind) for kind in zip(*parts, strict=True))
        allowed_BTS = rule.sees(places_BT[:, start:stop], key_places)
        # A block's own keys are its last; a padded query sees itself, else it would be NaN.
        allowed_BTS.diagonal(k.shape[1] - (stop - start), 1, 2).fill_(True)
        outputs.append(rule.attend(q_BTHK[:, start:stop], k, v, allowed_BTS))
    return outputs[0] if len(outputs) == 1 else torch.cat(outputs, dim=1)


def _joined(parts: tuple[Tensor, ...]) -> Tensor:
    """Along time, without a copy when there is only one with anything in it."""
    kept = [part for part in parts if part.shape[1]]
    return kept[0] if len(kept) == 1 else torch.cat(kept, dim=1)
