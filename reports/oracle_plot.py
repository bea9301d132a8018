"""The oracle's picture: for each teacher, the value of every pair of kept layers, and which pairs selectors chose."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from halobench.errors import HalobenchError
from halobench.records import RunRecord
from halobench.reports import canvas
from halobench.reports.regret import RECALL, Oracle
from halobench.reports.table import clean

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.image import AxesImage

_SIDE, _GAP, _TOP, _BOTTOM = 3.35, 0.75, 1.05, 0.75  # inches
_LEAST = 6.2  # inches that the heading takes


def plot_oracle(records: Sequence[RunRecord], path: Path) -> Path:
    """One triangle a teacher. Only studies that keep two layers can be drawn."""
    oracles = [Oracle(record, RECALL) for record in records]
    if any(oracle.keep != 2 for oracle in oracles):
        raise HalobenchError("a map of sets is drawn for studies that keep two layers")
    width = max(_LEAST, 0.5 + len(oracles) * (_SIDE + _GAP))
    height = _TOP + _SIDE + _BOTTOM
    figure = canvas.page(width, height)
    canvas.heading(
        figure,
        "What each pair of kept layers is worth",
        "answer log-likelihood after conversion, nats an answer, mean over lengths; seed 0",
        0.3 / width,
    )
    low, high = (f(v for o in oracles for v in o.screened.values()) for f in (min, max))
    for place, oracle in enumerate(oracles):
        left = (0.5 + place * (_SIDE + _GAP)) / width
        axes = figure.add_axes((left, _BOTTOM / height, _SIDE / width, _SIDE / height))
        image = _triangle(axes, oracle, low, high)
    end = 0.5 + len(oracles) * (_SIDE + _GAP) - _GAP
    bar = figure.add_axes(((end + 0.12) / width, _BOTTOM / height, 0.1 / width, _SIDE / height))
    figure.colorbar(image, cax=bar).ax.tick_params(labelsize=7.5, length=0, colors=canvas.SOFT)
    figure.text(0.3 / width, 0.1 / height, "numbers: how many selectors chose the pair; ring: the best judged pair",
                size=8, color=canvas.SOFT, va="bottom")  # fmt: skip
    return canvas.save(figure, path)


def _triangle(axes: Axes, oracle: Oracle, low: float, high: float) -> AxesImage:
    values = np.full((oracle.layers, oracle.layers), np.nan)
    for (a, b), value in oracle.screened.items():
        values[b, a] = value
    image = axes.imshow(values, cmap="cividis", vmin=low, vmax=high)
    counts: dict[tuple[int, ...], int] = {}
    for entry in oracle.methods.values():
        kept = tuple(entry["layers"])
        counts[kept] = counts.get(kept, 0) + 1
    for (a, b), count in counts.items():
        bright = values[b, a] > (low + high) / 2
        axes.text(a, b, str(count), ha="center", va="center", size=9, color="black" if bright else "white")
    a, b = oracle.best
    axes.plot([a], [b], "o", markersize=17, markerfacecolor="none", markeredgecolor=canvas.VERMILION, markeredgewidth=2)
    for side in axes.spines.values():
        side.set_visible(False)
    axes.set_xticks(range(oracle.layers - 1))
    axes.set_yticks(range(1, oracle.layers))
    axes.set_ylim(oracle.layers - 0.5, 0.5)
    axes.set_xlim(-0.5, oracle.layers - 1.5)
    axes.tick_params(length=0, colors=canvas.SOFT, labelsize=8)
    axes.set_title(clean(oracle.teacher, 40), size=10, color=canvas.INK, loc="left", parse_math=False)
    axes.set_xlabel("one kept layer", size=8, color=canvas.SOFT)
    axes.set_ylabel("the other", size=8, color=canvas.SOFT)
    return image
