"""Means and ratios with standard errors that know which samples belong together."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np

Z95 = 1.959964  # of the normal distribution, 95% lie within so many standard deviations
# Student's t that 97.5% lie below, by degrees of freedom from 1 on; see `t95` for those beyond.
_T975 = (12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262, 2.228, 2.201, 2.179, 2.160, 2.145, 2.131)
NOISE = 1e-9  # of the range of values: a standard error below is rounding


def t95(degrees: int) -> float:
    """Student's t that 97.5% lie below: 95% lie within so many standard errors when these rest on few samples.

    Beyond the table by the expansion t = z + (z^3 + z) / 4d + (5z^5 + 16z^3 + 3z) / 96d^2, right to 0.001.
    """
    if degrees <= len(_T975):
        return _T975[degrees - 1]
    z = Z95
    return z + (z**3 + z) / (4 * degrees) + (5 * z**5 + 16 * z**3 + 3 * z) / (96 * degrees**2)


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


def half_width(values: Sequence[float], clusters: Sequence[int]) -> float:
    """Half the width of the 95% interval of the mean of values between 0 and 1: Wilson's, aware of clusters.

    Wilson's interval of p over m samples, half as wide as z / (1 + z^2/m) sqrt(p (1 - p) / m + z^2 / (4 m^2)), does not
    shrink to nothing at 0 or 1. m is the number of independent samples that would vary as these means do, p (1 - p)
    over the squared standard error of `mean_stderr`, at most the samples there are; z is Student's t with one degree of
    freedom less than there are clusters, for that error is an estimate from so few. Clusters that all agree do not say
    how much their samples do, and count as one sample each, with the normal z of Wilson's own.
    """
    p, stderr = mean_stderr(values, clusters)
    if not 0 <= min(values) <= max(values) <= 1:
        raise ValueError(f"the interval is for values from 0 to 1, got {min(values)} to {max(values)}")
    groups = len(set(clusters))
    if stderr is not None and stderr > NOISE * max(p, 1 - p):
        z, count = t95(groups - 1), min(p * (1 - p) / stderr**2, len(values))
    else:
        z, count = Z95, float(groups)
    return z / (1 + z**2 / count) * math.sqrt(p * (1 - p) / count + z**2 / (4 * count**2))


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
