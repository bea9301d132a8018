"""Which keys a query may see: causal order, an optional window, padding."""

from __future__ import annotations

import torch
from torch import Tensor


def allowed_keys(
    start: int,
    stop: int,
    queries: int,
    keys: int,
    device: torch.device,
    window: int | None = None,
    key_padding_mask_BS: Tensor | None = None,
) -> Tensor:
    """True where a query may see a key, for queries start..stop of the last `queries` of `keys` tokens.

    A query always sees itself, even where it is padding: a row with nothing to see would be NaN, and though nobody
    reads the output at a padded place, its gradient would reach everything.

    Args:
        window: a query sees this many tokens, itself included; None is all.
        key_padding_mask_BS: True at real tokens, over all keys.

    Returns:
        (stop - start, S) booleans, or (B, 1, stop - start, S) with padding.
    """
    place_T1 = torch.arange(keys - queries + start, keys - queries + stop, device=device)[:, None]
    place_S = torch.arange(keys, device=device)
    allowed_TS = place_S <= place_T1
    if window is not None:
        allowed_TS &= place_S > place_T1 - window
    if key_padding_mask_BS is None:
        return allowed_TS
    itself_TS = place_S == place_T1
    return (allowed_TS & key_padding_mask_BS[:, None, None, :].bool()) | itself_TS
