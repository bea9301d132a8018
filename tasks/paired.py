"""Two models measured in turns: their ratio with an interval, and the context at which one overtakes the other."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np

from halobench.tasks.statistics import t95

LONGEST = 2**24  # tokens: where the search for a crossing ends

State = Literal["within", "before", "not reached"]


@dataclass(frozen=True, kw_only=True)
class Ratio:
    """A ratio above 1 where the hybrid is better, and its 95% interval; no interval from a single round."""

    value: float
    low: float | None = None
    high: float | None = None


def paired_ratio(over: Sequence[float], under: Sequence[float]) -> Ratio:
    """The geometric mean of over[i] / under[i], rounds that ran next to each other, with Student's interval.

    What slows the machine for a while slows both of a round, and leaves their ratio alone.
    """
    logs = np.log(np.asarray(over, dtype=np.float64)) - np.log(np.asarray(under, dtype=np.float64))
    mean, rounds = float(logs.mean()), logs.size
    if rounds < 2:
        return Ratio(value=math.exp(mean))
    half = t95(rounds - 1) * float(logs.std(ddof=1)) / math.sqrt(rounds)
    return Ratio(value=math.exp(mean), low=math.exp(mean - half), high=math.exp(mean + half))


@dataclass(frozen=True, kw_only=True)
class Overtaking:
    """From which context on the hybrid is the better one, for good as far as was measured.

    what: "tpot", "prefill" or "cache". state: "within" the contexts measured, at `context` tokens (interpolated);
    "before" the shortest of them; "not reached" by the longest. low, high: the same for the bounds of the ratio's 95%
    interval; None where a bound lies outside the contexts measured. shortest, longest: of these; None for the cache,
    whose size is known at every length, so that `context` is exact.
    """

    what: str
    batch: int
    state: State
    context: float | None = None
    low: float | None = None
    high: float | None = None
    shortest: int | None = None
    longest: int | None = None

    def line(self) -> str:
        """One line for people."""
        measured = "" if self.shortest is None else f" (measured from {self.shortest:,} to {self.longest:,})"
        if self.state == "before":
            where = f"better from the shortest context on{measured}" if measured else "better from the start"
        elif self.context is None:
            where = f"not within the range{measured}" if measured else f"not up to {LONGEST:,} tokens"
        elif not measured:
            where = f"at {self.context:,.0f} tokens, exactly"
        else:
            bounds = (
                ("before" if self.low is None else f"{self.low:,.0f}"),
                ("beyond" if self.high is None else f"{self.high:,.0f}"),
            )
            where = f"at about {self.context:,.0f} tokens (95%: {bounds[0]} to {bounds[1]}){measured}"
        return f"{self.what}, batch {self.batch}: {where}"


def overtaking(what: str, batch: int, contexts: Sequence[int], ratios: Sequence[Ratio]) -> Overtaking:
    """Where the ratio passes 1 for the last time, upwards; contexts ascend, at least one.

    Between two contexts the ratio's logarithm is taken as a straight line over the logarithm of the context.
    """
    state, context = _last_rise(contexts, [ratio.value for ratio in ratios])
    bounds: list[float | None] = [None, None]
    if all(ratio.low is not None for ratio in ratios):
        for place, name in enumerate(("high", "low")):  # the upper bound of the ratio rises above 1 first
            bounds[place] = _last_rise(contexts, [getattr(ratio, name) for ratio in ratios])[1]
    return Overtaking(
        what=what,
        batch=batch,
        state=state,
        context=context,
        low=bounds[0],
        high=bounds[1],
        shortest=contexts[0],
        longest=contexts[-1],
    )


def _last_rise(contexts: Sequence[int], values: Sequence[float]) -> tuple[State, float | None]:
    behind = [place for place, value in enumerate(values) if value <= 1]
    if not behind:
        return "before", None
    last = behind[-1]
    if last == len(values) - 1:
        return "not reached", None
    below, above = math.log(values[last]), math.log(values[last + 1])
    start, end = math.log(contexts[last]), math.log(contexts[last + 1])
    return "within", math.exp(start + (end - start) * -below / (above - below))


def cache_overtaking(batch: int, teacher: Callable[[int], int], hybrid: Callable[[int], int]) -> Overtaking:
    """The first context at which the hybrid's cache is the smaller; the sizes are functions of the context, in bytes.

    The difference is taken to grow with the context: caches of softmax layers do, and states stay as they are.
    """
    if hybrid(1) < teacher(1):
        return Overtaking(what="cache", batch=batch, state="before")
    if hybrid(LONGEST) >= teacher(LONGEST):
        return Overtaking(what="cache", batch=batch, state="not reached")
    small, large = 1, LONGEST  # the hybrid's is the larger at the one, the smaller at the other
    while large - small > 1:
        middle = (small + large) // 2
        small, large = (small, middle) if hybrid(middle) < teacher(middle) else (middle, large)
    return Overtaking(what="cache", batch=batch, state="within", context=float(large))
