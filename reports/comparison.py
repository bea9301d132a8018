"""Which differences are real: paired comparisons on the same questions, corrected for how many were made.

The interval is a paired bootstrap over questions. The p-value is a paired sign-flip test: were the two models alike,
each question's difference would be as likely to point the other way. It stays honest for a handful of questions, where
the bootstrap's own tail does not. Questions about one haystack are resampled and flipped together. Holm's step-down
correction runs over every comparison of one call, the tests of being no worse than the teacher (standing.py) included.
Without samples, two standard errors are combined as if the questions were independent (a share that is all or nothing
being no proof of certainty); without those, no claim is made.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import combinations
from statistics import NormalDist
from typing import Literal

import numpy as np

from halobench.reports.pairing import Target, paired_strata, unpaired_error
from halobench.reports.rows import Measured, Row
from halobench.reports.standing import MARGIN, Standing, reach, stand

RESAMPLES = 5_000
FLIPS = 20_000
EXACT = 2**16  # sums of signed differences that are gone through one by one
_ENOUGH = 10  # as many flips beyond what was seen settle a small p
_BLOCK = 2_000_000  # numbers drawn at a time


@dataclass(frozen=True, kw_only=True)
class Comparison:
    """`difference` is left minus right, in the metric's own units; `adjusted` is p after Holm's correction.

    A paired difference weighs all questions alike; `shown` is that of the two values themselves, which may weigh them
    by size. n: samples compared. clusters: how many groups of them are independent of one another (haystacks).
    """

    left: str
    right: str
    target: Target
    higher_is_better: bool
    method: Literal["paired", "independent", "untested"]
    difference: float | None = None
    shown: float | None = None
    low: float | None = None
    high: float | None = None
    p: float | None = None
    adjusted: float | None = None
    n: int = 0
    clusters: int = 0
    level: float = 0.05

    @property
    def significant(self) -> bool:
        """True when the corrected test and the interval both exclude no difference."""
        if self.adjusted is None or self.low is None or self.high is None:
            return False
        return self.adjusted < self.level and not self.low <= 0 <= self.high

    @property
    def contrary(self) -> bool:
        """True when the paired difference points the other way than the two values."""
        return self.difference is not None and self.shown is not None and self.shown * self.difference < 0

    @property
    def winner(self) -> str | None:
        """Key of the row that is significantly better, and whose value is, else None."""
        if not self.significant or self.difference is None or self.contrary:
            return None
        return self.left if (self.difference > 0) == self.higher_is_better else self.right


@dataclass(frozen=True, kw_only=True)
class Comparisons:
    """Everything one call compared: the family that Holm's correction ran over."""

    items: tuple[Comparison, ...]
    hybrids: tuple[str, ...]
    standings: tuple[Standing, ...] = ()

    @property
    def tested(self) -> int:
        """How many comparisons had an uncertainty."""
        return sum(p is not None for p in [*(made.p for made in self.items), *(made.p for made in self.standings)])

    def between(self, left: str, right: str, target: Target) -> Comparison | None:
        """The comparison of two rows (in either order) on `target`, as it was made."""
        pair = {left, right}
        return next((c for c in self.items if c.target == target and {c.left, c.right} == pair), None)

    def best(self, target: Target) -> str | None:
        """Key of the hybrid that is significantly better than every other hybrid; None when there is none."""
        for key in self.hybrids:
            others = [self.between(key, other, target) for other in self.hybrids if other != key]
            if others and all(c is not None and c.winner == key for c in others):
                return key
        return None


def compare(
    rows: Sequence[Row],
    targets: Sequence[Target],
    *,
    pairs: Sequence[tuple[Row, Row]] | None = None,
    teacher: Row | None = None,
    standing: Sequence[Target] = (),
    margin: float = MARGIN,
    seed: int = 0,
    level: float = 0.05,
) -> Comparisons:
    """Compares `pairs` of rows (every pair when not given) on every target.

    Args:
        rows: the rows at hand; those that were converted may win the mark of the best hybrid.
        targets: what to compare; a row that lacks a target gives an untested comparison, which nobody wins.
        teacher, standing, margin: on these targets every hybrid is also tested for being worse than the teacher by less
            than the margin; these tests belong to the same family.
        level: the chance of any false claim among all comparisons of this call.
    """
    chosen = list(combinations(rows, 2)) if pairs is None else pairs
    cases = [(left, right, target) for target in targets for left, right in chosen]
    hybrids = [row for row in rows if not row.untouched]
    stood = [stand(row, teacher, target, margin) for target in standing for row in hybrids] if teacher else []
    compared, standings = _corrected(_all(cases, seed, level, len(cases) + len(stood)), stood)
    return Comparisons(items=compared, hybrids=tuple(row.key for row in hybrids), standings=standings)


def compare_cases(
    cases: Sequence[tuple[Row, Row, Target]], *, seed: int = 0, level: float = 0.05
) -> tuple[Comparison, ...]:
    """One family of comparisons, each of two rows on its own target, corrected together; in the order given."""
    return _corrected(_all(cases, seed, level, len(cases)), [])[0]


def _all(cases: Sequence[tuple[Row, Row, Target]], seed: int, level: float, family: int) -> list[Comparison]:
    """Each case by itself, with enough flips for a p-value that can survive the correction for `family` tests."""
    most = max(FLIPS, math.ceil(20 * family / level))
    return [_one(*case, np.random.default_rng([seed, i]), level, most) for i, case in enumerate(cases)]


def _corrected(
    items: Sequence[Comparison], stood: Sequence[Standing]
) -> tuple[tuple[Comparison, ...], tuple[Standing, ...]]:
    """Holm's correction over every test of the family that has a p-value."""
    found = [*(made.p for made in items), *(made.p for made in stood)]
    adjusted = iter(holm([p for p in found if p is not None]))
    return (
        tuple(made if made.p is None else replace(made, adjusted=next(adjusted)) for made in items),
        tuple(made if made.p is None else replace(made, adjusted=next(adjusted)) for made in stood),
    )


def _one(left: Row, right: Row, target: Target, rng: np.random.Generator, level: float, most: int) -> Comparison:
    a, b = target.sources(left), target.sources(right)
    higher = next((s.metric.higher_is_better for s in (a or b or [])), True)
    base = Comparison(
        left=left.key, right=right.key, target=target, higher_is_better=higher, method="untested", level=level
    )
    if a is None or b is None:
        return base
    shown = float(np.mean([x.metric.value - y.metric.value for x, y in zip(a, b, strict=True)]))
    base = replace(base, difference=shown, shown=shown)
    strata = paired_strata(left, right, target)
    if strata is not None:
        low, high = bootstrap_interval(strata, rng)
        n, clusters = sum(s.metric.n for s in a), sum(len(d) for d in strata)
        # The mean of the samples, so that difference and interval speak of the same quantity.
        difference = float(np.mean([d.mean() for d in strata]))
        p = sign_flip_p(strata, rng, most=most)
        return replace(base, method="paired", difference=difference, low=low, high=high, p=p, n=n, clusters=clusters)
    return _independent(base, shown, a, b, unpaired_error(left, right, target))


def _independent(
    base: Comparison, shown: float, left: list[Measured], right: list[Measured], error: float | None
) -> Comparison:
    if error is None:
        return base
    p = math.erfc(abs(shown) / error / math.sqrt(2))
    half = NormalDist().inv_cdf(1 - base.level / 2) * error
    n = min(sum(s.metric.n for s in left), sum(s.metric.n for s in right))
    return replace(base, method="independent", low=shown - half, high=shown + half, p=p, n=n)


def bootstrap_means(strata: Sequence[np.ndarray], rng: np.random.Generator, resamples: int = RESAMPLES) -> np.ndarray:
    """Means (resamples,) over strata of resampled stratum means. Few distinct values are drawn as one multinomial."""
    total = np.zeros(resamples)
    for values in strata:
        distinct, counts = np.unique(values, return_counts=True)
        few = len(distinct) <= 8
        for part in _parts(resamples, len(distinct) if few else len(values)):
            rows = part.stop - part.start
            if few:
                total[part] += rng.multinomial(len(values), counts / len(values), size=rows) @ distinct / len(values)
            else:
                total[part] += values[rng.integers(len(values), size=(rows, len(values)))].mean(axis=1)
    return total / len(strata)


def _parts(count: int, width: int) -> Iterator[slice]:
    """Slices of `count` rows that hold a bounded number of values of `width` each."""
    step = max(1, _BLOCK // width)
    return (slice(start, min(start + step, count)) for start in range(0, count, step))


def bootstrap_interval(
    strata: Sequence[np.ndarray], rng: np.random.Generator
) -> tuple[float, float] | tuple[None, None]:
    """Percentile interval (95%) of the mean paired difference; every stratum (a length) keeps its number of groups.

    The percentiles are moved outwards to what Student's interval reaches, since resamples of few groups spread too
    little (Hesterberg 2015, the expanded percentile interval). One group has no spread: there is no interval.
    """
    freedom = sum(len(values) - 1 for values in strata)
    if freedom < 1:
        return None, None
    few = min(len(values) for values in strata if len(values) > 1)
    outside = NormalDist().cdf(-reach(freedom) * math.sqrt(few / (few - 1)))
    low, high = np.quantile(bootstrap_means(strata, rng), [outside, 1 - outside])
    return float(low), float(high)


def sign_flip_p(strata: Sequence[np.ndarray], rng: np.random.Generator, flips: int = FLIPS, most: int = FLIPS) -> float:
    """Two-sided p of the mean paired difference under random signs: of all signs, where their sums are few.

    Elsewhere signs are drawn: after `flips` draws, p is what they give when enough of them were as extreme as what was
    seen; otherwise drawing goes on until enough are, or until `most` (Besag and Clifford 1991), so that a small p is
    known as well as a large.
    """
    observed = abs(sum(float(values.mean()) for values in strata))
    exact = _exact_p(strata, observed)
    if exact is not None:
        return exact
    done = extreme = 0
    while done < flips or (extreme < _ENOUGH and done < most):
        drawn = min(flips, max(most, flips) - done)
        found = np.cumsum(np.abs(_flipped(strata, rng, drawn)) >= observed - 1e-12)
        if done and extreme + found[-1] >= _ENOUGH:
            return _ENOUGH / (done + 1 + int(np.searchsorted(found, _ENOUGH - extreme)))
        done, extreme = done + drawn, extreme + int(found[-1])
    return (extreme + 1) / (done + 1)


def _exact_p(strata: Sequence[np.ndarray], observed: float) -> float | None:
    """The share of all signs under which the sum is as far from 0 as `observed`; None for more sums than EXACT."""
    sizes = np.concatenate([np.abs(values[values != 0]) / len(values) for values in strata])
    if 2 ** min(len(np.unique(np.round(sizes, 12))), 62) > EXACT:
        return None
    sums: np.ndarray = np.zeros(1)
    shares: np.ndarray = np.ones(1)
    for size in sizes:
        both = np.round(np.concatenate((sums + size, sums - size)), 12)
        sums, where = np.unique(both, return_inverse=True)
        shares = np.bincount(where, weights=np.concatenate((shares, shares)) / 2)
        if len(sums) > EXACT:
            return None
    return min(1.0, float(shares[np.abs(sums) >= observed - 1e-9].sum()))


def _flipped(strata: Sequence[np.ndarray], rng: np.random.Generator, flips: int) -> np.ndarray:
    """Sums over strata (flips,) of stratum means under random signs; equal sizes are drawn as one binomial."""
    total = np.zeros(flips)
    for values in strata:
        sizes, counts = np.unique(np.abs(values), return_counts=True)
        once = counts == 1
        for part in _parts(flips, len(sizes)):
            rows = part.stop - part.start
            signs = 2.0 * rng.integers(2, size=(rows, int(once.sum())), dtype=np.int8) - 1
            up = rng.binomial(counts[~once], 0.5, size=(rows, int((~once).sum())))
            total[part] += (signs @ sizes[once] + (2 * up - counts[~once]) @ sizes[~once]) / len(values)
    return total


def holm(p_values: Sequence[float]) -> list[float]:
    """Holm's adjusted p-values in the order given: the k-th smallest of m times m - k + 1, never falling, at most 1."""
    adjusted = [0.0] * len(p_values)
    running = 0.0
    for rank, index in enumerate(sorted(range(len(p_values)), key=lambda i: p_values[i])):
        running = max(running, min(1.0, p_values[index] * (len(p_values) - rank)))
        adjusted[index] = running
    return adjusted
