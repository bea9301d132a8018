"""The plots of a report as files: which there are, what they are called, and drawing each as PNG and as SVG."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from halobench.files import write_text
from halobench.records import RunRecord
from halobench.reports.charts import PAGE, WIDTH, heading
from halobench.reports.figures import figures, needle_figure, training_lines, training_scenes
from halobench.reports.layer_bars import LEGEND, layer_scenes, layers_title, scored_layers
from halobench.reports.leaderboard import Board
from halobench.reports.rows import methods
from halobench.reports.scene import Scene, save_png, tile, to_svg
from halobench.reports.table import clean

STEMS = ("needles", "tradeoff", "curves", "heatmap", "layers", "training")


@dataclass(frozen=True, kw_only=True)
class Plot:
    """A drawing that is to become files."""

    stem: str
    caption: str
    scene: Scene

    @property
    def names(self) -> tuple[str, str]:
        """Of its files: PNG and SVG."""
        return f"{self.stem}.png", f"{self.stem}.svg"

    @property
    def svg(self) -> str:
        """The text of its SVG."""
        return to_svg(self.scene, alone=True)

    def save(self, folder: Path) -> list[Path]:
        """Writes both into `folder`."""
        png, svg = (folder / name for name in self.names)
        save_png(self.scene, png)
        write_text(svg, self.svg)
        return [png, svg]


def plots_of(board: Board) -> list[Plot]:
    """Every plot of a report, in the order of the leaderboard; a second one of a kind is numbered."""
    found: list[Plot] = []

    def add(stem: str, caption: str, scene: Scene | None) -> None:
        count = sum(plot.stem.partition("-")[0] == stem for plot in found) + 1
        if scene is not None:
            found.append(Plot(stem=stem if count == 1 else f"{stem}-{count}", caption=caption, scene=scene))

    for group in board.groups:
        needles = needle_figure(group)
        caption = f"Needles found by context length, {group.name}"
        add("needles", caption, tile([needles], caption) if needles else None)
        drawn = figures(group)
        for stem, caption, scenes in (
            ("tradeoff", "Quality against speed and memory", drawn.tradeoffs),
            ("curves", "Curves over context length", drawn.curves),
            ("heatmap", "Needles found by depth and length", drawn.heat),
        ):
            add(stem, f"{caption}, {group.name}", _tiled(scenes, caption))
    for record in board.records:
        if methods(record):
            add("layers", f"Layer scores by selector, {record.model.name}", layers_figure(record))
    add("training", "Training losses", _tiled(training_scenes(training_lines(board.groups, board.records)), "Losses"))
    return found


def layers_figure(record: RunRecord) -> Scene:
    """The charts of all selectors of a selection record, two in a row, below what they agree on."""
    found, keep = methods(record), record.details["selection"].get("keep")
    said = f"{clean(record.model.name, 60)}: {scored_layers(record)} layers"
    said += f", {keep} kept" if isinstance(keep, int) else ""
    parts, height = heading(layers_title(found), f"{said}. {LEGEND}", 2.1 * WIDTH, PAGE.title)
    above = Scene(title="", width=2 * WIDTH, height=height, parts=tuple(parts))
    return tile(layer_scenes(record), layers_title(found), above=above)


def _tiled(scenes: Sequence[Scene], title: str) -> Scene | None:
    return tile(scenes, title) if scenes else None
