"""The page: everything a report says, in one HTML file that loads nothing and runs one script, which sorts tables.

A content security policy with that script's hash forbids the rest, so that no text of a record could ever run.
"""

from __future__ import annotations

import base64
import hashlib
import html
import json
import math
from collections.abc import Mapping, Sequence
from importlib.resources import files
from typing import Any

from halobench.config import to_dict
from halobench.records import RunRecord
from halobench.reports import palette
from halobench.reports.columns import TEXT_COLUMNS
from halobench.reports.figures import SCALE, Lines, figures, thinned, training_lines, training_scenes
from halobench.reports.footnotes import models, notes
from halobench.reports.layer_bars import (
    LEGEND,
    kept_layers,
    layer_numbers,
    layer_scenes,
    layers_title,
    scored_layers,
)
from halobench.reports.leaderboard import Board, cell, opening, other_measurements, table_columns
from halobench.reports.markup import Cell, Head, facts, inline, table
from halobench.reports.rows import methods
from halobench.reports.scene import Scene, to_svg
from halobench.reports.table import MISSING, Markup, clean, number, significant
from halobench.units import format_count, format_seconds

_LISTED = 12  # points of a training curve, at most


def page(board: Board) -> str:
    """The whole document."""
    assets = files("halobench.reports") / "assets"
    script, style = ((assets / name).read_text(encoding="utf-8") for name in ("report.js", "report.css"))
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    policy = f"default-src 'none'; style-src 'unsafe-inline'; img-src data:; script-src 'sha256-{digest}'"
    sections = _sections(board)
    links = "".join(f'<li><a href="#{name}">{html.escape(title)}</a></li>' for name, title, _ in sections)
    body = "".join(
        f'<section aria-labelledby="{name}"><h2 id="{name}">{html.escape(title)}</h2>{text}</section>'
        for name, title, text in sections
    )
    return (
        '<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        f'<meta http-equiv="Content-Security-Policy" content="{policy}">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        '<meta name="color-scheme" content="light dark">\n<link rel="icon" href="data:,">\n'
        f"<title>{html.escape(_title(board))}</title>\n<style>{palette.variables()}\n{style}</style>\n</head>\n<body>\n"
        '<a class="skip" href="#content">Skip to the results</a>\n'
        f'<header class="wrap"><h1>{html.escape(_title(board))}</h1><p class="lead">{inline(opening(board.groups))}</p>'
        f'<nav aria-label="Sections"><ul>{links}</ul></nav></header>\n'
        f'<main class="wrap" id="content" tabindex="-1">{body}</main>\n'
        '<p class="unseen" id="said" role="status" aria-live="polite"></p>\n'
        f"<script>{script}</script>\n</body>\n</html>\n"
    )


def _title(board: Board) -> str:
    made = [group for group in board.groups if group.hybrids]
    return f"{'Hybrids of ' if made else ''}{', '.join(clean(group.name, 60) for group in made or board.groups)}"


def _sections(board: Board) -> list[tuple[str, str, str]]:
    """(anchor, title, HTML) of every section that has something to show."""
    found: list[tuple[str, str, str]] = []
    for i, group in enumerate(board.groups):
        drawn = figures(group)
        name = f": {clean(group.name, 60)}" if len(board.groups) > 1 else ""
        parts = (
            ("said", "What the numbers say", _claims(board.said[i])),
            ("table", "Leaderboard", _leaderboard(board, i)),
            ("tradeoff", "Quality against speed and memory", _charts(drawn.tradeoffs)),
            ("length", "Over context length", _charts(drawn.curves)),
            ("depth", "Where needles are found", _charts(drawn.heat)),
        )
        found += [(f"{anchor}-{i}", title + name, text) for anchor, title, text in parts]
    found += [
        ("layers", "Which layers stay softmax", _layers(board.records)),
        ("training", "Training", _training(board)),
        ("notes", "Notes", _notes(board)),
        ("records", "Environment and lineage", _records(board.records)),
    ]
    return [(anchor, title, text) for anchor, title, text in found if text]


def _claims(said: Sequence[str]) -> str:
    return f'<ul class="claims">{"".join(f"<li>{inline(line)}</li>" for line in said)}</ul>' if said else ""


def _leaderboard(board: Board, index: int) -> str:
    group, made = board.groups[index], board.marks[index]
    shown = table_columns(group, made)
    heads = [Head(text=column.title, first="descending" if column.falling else "ascending") for column in shown]
    rows = [[Cell(text=cell(c, row, made), order=c.order(row)) for c in shown] for row in group.rows]
    caption = f"{group.name}: press a column's title to sort"
    parts = [table(caption, heads, rows, TEXT_COLUMNS)]
    header, others = other_measurements(group)
    if others:
        cells = [
            [Cell(text=name, order=clean(name)), *(Cell(text=text, order=order) for text, order in found)]
            for name, found in others
        ]
        heads = [Head(text=text) for text in header]
        inner = table("All other measurements", heads, cells)
        parts.append(_folded(f"All other measurements ({len(others)})", inner))
    return "".join(parts)


def _charts(scenes: Sequence[Scene]) -> str:
    drawn = "".join(f"<figure>{to_svg(scene)}</figure>" for scene in scenes)
    return f'<div class="charts">{drawn}</div>' if drawn else ""


def _layers(records: Sequence[RunRecord]) -> str:
    chosen = [record for record in records if methods(record)]
    return "".join(
        f"<h3>{html.escape(clean(record.model.name, 80))}</h3><p>{html.escape(layers_title(methods(record)))}.</p>"
        f'<p class="note">{LEGEND}</p>{_charts(layer_scenes(record))}{_layer_scores(record)}'
        for record in chosen
    )


def _layer_scores(record: RunRecord) -> str:
    """What the charts of the layers show, as a folded table."""
    found, layers = methods(record), scored_layers(record)
    columns = [
        (set(kept_layers(e)), layer_numbers(e.get("scores"), layers), layer_numbers(e.get("stderr"), layers))
        for e in found.values()
    ]
    rows = [
        [
            Cell(text=str(layer), order=layer),
            *(_score(layer in kept, scores[layer], errors[layer]) for kept, scores, errors in columns),
        ]
        for layer in range(layers)
    ]
    names = [clean(str(entry.get("label") or name), 40) for name, entry in found.items()]
    heads = [Head(text="layer"), *(Head(text=name, first="descending") for name in names)]
    name = f"Scores by layer, {record.model.name}: kept layers in bold"
    return _folded("Scores by layer", table(name, heads, rows, 0))


def _score(kept: bool, score: float, error: float) -> Cell:
    """A score, bold where its layer is kept."""
    shown = significant(score) + (f" ±{significant(error, 2)}" if math.isfinite(error) else "")
    return Cell(text=Markup(f"**{shown} kept**" if kept else shown), order=score if math.isfinite(score) else None)


def _folded(title: str, inner: str) -> str:
    return f"<details><summary>{html.escape(title)}</summary>{inner}</details>"


def _stages(record: RunRecord) -> list[dict[str, Any]]:
    stages = record.details.get("stages")
    return [stage for stage in stages if isinstance(stage, dict)] if isinstance(stages, list) else []


def _training(board: Board) -> str:
    rows = []
    for record in board.records:
        for stage in _stages(record):
            texts = [clean(record.model.name, 80), clean(str(stage.get("stage", "")), 40)]
            pairs = [("first_loss", "last_loss"), ("held_out_before", "held_out_after")]
            numbers = [_figure(stage.get(name)) for pair in pairs for name in pair]
            spent = [_figure(stage.get(name)) for name in ("tokens", "seconds")]
            rows.append(
                [
                    *(Cell(text=text, order=text) for text in texts),
                    Cell(text=format_count(spent[0]) if spent[0] is not None else MISSING, order=spent[0]),
                    Cell(text=format_seconds(spent[1]) if spent[1] is not None else MISSING, order=spent[1]),
                    *(Cell(text=number(value, digits=4), order=value) for value in numbers),
                ]
            )
    lines = training_lines(board.groups, board.records)
    drawn = _charts(training_scenes(lines)) + _losses(lines)
    if not rows:
        return drawn
    titles = "model", "stage", "tokens", "time", "loss at first", "loss at last", "held out before", "held out after"
    heads = [Head(text=title) for title in titles]
    note = '<p class="note">Losses are means over the first and the last fifth of the steps. Stages that several '
    note += "conversions share are listed with each.</p>"
    return note + table("Stages of every conversion", heads, rows, 2) + drawn


def _losses(stages: Mapping[str, Lines]) -> str:
    """What the charts of the training show, as a folded table."""
    rows = [
        [
            Cell(text=clean(stage, 40), order=clean(stage, 40)),
            Cell(text=look.label, order=look.label),
            Cell(text=f"{dot.x:g}" if stage == SCALE else format_count(round(dot.x)), order=dot.x),
            Cell(text=number(dot.y, digits=4), order=dot.y),
        ]
        for stage, lines in stages.items()
        for look, dots in lines
        for dot in thinned(dots, _LISTED)
    ]
    heads = [Head(text=title) for title in ("stage", "model", "tokens, or base of the scale", "loss")]
    return _folded("Losses as numbers", table("Losses in the course of training", heads, rows, 2)) if rows else ""


def _figure(value: Any) -> float | None:
    wanted = isinstance(value, int | float) and not isinstance(value, bool)
    return float(value) if wanted and math.isfinite(value) else None


def _notes(board: Board) -> str:
    listed = "".join(f"<li>{inline(note)}</li>" for note in notes(board.groups, board.marks, board.records))
    header, cells = models([row for group in board.groups for row in group.rows])
    rows = [[Cell(text=text, order=clean(text)) for text in row] for row in cells]
    shown = table("The models", [Head(text=title) for title in header], rows, 3)
    return f'<ul class="notes">{listed}</ul>{shown}'


def _records(records: Sequence[RunRecord]) -> str:
    return "".join(_record(record) for record in records)


def _record(record: RunRecord) -> str:
    versions, hardware = (record.environment.get(name) for name in ("versions", "hardware"))
    pairs = [
        ("command", record.command),
        ("created", record.created),
        ("status", record.status + (f": {record.error}" if record.error else "")),
        ("model", f"{record.model.name}, {record.model.path}, hash {record.model.hash or MISSING}"),
        ("lineage", _listed(record.lineage)),
        ("backends", _listed(record.backends)),
        ("versions", _listed(versions)),
        ("hardware", _listed(hardware)),
        ("system", str(record.environment.get("system") or MISSING)),
        (
            "spent",
            "; ".join(f"{row.what} {format_count(row.tokens)} tokens, {row.seconds:g} s" for row in record.ledger),
        ),
    ]
    shown = facts([(name, value) for name, value in pairs if value])
    settings = json.dumps(to_dict(record.settings), indent=1)
    if record.settings:
        shown += f"<details><summary>settings</summary><pre>{html.escape(settings)}</pre></details>"
    when = f" · {record.created[:10]}" if record.created else ""
    title = f"{html.escape(record.kind)}: {html.escape(clean(record.model.name, 80))}"
    bad = " · error" if record.status == "error" else ""
    beside = f'<span class="soft">{html.escape(clean(when + bad))}</span>'
    return f"<details><summary>{title} {beside}</summary>{shown}</details>"


def _listed(found: Any) -> str:
    return "; ".join(f"{name} {value}" for name, value in found.items()) if isinstance(found, dict) else ""
