"""Standard errors against the bootstrap and the textbook."""

import numpy as np
import pytest

from halobench.tasks.statistics import mean_stderr, median_stderr, ratio_stderr


def clustered(groups: int = 60, size: int = 5) -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(0)
    values = rng.normal(size=(groups, 1)) + 0.3 * rng.normal(size=(groups, size))
    return values.ravel(), np.repeat(np.arange(groups), size)


def test_the_error_of_alike_samples_is_that_of_a_bootstrap_over_clusters() -> None:
    values, clusters = clustered()
    rng = np.random.default_rng(1)
    means = values.reshape(60, 5).mean(1)
    bootstrap = np.std([means[rng.integers(60, size=60)].mean() for _ in range(4000)])
    _, stderr = mean_stderr(values.tolist(), clusters.tolist())
    assert stderr == pytest.approx(bootstrap, rel=0.06)
    assert stderr > 1.8 * mean_stderr(values.tolist())[1]


def test_without_clusters_it_is_the_standard_error_of_the_mean() -> None:
    values = np.random.default_rng(2).normal(size=50)
    mean, stderr = mean_stderr(values.tolist())
    assert mean == pytest.approx(values.mean())
    assert stderr == pytest.approx(values.std(ddof=1) / np.sqrt(50))


def test_one_cluster_has_no_error() -> None:
    assert mean_stderr([1.0, 0.0, 1.0], [7, 7, 7]) == (pytest.approx(2 / 3), None)


def test_a_ratio_weighs_by_its_denominators_and_agrees_with_the_bootstrap() -> None:
    rng = np.random.default_rng(3)
    bottom = rng.uniform(1, 20, size=80)
    top = bottom * rng.normal(2.0, 0.3, size=80)
    value, stderr = ratio_stderr(top, bottom)
    draws = [rng.integers(80, size=80) for _ in range(4000)]
    assert value == pytest.approx(top.sum() / bottom.sum())
    assert stderr == pytest.approx(np.std([top[d].sum() / bottom[d].sum() for d in draws]), rel=0.06)


def test_the_median_and_its_error_ignore_one_slow_step() -> None:
    steps = [1.0, 1.01, 0.99, 1.02, 0.98, 50.0]
    median, stderr = median_stderr(steps)
    assert median == pytest.approx(1.0, abs=0.02) and stderr < 0.05
