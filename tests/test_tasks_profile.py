"""Profiles of pico models: figures that are sane, exact cache sizes, turns, out of memory as a row."""

import os
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch

from halobench.errors import UserError
from halobench.tasks import profile
from halobench.tasks.memory import peak, reset_peak
from halobench.tasks.profile import Rounds, pair_of, profile_at, profile_metrics, profile_model


def test_rows_are_sane(teacher) -> None:  # type: ignore[no-untyped-def]
    rows = profile_model(teacher, [64, 32], batch=2, new_tokens=4, repeats=2, name="pico")
    assert [row.context for row in rows] == [32, 64]
    for row in rows:
        assert row.status == "ok" and row.model == "pico"
        assert row.ttft_s > 0 and row.tpot_ms > 0 and row.tpot_n == 8 and row.prefill_n == 2
        assert row.prefill_tokens_per_s == pytest.approx(2 * row.context / row.ttft_s, rel=0.5)
        kv = 2 * 4 * 2 * 12 * row.context * 4 * 2  # k and v, layers, heads, size, tokens, bytes, sequences
        assert (row.cache_bytes, row.kv_bytes, row.state_bytes) == (kv, kv, 0)
        assert row.parameter_bytes == 4 * row.parameters == sum(p.nbytes for p in teacher.parameters())
        assert row.backend == "cpu float32 sdpa" and row.peak_bytes >= 0


@pytest.mark.skipif(not os.access("/proc/self/clear_refs", os.W_OK), reason="the peak cannot be reset here")
def test_peak_memory_sees_an_allocation_and_forgets_earlier_ones() -> None:
    device = torch.device("cpu")
    before = reset_peak(device)
    torch.ones(50_000_000 // 4)
    assert 45e6 < peak(device) - before < 80e6
    before = reset_peak(device)
    assert peak(device) - before < 20e6


def test_running_out_of_memory_is_a_row(teacher, monkeypatch) -> None:  # type: ignore[no-untyped-def]
    original = teacher.forward

    def forward(input_ids: torch.Tensor, **more: object) -> object:
        if input_ids.shape[1] > 40:
            raise RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 1 bytes.")
        return original(input_ids=input_ids, **more)

    monkeypatch.setattr(teacher, "forward", forward)
    small, large = profile_model(teacher, [32, 64], new_tokens=2, repeats=2)
    assert small.status == "ok"
    assert large.status == "oom" and "can't allocate" in large.error and large.tpot_ms is None
    assert {metric.length for metric in profile_metrics([small, large])} == {32}


def test_another_failure_is_not_called_out_of_memory(teacher, monkeypatch) -> None:  # type: ignore[no-untyped-def]
    monkeypatch.setattr(teacher, "forward", lambda **_: (_ for _ in ()).throw(RuntimeError("shapes do not match")))
    with pytest.raises(RuntimeError, match="shapes do not match"):
        profile_model(teacher, [32])


def test_two_models_are_measured_in_turns_with_ratios(teacher, pico) -> None:  # type: ignore[no-untyped-def]
    larger = pico(num_hidden_layers=12)
    rounds = Rounds(new_tokens=8, repeats=3)
    row = pair_of(*profile_at([("teacher", larger), ("hybrid", teacher)], 128, batch=1, rounds=rounds))
    assert row.cache_ratio == pytest.approx(3.0)
    assert row.tpot.value > 1.2 and row.prefill.value > 0 and row.tpot.low < row.tpot.value < row.tpot.high
    assert (row.teacher.model, row.hybrid.model) == ("teacher", "hybrid")


def test_the_clock_alone_decides_the_times(teacher, monkeypatch) -> None:  # type: ignore[no-untyped-def]
    ticks = iter(range(10_000))
    monkeypatch.setattr(profile, "time", SimpleNamespace(perf_counter=lambda: next(ticks) / 4))
    (row,) = profile_model(teacher, [32], batch=3, new_tokens=4, repeats=2)
    assert (row.ttft_s, row.tpot_ms, row.ttft_stderr, row.tpot_stderr) == (0.25, 250.0, 0.0, 0.0)
    assert row.prefill_tokens_per_s == 3 * 32 * 4 and row.decode_tokens_per_s == 3 * 4
    assert row.ttft_rounds == [0.25, 0.25] and row.tpot_rounds == [250.0, 250.0]


def test_what_slows_the_machine_in_one_round_leaves_the_ratio_alone(teacher, pico, monkeypatch) -> None:  # type: ignore[no-untyped-def]
    other, order = pico(seed=1), []
    monkeypatch.setattr(profile, "_warm_up", lambda *_: None)

    def measured(model: object, ids: object, steps: int, chunk: int, result: profile._Measured) -> None:
        order.append(model is teacher)
        mood = (1.0, 10.0, 3.0)[len(result.ttft)]
        result.ttft.append(mood * (4.0 if model is teacher else 1.0))
        result.steps.append([mood * (0.2 if model is teacher else 0.1)] * steps)

    monkeypatch.setattr(profile, "_prefill_and_decode", measured)
    pair = pair_of(*profile_at([("t", teacher), ("h", other)], 32, batch=1, rounds=Rounds()))
    assert order == [True, False] * 3
    assert (pair.tpot.value, pair.tpot.low, pair.tpot.high) == pytest.approx((2.0, 2.0, 2.0))
    assert pair.prefill.value == pytest.approx(4.0)


def test_the_kernels_that_ran_are_in_the_row(teacher, pico) -> None:  # type: ignore[no-untyped-def]
    (fused,) = profile_model(teacher, [32], new_tokens=1, repeats=1)
    assert fused.kernels == {"prefill": ["flash_for_cpu"], "decode": ["flash_for_cpu"]}
    teacher.set_attn_implementation("eager")
    (eager,) = profile_model(teacher, [32], new_tokens=1, repeats=1)
    assert eager.kernels == {"prefill": [], "decode": []} and eager.backend == "cpu float32 eager"


def test_rows_become_metrics_with_their_spread(teacher) -> None:  # type: ignore[no-untyped-def]
    metrics = {m.task: m for m in profile_metrics(profile_model(teacher, [32], new_tokens=3, repeats=2))}
    assert set(metrics) == {"ttft_s", "tpot_ms", "prefill_tokens_per_s", "cache_bytes", "peak_bytes", "memory_bytes"}
    assert metrics["memory_bytes"].value == metrics["peak_bytes"].value + sum(p.nbytes for p in teacher.parameters())
    assert metrics["tpot_ms"].n == 6 and metrics["tpot_ms"].stderr is not None and metrics["tpot_ms"].length == 32
    assert metrics["prefill_tokens_per_s"].higher_is_better and not metrics["cache_bytes"].higher_is_better


def test_a_larger_batch_is_another_task_and_never_in_the_column_of_batch_1(teacher) -> None:  # type: ignore[no-untyped-def]
    (row,) = profile_model(teacher, [32], new_tokens=1, repeats=1)
    single, larger = ({m.task for m in profile_metrics([replace(row, batch=batch)])} for batch in (1, 4))
    assert larger == {f"{task}_batch_4" for task in single}


def test_learned_positions_are_refused_before_anything_runs(pico) -> None:  # type: ignore[no-untyped-def]
    with pytest.raises(UserError, match="table of 64 positions"):
        profile_model(pico("gpt2", max_position_embeddings=64), [32, 64])


def test_a_window_keeps_what_it_keeps(pico) -> None:  # type: ignore[no-untyped-def]
    model = pico("mistral", sliding_window=16)
    rows = profile_model(model, [32, 64], new_tokens=2, repeats=1)
    assert rows[0].kv_bytes == rows[1].kv_bytes == 2 * 4 * 2 * 12 * 15 * 4
