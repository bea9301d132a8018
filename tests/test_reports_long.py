"""The table of evaluations far beyond training: what it computes from records, and in what order."""

from __future__ import annotations

from typing import Any

from halobench.records import Metric, ModelCard, RunRecord
from halobench.reports.long_context import long_table


def record(name: str, kept: list[int] | None, seconds: dict[int, float]) -> RunRecord:
    """Needles at each length: half of them found, and the time the whole reading took."""
    card = ModelCard(name=name, path=name, hash=name, layers=2, parameters=10, teacher="tiny", kept=kept)
    rows: list[dict[str, Any]] = [
        {
            "suite": "grid", "task": "depths-13", "length": length, "samples": 1, "questions": 13, "stopped": "count",
            "tokens": length, "tokens_plain": 13 * length, "truncated": 0, "prompt_tokens": length, "seconds": took,
            "peak_bytes": 2**30,
        }
        for length, took in seconds.items()
    ]  # fmt: skip
    metrics = [
        Metric(suite="grid", task="depths-13", metric=metric, value=value, n=13, length=length)
        for length in seconds
        for metric, value in (("accuracy", 7 / 13), ("answer_logprob", -2.0))
    ]
    return RunRecord(kind="eval", model=card, metrics=metrics, details={"reading": {"tasks": rows}})


def cells(line: str) -> list[str]:
    return [cell.strip() for cell in line.strip("| ").split("|")]


def test_time_beyond_what_softmax_layers_explain_is_shown_from_the_third_length_on() -> None:
    """A token takes 1 + length / 1000 ms, and at 8,000 tokens twice what that gives."""
    seconds = {1000: 2.0, 2000: 6.0, 4000: 20.0, 8000: 144.0}
    table = long_table([record("hybrid", [1], seconds)]).splitlines()[2:6]
    assert [cells(line)[-2] for line in table] == ["–", "–", "1.00", "2.00"]
    assert [cells(line)[-3] for line in table] == ["2.00", "3.00", "5.00", "18.0"]


def test_the_teacher_stands_first_and_what_was_saved_beside_what_was_found() -> None:
    made = [record("a <b>hybrid", [1], {4000: 1.0}), record("tiny", None, {2000: 1.0})]
    first, second = long_table(made).splitlines()[2:4]
    assert cells(first)[0] == "tiny" and "&lt;b&gt;" in second
    assert cells(second)[2:7] == ["7 of 13", "-2.0", "4K", "52K", "13.0"]
