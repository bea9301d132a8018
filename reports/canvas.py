"""What every plot shares: the page, the palette, titles, and writing the file.

Figures are drawn on Agg through Figure objects, so nothing global is touched and no display is needed. The palette is
Okabe and Ito's, which people with any kind of colour vision can tell apart.
"""

from __future__ import annotations

import textwrap
from pathlib import Path
from typing import TYPE_CHECKING

from halobench.files import atomic_path

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

BLUE, VERMILION, GREEN, PURPLE, ORANGE, SKY = "#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9"
PALETTE = (BLUE, VERMILION, GREEN, PURPLE, ORANGE, SKY)
INK, SOFT, FAINT, GRID = "#1A1A1A", "#5F6670", "#C3C9D1", "#E6E9ED"
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


def tidy(axes: Axes) -> None:
    """Leaves of an axes what carries information: the bottom line, small labels, a faint horizontal grid."""
    for side in ("top", "right", "left"):
        axes.spines[side].set_visible(False)
    axes.spines["bottom"].set_color(FAINT)
    axes.tick_params(length=0, colors=SOFT, labelsize=8.5)
    axes.grid(axis="y", color=GRID, linewidth=0.8)
    axes.set_axisbelow(True)


def save(figure: Figure, path: Path) -> Path:
    """Writes the figure as PNG, atomically and without a date, so that equal figures are equal files."""
    with atomic_path(path) as temporary:
        figure.savefig(temporary, format="png", dpi=DPI, metadata={"Software": None})
    return path
