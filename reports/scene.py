"""A drawing as a list of shapes, written as SVG (in the page or as a file of its own) and as PNG.

Colours are roles of palette.py, so that a drawing in the page follows light and dark. Every text is escaped when it is
written. Lengths are CSS pixels, from the upper left corner.
"""

from __future__ import annotations

import html
import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from halobench.reports import canvas, palette
from halobench.reports.table import clean

if TYPE_CHECKING:
    from matplotlib.axes import Axes

Point = tuple[float, float]
FONT = "system-ui,-apple-system,'Segoe UI',Roboto,'Helvetica Neue',Arial,sans-serif"
WIDE = 0.56  # about how many times its size a character is wide


@dataclass(frozen=True, kw_only=True)
class Shape:
    """A line or, when closed, an area. data: stands for a measurement. tip: what pointing at it says."""

    points: tuple[Point, ...]
    fill: str | None = None
    stroke: str | None = None
    width: float = 1.0
    dash: tuple[float, float] | None = None
    opacity: float = 1.0
    closed: bool = False
    data: bool = False
    tip: str = ""


@dataclass(frozen=True, kw_only=True)
class Text:
    """One line of text; `at` is on its baseline."""

    at: Point
    text: str
    size: float = 12.0
    fill: str = "ink"
    anchor: Literal["start", "middle", "end"] = "start"
    bold: bool = False


@dataclass(frozen=True, kw_only=True)
class Scene:
    """A finished drawing. title: what is seen, for those who do not see it."""

    title: str
    width: float
    height: float
    parts: tuple[Shape | Text, ...]


def rectangle(x: float, y: float, width: float, height: float) -> tuple[Point, ...]:
    """Corners of a rectangle."""
    return ((x, y), (x + width, y), (x + width, y + height), (x, y + height))


MARKERS = ("circle", "square", "triangle", "diamond", "down", "cross")


def marker(index: int, at: Point, size: float = 4.5) -> tuple[Point, ...]:
    """Outline of the marker of series `index`, about `size` in radius."""
    kind = MARKERS[index % len(MARKERS)]
    if kind == "cross":
        thin, arm = 0.34 * size, 1.05 * size
        turns = [(arm, thin), (thin, thin), (thin, arm)]
        outline = [(x, y) for x, y in turns]
        outline += [(-y, x) for x, y in turns] + [(-x, -y) for x, y in turns] + [(y, -x) for x, y in turns]
    else:
        corners, start, grow = {
            "circle": (20, 0.0, 1.0),
            "square": (4, 45.0, 1.2),
            "triangle": (3, -90.0, 1.25),
            "diamond": (4, 0.0, 1.25),
            "down": (3, 90.0, 1.25),
        }[kind]
        angles = [math.radians(start + 360 * i / corners) for i in range(corners)]
        outline = [(grow * size * math.cos(a), grow * size * math.sin(a)) for a in angles]
    return tuple((at[0] + x, at[1] + y) for x, y in outline)


def tile(scenes: Sequence[Scene], title: str, across: int = 2, gap: float = 28.0, above: Scene | None = None) -> Scene:
    """Several drawings side by side as one, `across` in a row, below a heading if there is one."""
    rows = [scenes[i : i + across] for i in range(0, len(scenes), across)]
    widest = max(scene.width for scene in scenes)
    parts: list[Shape | Text] = [_moved(part, 12, 12) for part in above.parts] if above else []
    top = 12.0 + (above.height if above else 0.0)
    for row in rows:
        for i, scene in enumerate(row):
            parts += [_moved(part, 12 + i * (widest + gap), top) for part in scene.parts]
        top += max(scene.height for scene in row) + gap
    width = 24 + min(across, len(scenes)) * (widest + gap) - gap
    return Scene(title=title, width=width, height=top - gap + 12, parts=tuple(parts))


def _moved(part: Shape | Text, x: float, y: float) -> Shape | Text:
    if isinstance(part, Text):
        return replace(part, at=(part.at[0] + x, part.at[1] + y))
    return replace(part, points=tuple((px + x, py + y) for px, py in part.points))


def to_svg(scene: Scene, *, alone: bool = False) -> str:
    """SVG text. alone: a file of its own, with the colours and a background; otherwise it takes the page's colours."""
    size = f'viewBox="0 0 {_short(scene.width)} {_short(scene.height)}"'
    label = html.escape(clean(scene.title))
    body = "".join(
        _svg_text(part, alone) if isinstance(part, Text) else _svg_shape(part, alone) for part in scene.parts
    )
    if not alone:
        return f'<svg class="chart" {size} role="img" aria-label="{label}" font-family="inherit">{body}</svg>'
    around = f'width="{_short(scene.width)}" height="{_short(scene.height)}"'
    ground = f"<rect {around} {' '.join(_painted({'fill': 'paper'}, alone))}/>"
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" {size} {around} '
        f'role="img" aria-label="{label}" font-family="{html.escape(FONT)}"><style>{_dark(scene)}</style>'
        f"{ground}{body}</svg>\n"
    )


def _short(number: float) -> str:
    return f"{number:.1f}".removesuffix(".0")


def _painted(roles: dict[str, str | None], alone: bool, *classes: str) -> list[str]:
    """Attributes for the colour of "fill" and "stroke". A file of its own names its light colours, which every viewer
    knows, and classes, by which its style turns them dark; in the page they are the page's variables."""
    used = {what: role for what, role in roles.items() if role or what == "fill"}
    if not alone:
        named = list(classes)
        found = [f'{what}="{f"var(--{role})" if role else "none"}"' for what, role in used.items()]
    else:
        named = [*classes, *(f"{what}-{role}" for what, role in used.items() if role)]
        found = [f'{what}="{palette.LIGHT[role] if role else "none"}"' for what, role in used.items()]
    return found + ([f'class="{" ".join(named)}"'] if named else [])


def _dark(scene: Scene) -> str:
    """The style that turns a file of its own dark where the reader's machine is."""
    fills = {part.fill for part in scene.parts if part.fill} | {"paper"}
    strokes = {part.stroke for part in scene.parts if isinstance(part, Shape) and part.stroke}
    rules = [f".fill-{role}{{fill:{palette.DARK[role]}}}" for role in sorted(fills)]
    rules += [f".stroke-{role}{{stroke:{palette.DARK[role]}}}" for role in sorted(strokes)]
    return f"@media (prefers-color-scheme:dark){{{''.join(rules)}}}"


def _svg_shape(shape: Shape, alone: bool) -> str:
    path = "L".join(f"{_short(x)} {_short(y)}" for x, y in shape.points)
    drawn = [f'd="M{path}{"Z" if shape.closed else ""}"']
    drawn += _painted({"fill": shape.fill, "stroke": shape.stroke}, alone, *(["mark"] if shape.data else []))
    if shape.stroke:
        drawn.append(f'stroke-width="{_short(shape.width)}"')
        drawn += ['stroke-linejoin="round"'] if not shape.closed else []
    if shape.dash:
        drawn.append(f'stroke-dasharray="{_short(shape.dash[0])} {_short(shape.dash[1])}"')
    if shape.opacity != 1:
        drawn.append(f'opacity="{shape.opacity:g}"')
    tip = f"<title>{html.escape(clean(shape.tip))}</title>" if shape.tip else ""
    return f"<path {' '.join(drawn)}>{tip}</path>" if tip else f"<path {' '.join(drawn)}/>"


def _svg_text(text: Text, alone: bool) -> str:
    weight = ' font-weight="600"' if text.bold else ""
    anchor = f' text-anchor="{text.anchor}"' if text.anchor != "start" else ""
    return (
        f'<text x="{_short(text.at[0])}" y="{_short(text.at[1])}" font-size="{text.size:g}" '
        f"{' '.join(_painted({'fill': text.fill}, alone))}{anchor}{weight}>{html.escape(clean(text.text))}</text>"
    )


def save_png(scene: Scene, path: Path) -> Path:
    """Writes the drawing in its light colours."""
    figure = canvas.page(scene.width / 96, scene.height / 96)
    axes = figure.add_axes((0, 0, 1, 1))
    axes.set_axis_off()
    axes.set_xlim(0, scene.width)
    axes.set_ylim(scene.height, 0)
    for order, part in enumerate(scene.parts):
        _paint(axes, part, order)
    return canvas.save(figure, path)


def _paint(axes: Axes, part: Shape | Text, order: int) -> None:
    from matplotlib.patches import Polygon

    colours = palette.LIGHT
    if isinstance(part, Text):
        place = {"start": "left", "middle": "center", "end": "right"}[part.anchor]
        axes.text(
            *part.at, clean(part.text), size=part.size * 0.75, color=colours[part.fill], ha=place, va="baseline",
            weight="bold" if part.bold else "normal", parse_math=False, zorder=order,
        )  # fmt: skip
        return
    dash = (0, tuple(step / part.width for step in part.dash)) if part.dash else "-"
    axes.add_patch(
        Polygon(
            part.points, closed=part.closed, fill=part.fill is not None, facecolor=colours[part.fill or "ink"],
            edgecolor=colours[part.stroke] if part.stroke else "none", linewidth=part.width * 0.75, linestyle=dash,
            alpha=part.opacity, zorder=order,
        )
    )  # fmt: skip
