"""The leaderboard: records to Markdown, CSV and JSON. Every number in it comes from a record.

Rows stand under their teacher, in the order of needles found beyond the training length. The order is a convenience; a
mark, and a claim in a sentence, needs a significant difference.
"""

from __future__ import annotations

import csv
import io
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from halobench.config import to_dict
from halobench.errors import HalobenchError
from halobench.files import write_json, write_text
from halobench.records import RunRecord
from halobench.reports.columns import Column, beyond_target, columns
from halobench.reports.comparison import Comparisons, compare
from halobench.reports.footnotes import footnotes
from halobench.reports.rows import Group, Key, Row, build_rows, group_by_teacher
from halobench.reports.statements import statements
from halobench.reports.table import MISSING, Markup, escape, number, render
from halobench.units import format_length

_BEST = " best"


def leaderboard_groups(records: Sequence[RunRecord]) -> list[Group]:
    """The groups as the leaderboard shows them, hybrids ordered by needles beyond training, then by label."""
    groups = group_by_teacher(build_rows(records))
    if not groups:
        raise HalobenchError("no record of an evaluated model; run `halobench eval` on a run's models first")
    return [replace(group, hybrids=tuple(sorted(group.hybrids, key=_order(group)))) for group in groups]


def _order(group: Group) -> Any:
    pooled = beyond_target(group)

    def order(row: Row) -> tuple[float, str, str]:
        value = pooled.value(row) if pooled else None
        return (-value[0] if value else 1.0, row.label, row.key)

    return order


def write_leaderboard(
    records: Sequence[RunRecord], path: Path, *, plots: Mapping[str, str] | None = None, seed: int = 0
) -> Path:
    """Writes the leaderboard to `path`, and its rows beside it as .csv and .json.

    Args:
        records: of any kind; models that were neither evaluated nor profiled have no row.
        plots: file names of plots, relative to `path`, with their captions.
        seed: of the bootstrap.
    """
    groups = leaderboard_groups(records)
    marks = [compare(group.rows, _targets(columns(group)), seed=seed) for group in groups]
    parts = ["# Leaderboard", _opening(groups)]
    for group, made in zip(groups, marks, strict=True):
        parts += [f"## {escape(group.name)}", _table(group, made), *_said(group, made, seed), *_others(group)]
    if plots:
        parts += ["## Plots", *(f"![{escape(caption)}]({name})" for name, caption in plots.items())]
    parts += ["## Notes", footnotes(groups, marks, records)]
    write_text(path, "\n\n".join(part.strip("\n") for part in parts) + "\n")
    write_json(path.with_suffix(".json"), _as_json(groups, marks))
    write_text(path.with_suffix(".csv"), _as_csv(groups))
    return path


def short_leaderboard(records: Sequence[RunRecord], seed: int = 0) -> str:
    """Tables and statements alone, without plots and notes, to stand inside another document."""
    parts = []
    for group in leaderboard_groups(records):
        made = compare(group.rows, _targets(columns(group)), seed=seed)
        found = statements(group, made, seed)
        parts += [_table(group, made), "\n".join(f"- {line}" for line in found)]
    return "\n\n".join(part for part in parts if part)


def _opening(groups: Sequence[Group]) -> str:
    hybrids = sum(len(group.hybrids) for group in groups)
    counted = f"{hybrids} hybrid{'s' * (hybrids != 1)} of {len(groups)} teacher{'s' * (len(groups) != 1)}"
    return (
        f"{counted}. Values are ± one standard error. **Bold, best**: ahead of every other hybrid of the same teacher "
        f"by more than noise (paired comparison, Holm-corrected). {MISSING}: not measured."
    )


def _targets(shown: Sequence[Column]) -> list[Any]:
    return [column.target for column in shown if column.target is not None]


def _table(group: Group, made: Comparisons) -> str:
    shown = columns(group)
    return render(
        [c.title for c in shown], [[_cell(c, row, made) for c in shown] for row in group.rows], text_columns=3
    )


def _cell(column: Column, row: Row, made: Comparisons) -> str:
    text = escape(column.cell(row))
    if column.target is not None and made.best(column.target) == row.key:
        return Markup(f"**{text}{_BEST}**")
    return text


def _said(group: Group, made: Comparisons, seed: int) -> list[str]:
    found = statements(group, made, seed)
    return ["### What the numbers say", "\n".join(f"- {line}" for line in found)] if found else []


def _others(group: Group) -> list[str]:
    """What was measured and has no column of its own: one line per metric, one column per model."""
    used = {key for column in columns(group) for key in column.uses} | {("csr", "tiny_continuation", "acc", None)}
    keys = sorted({key for row in group.rows for key in row.measured} - used, key=lambda k: (*k[:3], k[3] or 0))
    if not keys:
        return []
    rows = [[_metric_name(key), *(_other(row, key) for row in group.rows)] for key in keys]
    table = render(["metric", *(row.label for row in group.rows)], rows)
    return ["<details><summary>All other measurements</summary>", table, "</details>"]


def _metric_name(key: Key) -> str:
    suite, task, metric, length = key
    return f"{suite} {task} {metric}" + (f" at {format_length(length)}" if length else "")


def _other(row: Row, key: Key) -> str:
    found = row.metric(*key)
    if found is None:
        return MISSING
    return number(found.value, found.stderr, 3 if abs(found.value) < 100 else 0)


def _plain(row: Row) -> dict[str, Any]:
    metrics = [to_dict(source.metric) | {"samples": None} for _, source in sorted(row.measured.items(), key=str)]
    for metric in metrics:
        del metric["samples"]
    card = row.card
    return {
        "label": row.label,
        "name": card.name,
        "hash": card.hash,
        "selectors": card.selectors,
        "kept": card.kept,
        "positions": card.positions,
        "mixer": card.mixer,
        "layers": card.layers,
        "parameters": card.parameters,
        "trained_length": card.trained_length,
        "tokens": row.tokens,
        "metrics": metrics,
    }


def _as_json(groups: Sequence[Group], marks: Sequence[Comparisons]) -> dict[str, Any]:
    return {
        "groups": [
            {
                "teacher": group.name,
                "rows": [_plain(row) for row in group.rows],
                "comparisons": [to_dict(item) for item in made.items],
            }
            for group, made in zip(groups, marks, strict=True)
        ]
    }


def _as_csv(groups: Sequence[Group]) -> str:
    """One line per measurement. A leading sign that a spreadsheet would run as a formula is quoted."""
    file = io.StringIO()
    writer = csv.writer(file, lineterminator="\n")
    writer.writerow(
        ["teacher", "model", "hash", "kept", "positions", "suite", "task", "metric", "length", "value", "stderr", "n"]
    )
    for group in groups:
        for row in group.rows:
            kept = "all" if row.card.kept is None else " ".join(map(str, row.card.kept))
            known = [group.name, row.label, row.card.hash, kept, row.card.positions]
            for (suite, task, metric, length), source in sorted(row.measured.items(), key=str):
                m = source.metric
                texts = [_safe(text) for text in (*known, suite, task, metric)]
                writer.writerow([*texts, length, m.value, m.stderr, m.n])
    return file.getvalue()


def _safe(text: str) -> str:
    return f"'{text}" if text[:1] in ("=", "+", "-", "@", "\t", "\r") else text
