"""Standard errors against the bootstrap and the textbook."""

import numpy as np
import pytest

from halobench.tasks.statistics import half_width, mean_stderr, median_stderr, ratio_stderr, t95


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


def wilson(right: int, count: int) -> float:
    z, p = 1.959964, right / count
    return z * np.sqrt(p * (1 - p) / count + z * z / (4 * count * count)) / (1 + z * z / count)


@pytest.mark.parametrize(("right", "count"), [(0, 8), (8, 8), (50, 50)])
def test_an_interval_of_nothing_but_the_same_is_wilsons_and_not_empty(right: int, count: int) -> None:
    values = [1.0] * right + [0.0] * (count - right)
    assert half_width(values, list(range(count))) == pytest.approx(wilson(right, count))


def test_clusters_that_agree_but_for_rounding_count_as_one_sample_each() -> None:
    values = [float(i > 0) for _ in range(8) for i in range(13)]  # twelve of thirteen right, in each of eight haystacks
    clusters = [i // 13 for i in range(104)]
    assert 0 < mean_stderr(values, clusters)[1] < 1e-15  # type: ignore[operator]
    p, z = 12 / 13, 1.959964
    assert half_width(values, clusters) == pytest.approx(z * np.sqrt(p * (1 - p) / 8 + z * z / 256) / (1 + z * z / 8))


def test_an_interval_of_independent_answers_is_nearly_wilsons() -> None:
    values = [1.0] * 30 + [0.0] * 10
    assert half_width(values, list(range(40))) == pytest.approx(wilson(30, 40), rel=0.05)


def test_answers_that_stand_and_fall_together_count_once() -> None:
    values = [1.0] * 30 + [0.0] * 10
    repeated = [v for v in values for _ in range(4)]
    clusters = [i for i in range(40) for _ in range(4)]
    assert half_width(repeated, clusters) == pytest.approx(wilson(30, 40), rel=0.05)
    assert half_width([1.0] * 32, [i // 4 for i in range(32)]) == pytest.approx(wilson(8, 8))


def test_students_t_is_that_of_the_tables() -> None:
    for degrees, t in ((1, 12.706), (7, 2.365), (15, 2.131), (16, 2.120), (20, 2.086), (40, 2.021), (120, 1.980)):
        assert t95(degrees) == pytest.approx(t, abs=1e-3)


def answers(rng: np.random.Generator, groups: int, shape: tuple[float, float]) -> np.ndarray:
    """Four answers to each of `groups` haystacks that are alike within one; their mean is a/(a + b)."""
    return (rng.random((groups, 4)) < rng.beta(*shape, size=(groups, 1))).astype(float)


def width(values: np.ndarray) -> float:
    return half_width(values.ravel().tolist(), np.repeat(np.arange(len(values)), 4).tolist())


SHAPES = ((2.0, 1.0), (1.0, 1.0), (0.5, 0.5), (6.0, 2.0))


@pytest.mark.parametrize(("groups", "low"), [(8, 0.92), (12, 0.92), (24, 0.925)])
def test_the_interval_holds_the_truth_about_as_often_as_it_says(groups: int, low: float) -> None:
    rng = np.random.default_rng(0)
    held = []
    for a, b in SHAPES:
        for _ in range(250):
            values = answers(rng, groups, (a, b))
            held.append(abs(values.mean() - a / (a + b)) < width(values))
    assert low < np.mean(held) < 0.98


def test_stopping_at_the_first_narrow_interval_leaves_it_nearly_as_true() -> None:
    from halobench.tasks.schedule import _looks

    rng = np.random.default_rng(1)
    held = []
    for a, b in SHAPES:
        for _ in range(120):
            values = answers(rng, 96, (a, b))
            look = next(n for n in _looks(96) if n == 96 or width(values[:n]) < 0.12)
            held.append(abs(values[:look].mean() - a / (a + b)) < width(values[:look]))
    assert np.mean(held) > 0.91


def test_a_number_that_is_no_share_has_no_such_interval() -> None:
    with pytest.raises(ValueError, match="from 0 to 1"):
        half_width([0.5, 70.0], [0, 1])
