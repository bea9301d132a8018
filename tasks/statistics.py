"""Means and ratios with standard errors that know which samples belong together."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np


def mean_stderr(values: Sequence[float], clusters: Sequence[int] | None = None) -> tuple[float, float | None]:
    """Mean of `values` and its standard error, robust to samples of one cluster (a haystack, a document) being alike.

    The error is the sandwich estimate with its small-sample correction: the root of
    G/(G-1) sum_g (sum_{i in g} (x_i - mean))^2 over n, for G clusters. Without `clusters` each value is its own.
    None when there are fewer than two clusters.
    """
    return ratio_stderr(values, np.ones(len(values)), clusters)


def ratio_stderr(
    numerators: Sequence[float] | np.ndarray,
    denominators: Sequence[float] | np.ndarray,
    clusters: Sequence[int] | None = None,
) -> tuple[float, float | None]:
    """sum(numerators) / sum(denominators) and its cluster-robust standard error, linearised about the ratio."""
    top, bottom = np.asarray(numerators, dtype=np.float64), np.asarray(denominators, dtype=np.float64)
    if top.size == 0 or top.shape != bottom.shape:
        raise ValueError(f"need as many numerators as denominators and at least one, got {top.size} and {bottom.size}")
    value = float(top.sum() / bottom.sum())
    groups = np.arange(top.size) if clusters is None else np.unique(np.asarray(clusters), return_inverse=True)[1]
    count = int(groups.max()) + 1
    if count < 2:
        return value, None
    residuals = np.bincount(groups, weights=top - value * bottom, minlength=count)
    return value, float(np.sqrt(count / (count - 1) * np.square(residuals).sum()) / bottom.sum())


def median_stderr(values: Sequence[float]) -> tuple[float, float | None]:
    """Median of `values` and its standard error under near-normal noise, from the median absolute deviation.

    Made for timings: a few slow outliers move neither. None for fewer than two values.
    """
    array = np.asarray(values, dtype=np.float64)
    median = float(np.median(array))
    if array.size < 2:
        return median, None
    spread = 1.4826 * float(np.median(np.abs(array - median)))
    return median, 1.2533 * spread / float(np.sqrt(array.size))
