"""Which differences are real: paired comparisons on the same questions, corrected for how many were made.

The interval is a paired bootstrap over questions. The p-value is a paired sign-flip test: were the two models alike,
each question's difference would be as likely to point the other way. It stays honest for a handful of questions, where
the bootstrap's own tail does not. Questions about one haystack are resampled and flipped together. Holm's step-down
correction runs over every comparison of one call. Without samples, two standard errors are combined as if the questions
were independent; without those nothing is claimed.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import combinations
from statistics import NormalDist
from typing import Literal

import numpy as np

from halobench.records import Metric
from halobench.reports.rows import Measured, Row, seed_of

RESAMPLES = 5_000
FLIPS = 20_000
_BLOCK = 2_000_000  # numbers drawn at a time


@dataclass(frozen=True, kw_only=True)
class Target:
    """What is compared: one metric, averaged over `lengths` with equal weight."""

    suite: str
    task: str
    metric: str
    lengths: tuple[int | None, ...] = (None,)

    def sources(self, row: Row) -> list[Measured] | None:
        """The row's measurements at every length; None when one is missing."""
        found = [row.source(self.suite, self.task, self.metric, length) for length in self.lengths]
        complete = [source for source in found if source is not None]
        return complete if complete and len(complete) == len(found) else None

    def value(self, row: Row) -> tuple[float, float | None] | None:
        """Mean over the lengths and its standard error, the questions of different lengths being independent."""
        sources = self.sources(row)
        if sources is None:
            return None
        errors = [source.metric.stderr for source in sources]
        known = [error for error in errors if error is not None]
        stderr = math.sqrt(sum(e * e for e in known)) / len(errors) if len(known) == len(errors) else None
        return sum(source.metric.value for source in sources) / len(sources), stderr


@dataclass(frozen=True, kw_only=True)
class Comparison:
    """`difference` is left minus right, in the metric's own units; `adjusted` is p after Holm's correction.

    n: samples compared. clusters: how many groups of them are independent of one another (haystacks).
    """

    left: str
    right: str
    target: Target
    higher_is_better: bool
    method: Literal["paired", "independent", "untested"]
    difference: float | None = None
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
    def winner(self) -> str | None:
        """Key of the row that is significantly better, else None."""
        if not self.significant or self.difference is None:
            return None
        return self.left if (self.difference > 0) == self.higher_is_better else self.right


@dataclass(frozen=True, kw_only=True)
class Comparisons:
    """Everything one call compared: the family that Holm's correction ran over."""

    items: tuple[Comparison, ...]
    hybrids: tuple[str, ...]

    @property
    def tested(self) -> int:
        """How many comparisons had an uncertainty."""
        return sum(item.p is not None for item in self.items)

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
    seed: int = 0,
    level: float = 0.05,
) -> Comparisons:
    """Compares `pairs` of rows (every pair when not given) on every target.

    Args:
        rows: the rows at hand; those that were converted may win the mark of the best hybrid.
        targets: what to compare; a row that lacks a target gives an untested comparison, which nobody wins.
        level: the chance of any false claim among all comparisons of this call.
    """
    chosen = list(combinations(rows, 2)) if pairs is None else pairs
    cases = [(left, right, target) for target in targets for left, right in chosen]
    hybrids = tuple(row.key for row in rows if not row.untouched)
    return Comparisons(items=compare_cases(cases, seed=seed, level=level), hybrids=hybrids)


def compare_cases(
    cases: Sequence[tuple[Row, Row, Target]], *, seed: int = 0, level: float = 0.05
) -> tuple[Comparison, ...]:
    """One family of comparisons, each of two rows on its own target, corrected together; in the order given."""
    made = [_one(*case, np.random.default_rng([seed, index]), level) for index, case in enumerate(cases)]
    adjusted = iter(holm([c.p for c in made if c.p is not None]))
    return tuple(c if c.p is None else replace(c, adjusted=next(adjusted)) for c in made)


def _one(left: Row, right: Row, target: Target, rng: np.random.Generator, level: float) -> Comparison:
    a, b = target.sources(left), target.sources(right)
    higher = next((s.metric.higher_is_better for s in (a or b or [])), True)
    base = Comparison(
        left=left.key, right=right.key, target=target, higher_is_better=higher, method="untested", level=level
    )
    if a is None or b is None:
        return base
    base = replace(
        base, difference=float(np.mean([x.metric.value - y.metric.value for x, y in zip(a, b, strict=True)]))
    )
    if all(_same_questions(x, y) for x, y in zip(a, b, strict=True)):
        strata = [_paired(left, x, right, y) for x, y in zip(a, b, strict=True)]
        low, high = bootstrap_interval(strata, rng, level)
        n, clusters = sum(s.metric.n for s in a), sum(len(d) for d in strata)
        # The mean of the samples, so that difference and interval speak of the same quantity.
        difference = float(np.mean([d.mean() for d in strata]))
        p = sign_flip_p(strata, rng)
        return replace(base, method="paired", difference=difference, low=low, high=high, p=p, n=n, clusters=clusters)
    return _independent(base, a, b)


def _same_questions(left: Measured, right: Measured) -> bool:
    """Samples can be paired when there are equally many and both runs drew their questions with the same seed."""
    seeds = (seed_of(left.record, left.metric.suite), seed_of(right.record, right.metric.suite))
    return len(_samples(left)) == len(_samples(right)) > 1 and (None in seeds or seeds[0] == seeds[1])


def _paired(left: Row, a: Measured, right: Row, b: Measured) -> np.ndarray:
    """Differences of the samples, averaged over each cluster."""
    size = max(cluster_size(left, a), cluster_size(right, b))
    differences = _samples(a) - _samples(b)
    return differences.reshape(-1, size if len(differences) % size == 0 else 1).mean(axis=1)


def cluster_size(row: Row, source: Measured) -> int:
    """How many consecutive samples belong together, such as the questions about one haystack.

    A recorded standard error that knows of clusters is reproduced by one cluster size alone: the smallest that does is
    taken, over all metrics of the same questions (a log-likelihood settles what a row of equal answers leaves open).
    """
    task = (source.metric.suite, source.metric.task, source.metric.length)
    alike = [m.metric for m in row.measured.values() if (m.metric.suite, m.metric.task, m.metric.length) == task]
    return max((_smallest_cluster(metric) for metric in alike if metric.n == source.metric.n), default=1)


def _smallest_cluster(metric: Metric) -> int:
    values = np.asarray(metric.samples or [], dtype=np.float64)
    count = len(values)
    if metric.stderr is None or count != metric.n or np.ptp(values) == 0:
        return 1
    for size in (size for size in range(1, count // 2 + 1) if count % size == 0):
        sums = (values - values.mean()).reshape(-1, size).sum(axis=1)
        stderr = math.sqrt(len(sums) / (len(sums) - 1) * float(np.square(sums).sum())) / count
        if math.isclose(stderr, metric.stderr, rel_tol=2e-3):
            return size
    return 1


def _samples(measured: Measured) -> np.ndarray:
    return np.asarray(measured.metric.samples or [], dtype=np.float64)


def _independent(base: Comparison, left: list[Measured], right: list[Measured]) -> Comparison:
    errors = [s.metric.stderr for s in (*left, *right)]
    known = [e for e in errors if e is not None and math.isfinite(e)]
    spread = math.sqrt(sum(e * e for e in known)) / len(left)
    if base.difference is None or len(known) < len(errors) or spread == 0:
        return base
    p = math.erfc(abs(base.difference) / spread / math.sqrt(2))
    reach = NormalDist().inv_cdf(1 - base.level / 2) * spread
    n = min(sum(s.metric.n for s in left), sum(s.metric.n for s in right))
    return replace(base, method="independent", low=base.difference - reach, high=base.difference + reach, p=p, n=n)


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
    strata: Sequence[np.ndarray], rng: np.random.Generator, level: float = 0.05
) -> tuple[float, float]:
    """Percentile interval of the mean paired difference; every stratum (a length) keeps its number of questions."""
    low, high = np.quantile(bootstrap_means(strata, rng), [level / 2, 1 - level / 2])
    return float(low), float(high)


def sign_flip_p(strata: Sequence[np.ndarray], rng: np.random.Generator, flips: int = FLIPS) -> float:
    """Two-sided p of the mean paired difference under random signs; at least 1 / (flips + 1)."""
    observed = abs(sum(float(values.mean()) for values in strata))
    total = np.zeros(flips)
    for values in strata:
        sizes, counts = np.unique(np.abs(values), return_counts=True)
        once = counts == 1
        for part in _parts(flips, len(sizes)):
            rows = part.stop - part.start
            signs = 2.0 * rng.integers(2, size=(rows, int(once.sum())), dtype=np.int8) - 1
            up = rng.binomial(counts[~once], 0.5, size=(rows, int((~once).sum())))
            total[part] += (signs @ sizes[once] + (2 * up - counts[~once]) @ sizes[~once]) / len(values)
    extreme = int(np.count_nonzero(np.abs(total) >= observed - 1e-12))
    return (extreme + 1) / (flips + 1)


def holm(p_values: Sequence[float]) -> list[float]:
    """Holm's adjusted p-values in the order given: the k-th smallest of m times m - k + 1, never falling, at most 1."""
    adjusted = [0.0] * len(p_values)
    running = 0.0
    for rank, index in enumerate(sorted(range(len(p_values)), key=lambda i: p_values[i])):
        running = max(running, min(1.0, p_values[index] * (len(p_values) - rank)))
        adjusted[index] = running
    return adjusted
