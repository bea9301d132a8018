"""The small print of a leaderboard: what each column means, how many samples stand behind a cell, how differences were
tested, and the seeds, versions and hardware of the runs."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from halobench.records import RunRecord
from halobench.reports.columns import columns, table_columns
from halobench.reports.comparison import FLIPS, RESAMPLES, Comparisons
from halobench.reports.pairing import independent_groups
from halobench.reports.rows import IMPORTED, Group, Row
from halobench.reports.table import MISSING, clean, escape, render
from halobench.units import format_bytes, format_count, format_length


def footnotes(groups: Sequence[Group], marks: Sequence[Comparisons], records: Sequence[RunRecord]) -> str:
    """All notes as Markdown, and a table of the models."""
    listed = "\n".join(f"- {note}" for note in notes(groups, marks, records))
    return listed + "\n\n" + render(*models([row for group in groups for row in group.rows]), text_columns=3)


def notes(groups: Sequence[Group], marks: Sequence[Comparisons], records: Sequence[RunRecord]) -> list[str]:
    """Each note as a line of Markdown."""
    rows = [row for group in groups for row in group.rows]
    return [
        *_meanings(groups, marks),
        "**±** is one standard error over the questions. ±0.000 means that every independent group of questions (a "
        "haystack, a document) gave the same share, not that the score is exact: with g groups the true rate may still "
        "lie about 3/g away.",
        _tests(marks),
        *_counts(groups),
        *_environment(rows),
        *_seeds(records),
        *_failures(rows),
        *_flaws(rows),
        *_imports(rows),
    ]


def _meanings(groups: Sequence[Group], marks: Sequence[Comparisons]) -> list[str]:
    shown = [(group.name, c) for group, made in zip(groups, marks, strict=True) for c in table_columns(group, made)]
    found = {(column.title, column.meaning): name for name, column in shown if column.meaning}
    titles = Counter(title for title, _ in found)
    lengths = sorted({group.trained_length for group in groups if group.trained_length})
    trained = f" ({', '.join(map(format_length, lengths))} tokens)" if lengths else ""
    needles = (
        "**needles**: share of questions answered with the planted value, by context length; ×k is k times the "
        f"longest length the hybrids were trained on{trained}"
    )
    said = [
        f"**{title}**{f', {escape(name)}' if titles[title] > 1 else ''}: {escape(meaning)}"
        for (title, meaning), name in found.items()
    ]
    return [*said, needles]


def _tests(marks: Sequence[Comparisons]) -> str:
    tested = sum(made.tested for made in marks)
    return (
        f"**Comparisons**: {tested} behind the marks, Holm-corrected per teacher at 5%. Samples are paired question by "
        "question, questions about one haystack being kept together; the paired difference weighs all samples alike, "
        f"where bits per byte itself weighs documents by size. Intervals by bootstrap ({RESAMPLES:,} resamples), "
        f"p-values by sign flips (all if few, else {FLIPS:,} or more); without samples, from the two standard errors; "
        "without those, no claim."
    )


def _counts(groups: Sequence[Group]) -> list[str]:
    found = []
    for group in groups:
        parts = []
        for column in columns(group):
            counts, groupings = set(), set()
            for row in group.rows:
                sources = [row.measured[key] for key in column.uses if key in row.measured]
                counts.add(sum(source.metric.n for source in sources))
                groupings.add(sum(independent_groups(row, source) for source in sources))
            counts -= {0}
            if counts and column.target is not None:
                grouped = f" in {_range(groupings - {0})} groups" if groupings - {0} != counts else ""
                parts.append(f"{column.title} {_range(counts)}{grouped}")
        if parts:
            found.append(f"**n per cell**, {escape(group.name)}: {'; '.join(parts)}")
    return found


def _range(counts: set[int]) -> str:
    low, high = min(counts), max(counts)
    return f"{low}" + (f" to {high}" if high > low else "")


def _environment(rows: Sequence[Row]) -> list[str]:
    own = [row for row in rows if not row.imported]
    measured = [record for row in own for record in row.records if record.kind in ("eval", "profile")]
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
    parts += [_counted(found, key) for key in ("cores", "threads") if found.get(key)]
    if isinstance(found.get("memory"), int | float):
        parts.append(format_bytes(found["memory"]))
    return ", ".join(parts)


def machine(hardware: Mapping[str, Any], device: str = "cpu") -> str:
    """What decides the speed on a device, from a record's environment: the GPU, or the processor and threads."""
    if device == "cuda":
        return str(hardware["gpu"])
    return f"{clean(str(hardware['processor']), 60)}, {_counted(hardware, 'threads')}"


def _counted(hardware: Mapping[str, Any], what: str) -> str:
    number = hardware[what]
    return f"{number} {what.removesuffix('s') if number == 1 else what}"


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


def _flaws(rows: Sequence[Row]) -> list[str]:
    return [
        f"**Not finite** (NaN or infinite, so left out), {escape(row.label)}: {escape(', '.join(row.flaws))}"
        for row in rows
        if row.flaws
    ]


def _imports(rows: Sequence[Row]) -> list[str]:
    """What every reader must know of rows that were measured elsewhere."""
    return [
        f"**{escape(row.label)}** was measured elsewhere: imported from the results that "
        f"{escape(row.records[-1].lineage[IMPORTED])} wrote. These hold no samples, so the row is not paired with the "
        "others and takes no part in marks and claims."
        for row in rows
        if row.imported
    ]


def models(rows: Sequence[Row]) -> tuple[list[str], list[list[str]]]:
    """Header and cells of the table that says what each row is."""
    header = ["row", "model", "mixer", "parameters", "trained at", "hash"]
    return header, [
        [
            row.label,
            row.card.name,
            row.card.mixer or MISSING,
            format_count(row.card.parameters) if row.card.parameters else MISSING,
            format_length(row.card.trained_length) if row.card.trained_length else MISSING,
            row.card.hash or MISSING,
        ]
        for row in rows
    ]


def _distinct(values: Iterable[str]) -> list[str]:
    return list(dict.fromkeys(values))
