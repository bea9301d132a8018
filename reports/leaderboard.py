"""The leaderboard: records to Markdown, CSV and JSON. Every number in it comes from a record.

Rows stand under their teacher, in the order of needles found beyond the training length or of a chosen column. The
order is a convenience; a mark, and a claim in a sentence, needs a significant difference.
"""

from __future__ import annotations

import csv
import html
import io
import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import combinations
from typing import Any

from halobench.config import to_dict
from halobench.errors import HalobenchError, UserError
from halobench.records import RunRecord
from halobench.reports.columns import TEXT_COLUMNS, Column, beyond_target, columns, standing_targets, table_columns
from halobench.reports.comparison import Comparisons, compare
from halobench.reports.footnotes import footnotes
from halobench.reports.rows import IMPORTED, Group, Key, Measured, Row, build_rows, group_by_teacher, metric_name
from halobench.reports.standing import MARGIN
from halobench.reports.statements import statements
from halobench.reports.table import MISSING, Markup, clean, escape, number, render

_BEST = " best"


@dataclass(frozen=True, kw_only=True)
class Board:
    """Everything that leaderboard and page are made from. marks, said: comparisons and sentences of each group.

    sort, margin: as make_board was asked for.
    """

    sort: str | None
    margin: float
    records: tuple[RunRecord, ...]
    groups: tuple[Group, ...]
    marks: tuple[Comparisons, ...]
    said: tuple[tuple[str, ...], ...]


def make_board(
    records: Sequence[RunRecord], *, sort: str | None = None, margin: float = MARGIN, seed: int = 0
) -> Board:
    """Groups, orders and compares the records.

    Args:
        records: of any kind; models that were neither evaluated nor profiled have no row.
        sort: a column's title, or a part of it that no other has; None is needles beyond the training length.
        margin: how much worse than its teacher a hybrid may be and still count as good as it (a share of answers).
        seed: of the bootstrap.
    """
    if not 0 < margin < 1:
        raise UserError(f"--margin {margin:g} is not a share of answers; give a number between 0 and 1, such as 0.02")
    groups = leaderboard_groups(records)
    marks = [
        compare(
            group.compared,
            _targets(columns(group)),
            pairs=list(combinations(group.hybrids, 2)),
            teacher=group.teacher,
            standing=list(standing_targets(group).values()),
            margin=margin,
            seed=seed,
        )
        for group in groups
    ]
    groups = groups if sort is None else _by_title(groups, marks, sort)
    said = [tuple(statements(group, made, seed)) for group, made in zip(groups, marks, strict=True)]
    return Board(
        sort=sort,
        margin=margin,
        records=tuple(records),
        groups=tuple(groups),
        marks=tuple(marks),
        said=tuple(said),
    )


def leaderboard_groups(records: Sequence[RunRecord]) -> list[Group]:
    """The groups as the leaderboard shows them, hybrids ordered by needles beyond training."""
    groups = group_by_teacher(build_rows(records))
    if not groups:
        raise HalobenchError("no record of an evaluated model; run `halobench eval` on a run's models first")
    return [_sorted(group, _by_needles(group)) for group in groups]


def _by_title(groups: Sequence[Group], marks: Sequence[Comparisons], sort: str) -> list[Group]:
    """The groups ordered by the column that `sort` names; nothing that was compared depends on it."""
    shown = [table_columns(group, made) for group, made in zip(groups, marks, strict=True)]
    title = _chosen(sort, list(dict.fromkeys(plain(column.title) for found in shown for column in found)))
    return [_sorted(group, _by_column(found, title)) for group, found in zip(groups, shown, strict=True)]


def _sorted(group: Group, order: Any) -> Group:
    hybrids, imported = (tuple(sorted(rows, key=order)) for rows in (group.hybrids, group.imported))
    return replace(group, hybrids=hybrids, imported=imported)


def _by_needles(group: Group) -> Any:
    pooled = beyond_target(group)

    def order(row: Row) -> tuple[float, str, str]:
        value = pooled.value(row) if pooled else None
        return (-value[0] if value else 1.0, row.label, row.key)

    return order


def _by_column(shown: Sequence[Column], title: str) -> Any:
    """Best first, what is not measured last."""
    column = next((column for column in shown if plain(column.title) == title), None)

    def order(row: Row) -> tuple[bool, Any, str, str]:
        value = column.order(row) if column else None
        if column and column.falling and isinstance(value, int | float):
            value = -value
        return (value is None, 0 if value is None else value, row.label, row.key)

    return order


def _chosen(wanted: str, titles: Sequence[str]) -> str:
    """The title that is `wanted`, or the only one that contains it."""
    exact = [title for title in titles if title.casefold() == wanted.casefold()]
    within = exact or [title for title in titles if wanted and wanted.casefold() in title.casefold()]
    if len(within) == 1:
        return within[0]
    what = f"fits {len(within)} columns" if within else "is no column"
    raise UserError(f"--sort {wanted!r} {what}; the columns are: {'; '.join(within or titles)}")


def plain(markup: str) -> str:
    """Markdown of one line as the text it shows."""
    return html.unescape(re.sub(r"\\(.)|\*\*", lambda found: found[1] or "", markup))


def board_files(board: Board, plots: Mapping[str, str]) -> dict[str, str]:
    """The texts of leaderboard.md, .csv and .json by name. plots: files beside them, with their captions."""
    parts = ["# Leaderboard", opening(board.groups)]
    for group, made, said in zip(board.groups, board.marks, board.said, strict=True):
        parts += [f"## {escape(group.name)}", _table(group, made)]
        parts += ["### What the numbers say", "\n".join(f"- {line}" for line in said)] if said else []
        parts += _others(group)
    if plots:
        parts += ["## Plots", *(f"![{escape(caption)}]({name})" for name, caption in plots.items())]
    parts += ["## Notes", footnotes(board.groups, board.marks, board.records)]
    return {
        "leaderboard.md": "\n\n".join(part.strip("\n") for part in parts) + "\n",
        "leaderboard.csv": _as_csv(board.groups),
        "leaderboard.json": json.dumps(_rounded(_as_json(board)), indent=1, ensure_ascii=False, allow_nan=False) + "\n",
    }


def short_leaderboard(records: Sequence[RunRecord], seed: int = 0) -> str:
    """Tables and statements alone, without plots and notes, to stand inside another document."""
    board = make_board(records, seed=seed)
    parts = []
    for group, made, said in zip(board.groups, board.marks, board.said, strict=True):
        parts += [_table(group, made), "\n".join(f"- {line}" for line in said)]
    return "\n\n".join(part for part in parts if part)


def opening(groups: Sequence[Group]) -> str:
    """What is compared and how to read it, as Markdown."""
    own = [group for group in groups if group.compared]
    hybrids, imported = (sum(map(len, found)) for found in ([g.hybrids for g in own], [g.imported for g in groups]))
    said = [f"{_counted(hybrids, 'hybrid')} of {_counted(len(own), 'teacher')}"] if hybrids else []
    said += [_counted(len(own), "model")] if own and not hybrids else []
    said += [f"{_counted(imported, 'row')} from another harness"] if imported else []
    return (
        f"{', '.join(said)}. Values are ± one standard error. **Bold, best**: ahead of every other hybrid of the same "
        f"teacher by more than noise (paired comparison, Holm-corrected). {MISSING}: not measured."
    )


def _counted(count: int, what: str) -> str:
    return f"{count} {what}{'s' * (count != 1)}"


def _targets(shown: Sequence[Column]) -> list[Any]:
    return [column.target for column in shown if column.target is not None]


def _table(group: Group, made: Comparisons) -> str:
    shown = table_columns(group, made)
    return render(
        [c.title for c in shown],
        [[cell(c, row, made) for c in shown] for row in group.rows],
        text_columns=TEXT_COLUMNS,
    )


def cell(column: Column, row: Row, made: Comparisons) -> Markup:
    """One cell as Markdown, bold and marked where the row is significantly best."""
    text = escape(column.cell(row))
    if column.target is not None and made.best(column.target) == row.key:
        return Markup(f"**{text}{_BEST}**")
    return text


def _others(group: Group) -> list[str]:
    """What has no column of its own, folded away."""
    header, found = other_measurements(group)
    if not found:
        return []
    table = render(header, [[name, *(text for text, _ in cells)] for name, cells in found])
    return ["<details><summary>All other measurements</summary>", table, "</details>"]


def other_measurements(group: Group) -> tuple[list[str], list[tuple[str, list[tuple[str, float | None]]]]]:
    """What was measured and has no column of its own: titles, and for each metric its cells with their values."""
    means = [column for column in columns(group) if column.target is not None and column.target.also]
    used = {key for column in columns(group) for key in column.uses if column not in means}
    used.add(("csr", "tiny_continuation", "acc", None))
    keys = sorted({key for row in group.rows for key in row.measured} - used, key=lambda k: (*k[:3], k[3] or 0))
    found = [(metric_name(key), [_other(row, key) for row in group.rows]) for key in keys]
    return ["metric", *(row.label for row in group.rows)], found


def _other(row: Row, key: Key) -> tuple[str, float | None]:
    found = row.metric(*key)
    if found is None:
        return MISSING, None
    return number(found.value, found.stderr, 3 if abs(found.value) < 100 else 0), found.value


def _plain(row: Row) -> dict[str, Any]:
    each = ("samples", "clusters", "depths")
    metrics = [
        {name: value for name, value in to_dict(source.metric).items() if name not in each}
        for _, source in _listed(row)
    ]
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
        "measured_by": row.records[-1].lineage.get(IMPORTED, "halobench"),
        "metrics": metrics,
    }


def _listed(row: Row) -> list[tuple[Key, Measured]]:
    """Everything measured on a row, by name and then by length."""
    return sorted(row.measured.items(), key=lambda item: (*item[0][:3], item[0][3] or 0))


def _rounded(found: Any) -> Any:
    """Plain data with nine significant digits, which every machine agrees on."""
    if isinstance(found, dict):
        return {key: _rounded(value) for key, value in found.items()}
    if isinstance(found, list):
        return [_rounded(value) for value in found]
    return float(f"{found:.9g}") if isinstance(found, float) else found


def _as_json(board: Board) -> dict[str, Any]:
    return {
        "sort": board.sort,
        "margin": board.margin,
        "groups": [
            {
                "teacher": group.name,
                "rows": [_plain(row) for row in group.rows],
                "comparisons": [to_dict(item) for item in made.items],
                "standings": [to_dict(item) for item in made.standings],
            }
            for group, made in zip(board.groups, board.marks, strict=True)
        ],
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
            for (suite, task, metric, length), source in _listed(row):
                m = source.metric
                texts = [_safe(text) for text in (*known, suite, task, metric)]
                writer.writerow([*texts, length, m.value, m.stderr, m.n])
    return file.getvalue()


def _safe(text: str) -> str:
    shown = clean(text)
    return f"'{shown}" if shown[:1] in ("=", "+", "-", "@") else shown
