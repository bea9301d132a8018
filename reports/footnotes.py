"""The small print of a leaderboard: what each column means, how many samples stand behind a cell, how differences were
tested, and the seeds, versions and hardware of the runs."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

from halobench.records import RunRecord
from halobench.reports.columns import columns
from halobench.reports.comparison import FLIPS, RESAMPLES, Comparisons
from halobench.reports.rows import Group, Row
from halobench.reports.table import MISSING, escape, render
from halobench.units import format_bytes, format_count, format_length


def footnotes(groups: Sequence[Group], marks: Sequence[Comparisons], records: Sequence[RunRecord]) -> str:
    """All notes as Markdown."""
    rows = [row for group in groups for row in group.rows]
    notes = [
        *_meanings(groups),
        "**±** is one standard error over the questions. ±0.000 means that every answer was the same, not that the "
        "score is exact: with n questions the true rate may still lie about 3/n away.",
        _tests(marks),
        *_counts(groups),
        *_environment(rows),
        *_seeds(records),
        *_failures(rows),
    ]
    return "\n".join(f"- {note}" for note in notes) + "\n\n" + _models(rows)


def _meanings(groups: Sequence[Group]) -> list[str]:
    found = {c.title: c.meaning for group in groups for c in columns(group) if c.meaning}
    lengths = sorted({group.trained_length for group in groups if group.trained_length})
    trained = f" ({', '.join(map(format_length, lengths))} tokens)" if lengths else ""
    needles = (
        "**needles**: share of questions answered with the planted value, by context length; ×k is k times the "
        f"longest length the hybrids were trained on{trained}"
    )
    return [*(f"**{title}**: {escape(meaning)}" for title, meaning in found.items()), needles]


def _tests(marks: Sequence[Comparisons]) -> str:
    tested = sum(made.tested for made in marks)
    return (
        f"**Comparisons**: {tested} behind the marks, Holm-corrected per teacher at 5%. Samples are paired question by "
        "question, questions about one haystack being kept together; the paired difference weighs all samples alike, "
        f"where bits per byte itself weighs documents by size. Intervals by bootstrap ({RESAMPLES:,} resamples), "
        f"p-values by sign flips ({FLIPS:,}); without samples, from the two standard errors; without those, no claim."
    )


def _counts(groups: Sequence[Group]) -> list[str]:
    found = []
    for group in groups:
        parts = []
        for column in columns(group):
            counts = {
                sum(row.measured[key].metric.n for key in column.uses if key in row.measured) for row in group.rows
            }
            counts -= {0}
            if counts and column.target is not None:
                low, high = min(counts), max(counts)
                parts.append(f"{column.title} {low}" + (f" to {high}" if high > low else ""))
        if parts:
            found.append(f"**n per cell**, {escape(group.name)}: {'; '.join(parts)}")
    return found


def _environment(rows: Sequence[Row]) -> list[str]:
    measured = [record for row in rows for record in row.records if record.kind in ("eval", "profile")]
    versions = _distinct(_versions(record) for record in measured)
    machines = _distinct(_hardware(record) for record in measured)
    speeds = _distinct(_hardware(record) for record in measured if record.kind == "profile")
    backends = _distinct(f"{name}: {used}" for record in measured for name, used in record.backends.items())
    notes = [
        f"**{title}**: {escape('; '.join(found))}" for title, found in (("Versions", versions), ("Hardware", machines))
    ]
    if len(speeds) > 1:
        notes.append("**Speed was measured on different machines**: compare TPOT only between rows of one machine.")
    return notes + ([f"**Backends**: {escape('; '.join(backends))}"] if backends else [])


def _versions(record: RunRecord) -> str:
    found = record.environment.get("versions")
    return (
        ", ".join(f"{name} {number}" for name, number in found.items()) if isinstance(found, dict) else "not recorded"
    )


def _hardware(record: RunRecord) -> str:
    found = record.environment.get("hardware")
    if not isinstance(found, dict):
        return "not recorded"
    parts = [str(found["gpu"])] if found.get("gpu") else []
    parts.append(str(found.get("processor") or "processor not recorded"))
    parts += [f"{found[key]} {key}" for key in ("cores", "threads") if found.get(key)]
    if isinstance(found.get("memory"), int | float):
        parts.append(format_bytes(found["memory"]))
    return ", ".join(parts)


def _seeds(records: Sequence[RunRecord]) -> list[str]:
    found: dict[str, list[str]] = {}
    for record in records:
        found.setdefault(record.kind, []).extend(_named_seed(record.settings))
    found = {kind: seeds for kind, seeds in found.items() if seeds}
    shown = "; ".join(f"{what} {', '.join(_distinct(values))}" for what, values in sorted(found.items()))
    return [f"**Seeds**: {escape(shown) if shown else 'not recorded'}"]


def _named_seed(settings: Any) -> list[str]:
    """Every value called "seed" in settings, however deep."""
    if not isinstance(settings, dict):
        return []
    own = [str(settings["seed"])] if "seed" in settings else []
    return own + [seed for value in settings.values() for seed in _named_seed(value)]


def _failures(rows: Sequence[Row]) -> list[str]:
    return [
        f"**Failed**: {kind} of {escape(row.label)}: {escape(reason)}"
        for row in rows
        for kind in ("eval", "profile")
        for reason in _distinct(row.failures(kind))
    ]


def _models(rows: Sequence[Row]) -> str:
    header = ["row", "model", "mixer", "parameters", "trained at", "hash"]
    return render(
        header,
        [
            [
                row.label,
                row.card.name,
                row.card.mixer or MISSING,
                format_count(row.card.parameters),
                format_length(row.card.trained_length) if row.card.trained_length else MISSING,
                row.card.hash or MISSING,
            ]
            for row in rows
        ],
        text_columns=3,
    )


def _distinct(values: Iterable[str]) -> list[str]:
    return list(dict.fromkeys(values))
