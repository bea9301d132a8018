"""What is compared, and which numbers of two models belong to the same question.

Questions about one haystack or one document (`Metric.clusters`) count as one piece of evidence. A record without that
note is asked through its standard error, which knows of clusters and is reproduced by one cluster size alone.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np

from halobench.records import Metric
from halobench.reports.rows import Measured, Row, seed_of

SHARES = ("accuracy", "acc", "acc_norm", "score", "contains")  # metrics that are shares of answers, 0 to 1


@dataclass(frozen=True, kw_only=True)
class Target:
    """What is compared: one metric, averaged over `lengths` with equal weight.

    also: further tasks of the suite with their metrics, averaged in with equal weight (a mean over tasks).
    """

    suite: str
    task: str
    metric: str
    lengths: tuple[int | None, ...] = (None,)
    also: tuple[tuple[str, str], ...] = ()

    @property
    def tasks(self) -> tuple[tuple[str, str], ...]:
        """Every task that is averaged, with its metric."""
        return ((self.task, self.metric), *self.also)

    def sources(self, row: Row) -> list[Measured] | None:
        """The row's measurements of every task at every length; None when one is missing."""
        found = [row.source(self.suite, task, metric, n) for task, metric in self.tasks for n in self.lengths]
        complete = [source for source in found if source is not None]
        return complete if complete and len(complete) == len(found) else None

    def value(self, row: Row) -> tuple[float, float | None] | None:
        """Mean and its standard error, the questions of different lengths and tasks being independent."""
        sources = self.sources(row)
        if sources is None:
            return None
        errors = [source.metric.stderr for source in sources]
        known = [error for error in errors if error is not None]
        stderr = math.sqrt(sum(e * e for e in known)) / len(errors) if len(known) == len(errors) else None
        return sum(source.metric.value for source in sources) / len(sources), stderr


def paired_strata(left: Row, right: Row, target: Target) -> list[np.ndarray] | None:
    """Left minus right for each task and length: (clusters,) numbers whose mean is the mean over all questions.

    None when the two were not asked the same questions.
    """
    a, b = target.sources(left), target.sources(right)
    if a is None or b is None or not all(_same_questions(x, y) for x, y in zip(a, b, strict=True)):
        return None
    return [_paired(left, x, right, y) for x, y in zip(a, b, strict=True)]


def _same_questions(left: Measured, right: Measured) -> bool:
    """Samples can be paired when both runs drew equally many with the same seed, from the same clusters where known."""
    seeds = (seed_of(left.record, left.metric.suite), seed_of(right.record, right.metric.suite))
    clusters = (left.metric.clusters, right.metric.clusters)
    alike = None in clusters or _renumbered(clusters[0]) == _renumbered(clusters[1])
    alike = alike and _text(left) == _text(right)
    return alike and len(_samples(left)) == len(_samples(right)) > 1 and (None in seeds or seeds[0] == seeds[1])


def _text(measured: Measured) -> tuple[object, ...]:
    """What decides how much of its documents suite ppl reads: a window's text is as long as the longest window."""
    settings = measured.record.settings.get("ppl") if measured.metric.suite == "ppl" else None
    return tuple(settings.get(name) for name in ("version", "limit", "lengths")) if isinstance(settings, dict) else ()


def _renumbered(clusters: list[int] | None) -> list[int]:
    """Clusters by order of appearance, so that only who belongs with whom is compared."""
    first: dict[int, int] = {}
    return [first.setdefault(cluster, len(first)) for cluster in clusters or []]


def _paired(left: Row, a: Measured, right: Row, b: Measured) -> np.ndarray:
    """Differences summed over each cluster and scaled, so that their mean weighs every question alike."""
    differences = _samples(a) - _samples(b)
    clusters = a.metric.clusters or b.metric.clusters
    if clusters is not None:
        groups = np.array(_renumbered(clusters))
        sums = np.bincount(groups, weights=differences)
        return sums * (len(sums) / len(differences))
    size = max(cluster_size(left, a), cluster_size(right, b))
    return differences.reshape(-1, size if len(differences) % size == 0 else 1).mean(axis=1)


def unpaired_error(left: Row, right: Row, target: Target) -> float | None:
    """Standard error of the difference of two rows that were asked different questions; None where one is unknown."""
    found = [(row, source) for row in (left, right) for source in target.sources(row) or []]
    known = [variance for pair in found if (variance := cautious_variance(*pair)) is not None]
    return math.sqrt(sum(known)) / (len(found) / 2) if found and len(known) == len(found) else None


def cautious_variance(row: Row, source: Measured) -> float | None:
    """Variance of a measured mean; None when no error was recorded, or none that can be trusted.

    Answers that are all right have no spread, which proves nothing: a share's variance is at least that of Agresti and
    Coull's interval, which adds two groups that were answered and two that were not.
    """
    metric = source.metric
    if metric.stderr is None:
        return None
    if metric.metric not in SHARES:
        return metric.stderr**2 or None
    groups = independent_groups(row, source)
    share = (groups * metric.value + 2) / (groups + 4)
    return max(metric.stderr**2, share * (1 - share) / (groups + 4))


def independent_groups(row: Row, source: Measured) -> int:
    """How many groups of samples (haystacks, documents) are independent of one another."""
    if source.metric.clusters:
        return len(set(source.metric.clusters))
    return source.metric.n // cluster_size(row, source)


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
    if metric.stderr is None or count != metric.n or count < 2 or np.ptp(values) == 0:
        return 1
    for size in (size for size in range(1, count // 2 + 1) if count % size == 0):
        sums = (values - values.mean()).reshape(-1, size).sum(axis=1)
        stderr = math.sqrt(len(sums) / (len(sums) - 1) * float(np.square(sums).sum())) / count
        if math.isclose(stderr, metric.stderr, rel_tol=2e-3):
            return size
    return 1


def _samples(measured: Measured) -> np.ndarray:
    return np.asarray(measured.metric.samples or [], dtype=np.float64)
