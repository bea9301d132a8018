"""The table of evaluations at lengths far beyond training: what was found, what was read, time a token and memory.

Reading a token takes the same time in a recurrent layer wherever it stands, and grows with the past in a softmax layer.
A prompt of L tokens therefore takes L (a + b L) seconds; a and b are solved from a model's two shortest readings, and
what longer ones took stands beside what that expects.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from halobench.records import RunRecord
from halobench.reports.footnotes import machine
from halobench.reports.table import MISSING, Markup, clean, number, render, significant
from halobench.units import format_bytes, format_count, format_length

HEADER = [
    "model", "tokens", "needles found", "answer log-likelihood", "tokens read", "separate prompts", "times fewer",
    "ms a token", "over expected", "peak memory",
]  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class _Reading:
    """One task of one model at one length, and the seconds that a token took."""

    record: RunRecord
    row: dict[str, Any]

    @property
    def length(self) -> int:
        return int(self.row["length"])

    @property
    def seconds(self) -> float:
        return float(self.row["seconds"]) / int(self.row["tokens"])

    def metric(self, name: str) -> float | None:
        """The mean over the questions of this reading."""
        asked = (self.row["suite"], self.row["task"], self.length, name)
        found = (m for m in self.record.metrics if (m.suite, m.task, m.length, m.metric) == asked)
        return next((m.value for m in found), None)


def long_table(records: Sequence[RunRecord]) -> str:
    """A Markdown table, a row for each model and length, teachers first, with the hardware it was measured on."""
    ordered = sorted(records, key=lambda record: (record.model.kept is not None, record.model.name))
    rows = [row for record in ordered for row in _rows(record)]
    machines = sorted({machine(record.environment["hardware"]) for record in ordered})
    return (
        f"{render(HEADER, rows)}\n"
        "Needles found: every token of the answer is the likeliest. Tokens read: one reading of the haystack and the "
        "questions behind it. Over expected: time a token over what "
        "a line through the model's two shortest readings gives, which is what softmax layers explain. Peak memory: of "
        f"the whole process. {'; '.join(machines)}."
    )


def _rows(record: RunRecord) -> Iterator[list[str]]:
    found = [_Reading(record=record, row=row) for row in record.details["reading"]["tasks"] if row["tokens"]]
    found.sort(key=lambda reading: reading.length)
    for place, reading in enumerate(found):
        questions, share = int(reading.row["questions"]), reading.metric("accuracy")
        read, plain = int(reading.row["tokens"]), int(reading.row["tokens_plain"])
        yield [
            clean(record.model.name, 60),
            format_length(reading.length),
            Markup(MISSING if share is None else f"{round(share * questions)} of {questions}"),
            number(reading.metric("answer_logprob"), digits=1),
            format_count(read),
            format_count(plain),
            significant(plain / read),
            significant(1000 * reading.seconds),
            significant(reading.seconds / _expected(found, reading.length)) if place > 1 else Markup(MISSING),
            format_bytes(int(reading.row["peak_bytes"])),
        ]


def _expected(found: Sequence[_Reading], length: int) -> float:
    """Seconds a token by the line through the two shortest readings."""
    first, second = found[:2]
    slope = max(0.0, (second.seconds - first.seconds) / (second.length - first.length))
    return first.seconds + slope * (length - first.length)
