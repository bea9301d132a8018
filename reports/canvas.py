"""What every plot shares: the page, colours, titles, and writing the file.

Figures are drawn on Agg through Figure objects, so nothing global is touched and no display is needed. Blue and
vermilion are Okabe and Ito's, which people with any kind of colour vision can tell apart.
"""

from __future__ import annotations

import textwrap
from pathlib import Path
from typing import TYPE_CHECKING

from halobench.files import atomic_path

if TYPE_CHECKING:
    from matplotlib.figure import Figure

BLUE, VERMILION = "#0072B2", "#D55E00"
INK, SOFT, GRID = "#1A1A1A", "#5F6670", "#E6E9ED"
DPI = 160


def page(width: float, height: float) -> Figure:
    """An empty white figure of so many inches."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), dpi=DPI, facecolor="white")
    FigureCanvasAgg(figure)
    return figure


def heading(figure: Figure, title: str, subtitle: str, left: float) -> None:
    """A bold title that says what is seen, with the measurement's particulars below it, from the top of the page."""
    width, height = figure.get_size_inches()
    columns = int((width * (1 - left)) * 8.6)
    lines = textwrap.wrap(title, columns)[:2]
    top = 1 - 0.16 / height
    figure.text(
        left,
        top,
        "\n".join(lines),
        ha="left",
        va="top",
        size=13,
        weight="bold",
        color=INK,
        linespacing=1.25,
        parse_math=False,
    )
    below = top - (0.25 * len(lines) + 0.05) / height
    figure.text(left, below, subtitle, ha="left", va="top", size=9, color=SOFT, parse_math=False)


def save(figure: Figure, path: Path, *more: Path) -> Path:
    """Writes the figure to each path, as PNG or SVG as its name says, without a date: equal figures are equal files."""
    import matplotlib

    metadata: dict[str, dict[str, str | None]] = {".png": {"Software": None}, ".svg": {"Date": None, "Creator": None}}
    for each in (path, *more):
        settings = matplotlib.rc_context({"svg.hashsalt": "halobench", "svg.fonttype": "none"})
        with atomic_path(each) as temporary, settings:
            figure.savefig(temporary, format=each.suffix[1:], dpi=DPI, metadata=metadata[each.suffix])
    return path
