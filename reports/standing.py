"""Whether a hybrid is as good as its teacher but for a margin: non-inferiority, the question that "within noise" leaves
open. A difference that is not significant proves nothing; this test does, or says that it cannot.

The lowest plausible difference (one-sided, 97.5%) must stay above minus the margin. It is Student's, over clusters,
and made honest for a handful of questions in two ways: two clusters are added, one wholly lost and one wholly won, as
in Agresti and Min's interval for paired proportions; and the spread is no smaller than that of losing the margin,
cluster by cluster. Twelve equal answers are no proof of a difference below two points.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from statistics import NormalDist

import numpy as np

from halobench.reports.pairing import Target, paired_strata, unpaired_error
from halobench.reports.rows import Row

MARGIN = 0.02
_ONE_SIDED = 0.025


@dataclass(frozen=True, kw_only=True)
class Standing:
    """A hybrid against its teacher. `difference` is hybrid minus teacher; `lowest` its one-sided 97.5% bound.

    p: two times the one-sided p of "worse by the margin or more", so that it is corrected among two-sided ones.
    """

    row: str
    teacher: str
    target: Target
    margin: float
    difference: float | None = None
    lowest: float | None = None
    p: float | None = None
    adjusted: float | None = None
    n: int = 0
    level: float = 0.05

    @property
    def shown(self) -> bool:
        """True when it is established that the hybrid is not worse by the margin."""
        return (
            self.adjusted is not None
            and self.adjusted < self.level
            and self.lowest is not None
            and self.lowest > -self.margin
        )


def stand(row: Row, teacher: Row, target: Target, margin: float = MARGIN) -> Standing:
    """The test of one hybrid; not yet corrected for the others of its family."""
    base = Standing(row=row.key, teacher=teacher.key, target=target, margin=margin)
    strata = paired_strata(row, teacher, target)
    if strata is not None:
        n = sum(source.metric.n for source in target.sources(row) or [])
        difference, count = float(np.mean([d.mean() for d in strata])), effective_count(strata)
        error = cautious_error(strata, margin * (1 - margin))
        centre, freedom = difference * count / (count + 2), count + 1
    else:
        left, right, unpaired = target.value(row), target.value(teacher), unpaired_error(row, teacher, target)
        if left is None or right is None or unpaired is None:
            return base
        difference = centre = left[0] - right[0]
        error, freedom, n = unpaired, 0.0, 0
    p = min(1.0, 2 * tail((centre + margin) / error, freedom))
    lowest = centre - reach(freedom) * error
    return replace(base, difference=difference, lowest=lowest, p=p, n=n)


def effective_count(strata: Sequence[np.ndarray]) -> float:
    """How many clusters of equal weight know as much as these: all of them when the strata are equally large."""
    return len(strata) ** 2 / sum(1 / len(d) for d in strata)


def cautious_error(strata: Sequence[np.ndarray], least: float) -> float:
    """Standard error of the mean over strata of stratum means, a lost and a won cluster being added to them.

    least: the variance of one cluster which is assumed at least.
    """
    count = effective_count(strata)
    own = sum(float(d.var(ddof=1)) / len(d) for d in strata if len(d) > 1) / len(strata) ** 2
    return math.sqrt(max(own, least / count) + 2 / (count + 2) ** 2)


def tail(t: float, freedom: float) -> float:
    """P(T > t) of Student's distribution; of the normal one where `freedom` is 0."""
    if freedom == 0:
        return 1 - NormalDist().cdf(t)
    # t = sqrt(freedom) tan(angle) turns the density into a power of a cosine on a finite range.
    angle = math.atan(abs(t) / math.sqrt(freedom))
    grid = np.linspace(angle, math.pi / 2, 4001)
    heights = np.cos(grid) ** (freedom - 1)
    scale = math.exp(math.lgamma((freedom + 1) / 2) - math.lgamma(freedom / 2)) / math.sqrt(math.pi)
    area = scale * float(np.sum((heights[1:] + heights[:-1]) / 2) * (grid[1] - grid[0]))
    return area if t >= 0 else 1 - area


@lru_cache(maxsize=256)
def reach(freedom: float) -> float:
    """How many standard errors below the estimate the one-sided 97.5% bound lies."""
    low, high = 0.0, 100.0
    for _ in range(50):
        middle = (low + high) / 2
        low, high = (middle, high) if tail(middle, freedom) > _ONE_SIDED else (low, middle)
    return high
