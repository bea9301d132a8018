"""Ratios of paired rounds, the context of overtaking, and the machine's rates, each against a hand computation."""

import math
from itertools import count

import pytest
import torch

from halobench.tasks import machine
from halobench.tasks.machine import measure_machine
from halobench.tasks.paired import Ratio, cache_overtaking, overtaking, paired_ratio


def ratios(*values: float, spread: float = 1.0) -> list[Ratio]:
    return [Ratio(value=v, low=v / spread, high=v * spread) for v in values]


def test_the_interval_of_a_ratio_is_students_on_the_logarithms() -> None:
    found = paired_ratio([1.0, 2.0, 4.0], [1.0, 1.0, 1.0])
    half = 4.303 * math.log(2) / math.sqrt(3)  # two degrees of freedom, standard deviation log 2
    assert found.value == pytest.approx(2.0)
    assert (math.log(found.low), math.log(found.high)) == pytest.approx((math.log(2) - half, math.log(2) + half))


def test_a_single_round_has_no_interval() -> None:
    found = paired_ratio([3.0], [2.0])
    assert found.value == pytest.approx(1.5) and found.low is None and found.high is None


def test_overtaking_is_interpolated_between_measured_contexts() -> None:
    found = overtaking("tpot", 1, [100, 10_000], ratios(0.5, 2.0))
    assert found.state == "within" and found.context == pytest.approx(1000)  # halfway in logarithms
    assert (found.shortest, found.longest) == (100, 10_000)


def test_the_interval_of_overtaking_comes_from_the_bounds_of_the_ratio() -> None:
    found = overtaking("tpot", 1, [100, 10_000], ratios(0.25, 4.0, spread=2.0))
    assert found.context == pytest.approx(1000)
    assert found.low == pytest.approx(100 * 100 ** (1 / 4))  # the upper bound goes from 1/2 to 8
    assert found.high == pytest.approx(100 * 100 ** (3 / 4))  # the lower bound goes from 1/8 to 2


def test_a_bound_beyond_the_measured_contexts_is_none_and_said() -> None:
    found = overtaking("tpot", 1, [100, 10_000], ratios(0.5, 1.5, spread=3.0))
    assert found.state == "within" and found.low is None and found.high is None
    assert "(95%: before to beyond)" in found.line()


def test_what_is_never_overtaken_is_not_reached() -> None:
    found = overtaking("prefill", 2, [512, 8192], ratios(0.3, 0.9))
    assert (found.state, found.context) == ("not reached", None)
    assert found.line() == "prefill, batch 2: not within the range (measured from 512 to 8,192)"


def test_what_is_better_from_the_start_has_no_context() -> None:
    found = overtaking("tpot", 1, [512, 8192], ratios(1.1, 3.0))
    assert (found.state, found.context) == ("before", None) and "from the shortest context" in found.line()


def test_a_lead_that_is_lost_again_does_not_count() -> None:
    found = overtaking("tpot", 1, [10, 100, 1000, 10_000], ratios(0.5, 2.0, 0.5, 2.0))
    assert found.context == pytest.approx(1000 * math.sqrt(10))
    assert overtaking("tpot", 1, [10, 100, 1000], ratios(0.5, 2.0, 0.5)).state == "not reached"


def test_caches_cross_at_the_first_context_that_is_smaller() -> None:
    found = cache_overtaking(1, lambda n: 10 * n, lambda n: 1000 + 2 * n)
    assert found.context == 126  # 1000 + 2 n < 10 n from 125 on, and not at 125
    assert found.line() == "cache, batch 1: at 126 tokens, exactly"
    assert cache_overtaking(1, lambda n: 10 * n, lambda n: n).state == "before"
    assert cache_overtaking(1, lambda n: 10 * n, lambda n: 10 * n).state == "not reached"


def test_rates_are_what_was_moved_over_the_time() -> None:
    ticks = count()
    found = measure_machine(
        torch.device("cpu"), torch.float32, buffer_bytes=4096, matmul_size=8, clock=lambda: next(ticks) / 2
    )
    assert found.copy_bytes_per_s == 2 * 4096 * 2 and found.read_bytes_per_s == 4096 * 2
    assert found.bytes_per_s == found.copy_bytes_per_s and found.flops_per_s == 2 * 8**3 * 2
    assert found.copy_stderr == found.read_stderr == found.flops_stderr == 0


def test_the_limit_of_the_control_group_bounds_what_is_free(tmp_path, monkeypatch) -> None:  # type: ignore[no-untyped-def]
    monkeypatch.setattr(machine, "_CGROUP", tmp_path)
    for name, text in (
        ("memory.max", "5000\n"),
        ("memory.current", "3000\n"),
        ("memory.stat", "anon 2500\nfile 500\n"),
    ):
        (tmp_path / name).write_text(text)
    assert machine.available_bytes(torch.device("cpu")) == 2500
    (tmp_path / "memory.max").write_text("max\n")
    assert machine.available_bytes(torch.device("cpu")) > 2500
