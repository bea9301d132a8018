"""The needle plot: how many needles each model finds as the context grows past the length it was trained on."""

from __future__ import annotations

import math
import textwrap
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from halobench.errors import HalobenchError
from halobench.reports import canvas
from halobench.reports.columns import needle_lengths, needle_task
from halobench.reports.rows import Row, trained_length
from halobench.reports.table import clean
from halobench.units import format_length

if TYPE_CHECKING:
    from matplotlib.axes import Axes

Points = list[tuple[int, float, float]]
_MARKERS = ("o", "s", "^", "D", "v", "P", "X", "<", ">", "h")


def plot_needles(rows: Sequence[Row], path: Path) -> Path:
    """Needle accuracy over context length, a line a model: the teacher black, RoPE kept dashed, bands of ±1 stderr."""
    lengths, task = needle_lengths(rows), needle_task(rows)
    if task is None or not lengths:
        raise HalobenchError("no needle results to plot; run `halobench eval --suite niah` first")
    lines = [(row, points) for row in rows if (points := _points(row, task, lengths))]
    trained = trained_length([row for row, _ in lines])
    figure = canvas.page(9.6, max(4.9, 2.0 + 0.46 * len(lines)))
    height = figure.get_size_inches()[1]
    axes = figure.add_axes((0.07, 0.62 / height, 0.6, (height - 0.62 - 1.12) / height))
    counts = sorted({m.n for row, _ in lines for n in lengths if (m := row.metric("niah", task, "accuracy", n))})
    n = f"{counts[0]}" if len(counts) == 1 else f"{counts[0]} to {counts[-1]}"
    canvas.heading(
        figure,
        needle_title(lines, trained),
        f"share of needles found ({clean(task)}), {n} questions a point; bands: ±1 standard error",
        0.045,
    )
    _needle_axes(axes, lengths)
    _training(axes, [row for row, _ in lines])
    for i, (row, points) in enumerate(lines):
        _line(axes, points, _style(row, i - sum(r.untouched for r, _ in lines[:i])))
    _end_labels(axes, lines)
    return canvas.save(figure, path)


def _points(row: Row, task: str, lengths: Sequence[int]) -> Points:
    found = ((length, row.metric("niah", task, "accuracy", length)) for length in lengths)
    return [(length, m.value, m.stderr or 0.0) for length, m in found if m is not None]


def needle_title(lines: Sequence[tuple[Row, Points]], trained: int | None) -> str:
    """What is seen at the longest length: the hybrid that finds most, and the teacher."""
    longest = max(points[-1][0] for _, points in lines)
    at_end = [(row, points[-1][1]) for row, points in lines if points[-1][0] == longest]
    where = f"At {format_length(longest)} tokens"
    if trained and longest > trained:
        where += f", {longest / trained:.3g} times the training length"
    hybrids = [(value, row.label) for row, value in at_end if not row.untouched]
    teachers = [value for row, value in at_end if row.untouched]
    said = []
    if hybrids:
        value, label = max(hybrids)
        said.append(f"{label} finds {value:.0%} of the needles")
    if teachers:
        said.append(f"the teacher {'' if hybrids else 'finds '}{teachers[0]:.0%}")
    return f"{where}, {', '.join(said)}"


def _style(row: Row, index: int) -> dict[str, Any]:
    if row.untouched:
        return {"color": canvas.INK, "marker": "o", "linestyle": (0, (1, 1.2)), "linewidth": 2.2, "zorder": 5}
    dashes: Any = (0, (5, 2)) if row.card.positions == "rope" else "-"
    color = canvas.PALETTE[index % len(canvas.PALETTE)]
    return {
        "color": color,
        "marker": _MARKERS[index % len(_MARKERS)],
        "linestyle": dashes,
        "linewidth": 2.0,
        "zorder": 4,
    }


def _needle_axes(axes: Axes, lengths: Sequence[int]) -> None:
    canvas.tidy(axes)
    low, high = math.log2(lengths[0]), math.log2(lengths[-1])
    # A length more on either side when there is only one.
    axes.set_xlim(low - (0.18 if high > low else 1), high + (0.12 if high > low else 1))
    axes.set_ylim(-0.03, 1.05)
    axes.set_yticks([0, 0.25, 0.5, 0.75, 1], ["0", "25%", "50%", "75%", "100%"])
    axes.set_xticks([math.log2(n) for n in lengths], [format_length(n) for n in lengths])
    axes.set_xlabel("context length (tokens)", size=9, color=canvas.SOFT, labelpad=6)


def _training(axes: Axes, rows: Sequence[Row]) -> None:
    """A line where training ended, for hybrids and teacher when they differ; what all were trained on is shaded."""
    hybrids = trained_length(rows)
    teacher = max((row.card.trained_length or 0 for row in rows if row.untouched), default=0)
    ends = {hybrids: "trained to"} if hybrids else {}
    if hybrids and teacher and teacher != hybrids:
        ends = {hybrids: "hybrids trained to", teacher: "teacher to"}
    low, high = axes.get_xlim()
    for i, (length, text) in enumerate(sorted(ends.items())):
        at = math.log2(length)
        if i == 0:
            axes.axvspan(low - 1, min(at, high), color="#F3F5F7", zorder=0)
        if not low <= at <= high:
            continue
        axes.axvline(at, color=canvas.SOFT, linewidth=1.0, zorder=1)
        axes.annotate(
            f"{text} {format_length(length)}",
            (at, 1.0),
            (0, 3),
            xycoords=("data", "axes fraction"),
            textcoords="offset points",
            size=8,
            color=canvas.SOFT,
            va="bottom",
            ha="center",
        )
    axes.set_xlim(low, high)


def _line(axes: Axes, points: Points, style: dict[str, Any]) -> None:
    x = [math.log2(length) for length, _, _ in points]
    y = [value for _, value, _ in points]
    low = [max(0.0, value - error) for _, value, error in points]
    high = [min(1.0, value + error) for _, value, error in points]
    axes.fill_between(x, low, high, color=style["color"], alpha=0.14, linewidth=0, zorder=2)
    axes.plot(x, y, markersize=6, markeredgecolor="white", markeredgewidth=0.9, clip_on=False, **style)


def _end_labels(axes: Axes, lines: Sequence[tuple[Row, Points]]) -> None:
    """Labels right of the last points, pushed apart, each tied to its line by a thread of the line's colour."""
    left, right = axes.get_xlim()
    unit = (right - left) / 100
    step = min(0.135, 1.08 / len(lines))
    order = sorted(range(len(lines)), key=lambda i: -lines[i][1][-1][1])
    places = spread([lines[i][1][-1][1] for i in order], step, -0.02, 1.02)
    for place, i in zip(places, order, strict=True):
        row, points = lines[i]
        style = _style(row, i - sum(r.untouched for r, _ in lines[:i]))
        end = (math.log2(points[-1][0]), points[-1][1])
        thread = [end[0], right, right + 4 * unit, right + 8.5 * unit]
        axes.plot(thread[:3], [end[1], end[1], place], color=style["color"], linewidth=0.8, alpha=0.7, clip_on=False)
        axes.plot(
            thread[2:],
            [place, place],
            color=style["color"],
            linewidth=2.0,
            linestyle=style["linestyle"],
            clip_on=False,
        )
        axes.plot(
            [right + 6.25 * unit],
            [place],
            marker=style["marker"],
            color=style["color"],
            markersize=5.5,
            clip_on=False,
            markeredgecolor="white",
            markeredgewidth=0.8,
        )
        _label(axes, row, right + 10 * unit, place, step)


def _label(axes: Axes, row: Row, x: float, y: float, step: float) -> None:
    kept = row.card.kept
    below = "untouched teacher" if kept is None else f"softmax in {', '.join(map(str, kept)) or 'no layer'}"
    name = textwrap.shorten(row.label, 68, placeholder="…")
    lines = textwrap.wrap(name, 36)[: 2 if step > 0.09 else 1]
    text: dict[str, Any] = {"ha": "left", "clip_on": False, "parse_math": False}
    axes.text(x, y, "\n".join(lines), va="bottom" if len(lines) == 1 else "center", size=8.5, color=canvas.INK, **text)
    if len(lines) == 1:
        axes.text(
            x, y - 0.006, textwrap.shorten(below, 44, placeholder="…"), va="top", size=7.5, color=canvas.SOFT, **text
        )


def spread(wanted: Sequence[float], step: float, low: float, high: float) -> list[float]:
    """Places near `wanted` (descending) at least `step` apart, within low..high when they fit."""
    places: list[float] = []
    for value in wanted:
        places.append(min(value, places[-1] - step) if places else min(value, high))
    if places and places[-1] < low:
        places[-1] = low
        for i in range(len(places) - 2, -1, -1):
            places[i] = max(places[i], places[i + 1] + step)
    return places
