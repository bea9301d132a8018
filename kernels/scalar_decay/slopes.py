"""The decay rates of Lightning Attention: the ALiBi slopes, one per head."""

from __future__ import annotations

import math


def alibi_slopes(heads: int) -> list[float]:
    """Slopes of `heads` heads (ALiBi, arXiv 2108.12409); head h decays by exp(-slope_h) a token.

    For a power of two, slope_h = 2^(-8h/heads), h = 1..heads. For any other number: the slopes of the largest power
    of two below it, then every second slope of twice that power.
    """
    if heads < 1:
        raise ValueError(f"heads must be at least 1, got {heads}")
    power = 2 ** math.floor(math.log2(heads))
    slopes = _geometric(power)
    if power < heads:
        slopes += _geometric(2 * power)[0::2][: heads - power]
    return slopes


def _geometric(heads: int) -> list[float]:
    return [2.0 ** (-8.0 * (head + 1) / heads) for head in range(heads)]
