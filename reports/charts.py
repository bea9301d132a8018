"""The charts of the page: curves over length with bands, heat maps, trade-offs. Each is a Scene.

Models keep their marker, dash and colour in every chart of a group; the teacher is dotted, in the colour of the text.
A chart is as wide as a phone, with a legend below, or (PAGE) as wide as a page, with the names at the ends of lines.
"""

from __future__ import annotations

import math
import textwrap
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from itertools import groupby

from halobench.reports import palette
from halobench.reports.scene import WIDE, Point, Scene, Shape, Text, marker, rectangle
from halobench.reports.table import clean, significant

WIDTH = 400.0  # narrow enough to be read on a phone without scrolling
_LEFT, _RIGHT, _PLOT = 46.0, 12.0, 176.0
_MOST_MARKS = 12  # on a line
_NAME = 34.0  # the height of a name at the end of a line
Part = Shape | Text


@dataclass(frozen=True, kw_only=True)
class Size:
    """Width of a chart, height of its plot and the room right of it, size of its title, in CSS pixels."""

    width: float = WIDTH
    plot: float = _PLOT
    right: float = _RIGHT
    title: float = 13.5


PHONE = Size()
PAGE = Size(width=920.0, plot=290.0, right=290.0, title=18.0)


@dataclass(frozen=True, kw_only=True)
class Look:
    """How one model is drawn everywhere: `index` picks marker and colour; a teacher (None) has the text's colour.

    below: what stands under its name where there is room.
    """

    label: str
    index: int | None
    dashed: bool = False
    below: str = ""

    @property
    def colour(self) -> str:
        """The role of its colour."""
        return "ink" if self.index is None else f"s{self.index % palette.SERIES}"

    @property
    def dash(self) -> tuple[float, float] | None:
        """Dots for a teacher, dashes where `dashed`."""
        return (1.5, 3.0) if self.index is None else (6.0, 3.0) if self.dashed else None

    def mark(self, at: Point, tip: str = "") -> Shape:
        """Its marker."""
        index = 0 if self.index is None else self.index + self.index // palette.SERIES
        return Shape(points=marker(index, at), fill=self.colour, stroke="paper", closed=True, data=True, tip=tip)


@dataclass(frozen=True, kw_only=True)
class Dot:
    """A measurement: x and y with standard errors; None where none was recorded."""

    x: float
    y: float
    x_error: float | None = None
    y_error: float | None = None

    @property
    def x_ends(self) -> list[float]:
        """x, less and plus its error."""
        return [self.x + sign * (self.x_error or 0.0) for sign in (-1, 0, 1)]

    @property
    def y_ends(self) -> list[float]:
        """y, less and plus its error."""
        return [self.y + sign * (self.y_error or 0.0) for sign in (-1, 0, 1)]


@dataclass(frozen=True, kw_only=True)
class Axis:
    """One axis: its range, where its labels stand, and how a number on it is written."""

    low: float
    high: float
    ticks: tuple[float, ...]
    write: Callable[[float], str]
    log: bool = False

    def place(self, value: float) -> float:
        """0 at the low end, 1 at the high end."""
        low, high, at = (math.log(v) if self.log else v for v in (self.low, self.high, value))
        return (at - low) / (high - low)


def plain(value: float) -> str:
    """A number on an axis, with a true minus."""
    return f"{value:,.6g}".replace("-", "−")


def linear(values: Sequence[float], write: Callable[[float], str] = plain, *, zero: bool = False) -> Axis:
    """An axis around `values` with round numbers; from 0 when `zero`."""
    low, high = min([*values, 0.0] if zero else values), max([*values, 0.0] if zero else values)
    reach = (high - low) or abs(high) or 1.0
    low -= 0.06 * reach if low < 0 or not zero else 0.0
    high += 0.06 * reach if high > 0 or not zero else 0.0
    high = high if high > low else low + 1
    return Axis(low=low, high=high, ticks=round_ticks(low, high, 4), write=write)


def round_ticks(low: float, high: float, most: int) -> tuple[float, ...]:
    """Round numbers from low to high, about `most` steps apart."""
    raw = (high - low) / most
    power = 10.0 ** math.floor(math.log10(raw))
    step = next(power * factor for factor in (1, 2, 2.5, 5, 10) if power * factor >= raw * 0.999)
    first, last = math.ceil(low / step - 1e-9), math.floor(high / step + 1e-9)
    return tuple(round(step * i, 12 - math.floor(math.log10(step))) + 0.0 for i in range(first, last + 1))


def shares() -> Axis:
    """From none to all."""
    return Axis(low=-0.02, high=1.02, ticks=(0, 0.25, 0.5, 0.75, 1), write=lambda v: f"{v:.0%}")


def doubling(values: Sequence[float], write: Callable[[float], str], most: int = 8) -> Axis:
    """A logarithmic axis with a label at each of `values`, thinned to `most`."""
    known = sorted(set(values))
    step = math.ceil(len(known) / most)
    low, high = known[0], known[-1]
    wide = (high / low) ** 0.04 if high > low else 2.0
    return Axis(low=low / wide, high=high * wide, ticks=tuple(known[::-1][::step][::-1]), write=write, log=True)


def logarithmic(values: Sequence[float]) -> Axis:
    """A logarithmic axis with round labels (1, 2, 5, 10, ...)."""
    low, high = min(values), max(values)
    powers = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
    round_ones = [factor * 10.0**power for power in powers for factor in (1, 2, 5)]
    inside = [v for v in round_ones if low / 1.1 <= v <= high * 1.1]
    ends = (min([low, *inside]) / 1.12, max([high, *inside]) * 1.12)
    return Axis(
        low=ends[0], high=ends[1], ticks=tuple(inside[:: math.ceil(len(inside) / 7) or 1]), write=plain, log=True
    )


class _Frame:
    """The plot area of a chart: heading, axes and legend around it."""

    def __init__(self, title: str, note: str, x: Axis, y: Axis, x_name: str, size: Size = PHONE) -> None:
        self.title, self.x, self.y, self.size = title, x, y, size
        self.parts, self.top = heading(title, note, size.width, size.title)
        self.right, bottom = size.width - size.right, self.top + size.plot
        for tick in y.ticks:
            at = self.at_y(tick)
            ends = ((_LEFT, at), (self.right, at))
            self.parts.append(Shape(points=ends, stroke="grid"))
            self.parts.append(Text(at=(_LEFT - 8, at + 4), text=y.write(tick), size=11, fill="soft", anchor="end"))
        self.parts.append(Shape(points=((_LEFT, bottom), (self.right, bottom)), stroke="line"))
        for tick in x.ticks:
            where = (self.at_x(tick), bottom + 16)
            self.parts.append(Text(at=where, text=x.write(tick), size=11, fill="soft", anchor="middle"))
        middle = (_LEFT + self.right) / 2
        self.parts.append(Text(at=(middle, bottom + 33), text=x_name, size=11, fill="soft", anchor="middle"))

    def at_x(self, value: float) -> float:
        return _LEFT + self.x.place(value) * (self.right - _LEFT)

    def at_y(self, value: float) -> float:
        return self.top + (1 - self.y.place(value)) * self.size.plot

    def clip_y(self, value: float) -> float:
        return min(max(self.at_y(value), self.top), self.top + self.size.plot)

    def shade(self, trained: Sequence[tuple[float, str]]) -> None:
        """Shades up to the first length; a line at each, named above it, where there is room for the name."""
        last = -math.inf
        for i, (length, said) in enumerate(trained):
            if length < self.x.low:
                continue
            at = min(self.at_x(min(length, self.x.high)), self.right)
            if i == 0:
                area = rectangle(_LEFT, self.top, at - _LEFT, self.size.plot)
                self.parts.insert(0, Shape(points=area, fill="shade", closed=True))
            wide = len(said) * 10 * WIDE
            start = min(max(at - wide / 2, _LEFT), self.right - wide)
            if start > last + 6:
                line = ((at, self.top), (at, self.top + self.size.plot))
                self.parts += [Shape(points=line, stroke="line")] if length < self.x.high else []
                self.parts.append(Text(at=(start, self.top - 5), text=said, size=10, fill="soft"))
                last = start + wide

    def finish(self, looks: Sequence[Look]) -> Scene:
        """The scene with a legend below."""
        legend, height = _legend(looks, self.top + self.size.plot + 54)
        return Scene(title=self.title, width=self.size.width, height=height, parts=(*self.parts, *legend))

    def finish_named(self, lines: Sequence[tuple[Look, Sequence[Dot]]]) -> Scene:
        """The scene with each line's name beside its end, pushed apart, and tied to it by a thread."""
        ends = [(self.y.place(dots[-1].y), look, dots[-1]) for look, dots in lines]
        ends.sort(key=lambda end: -end[0])
        step = min(_NAME / self.size.plot, 1.04 / len(ends))
        for place, (_, look, dot) in zip(spread([end[0] for end in ends], step, -0.02, 1.02), ends, strict=True):
            y, from_y = self.top + (1 - place) * self.size.plot, self.clip_y(dot.y)
            thread = ((self.at_x(dot.x) + 7, from_y), (self.right, from_y), (self.right + 18, y))
            self.parts.append(Shape(points=thread, stroke=look.colour, width=0.8, opacity=0.7))
            key = ((self.right + 18, y), (self.right + 48, y))
            self.parts.append(Shape(points=key, stroke=look.colour, width=2, dash=look.dash))
            self.parts.append(replace(look.mark((self.right + 33, y)), data=False))
            name, roomy = clean(look.label, 38), bool(look.below) and step * self.size.plot > 26
            at = (self.right + 56, y - 2 if roomy else y + 4)
            self.parts.append(Text(at=at, text=name, size=12))
            if roomy:
                self.parts.append(Text(at=(at[0], at[1] + 14), text=clean(look.below, 44), size=10.5, fill="soft"))
        height = self.top + self.size.plot + 44
        return Scene(title=self.title, width=self.size.width, height=height, parts=tuple(self.parts))


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


def heading(title: str, note: str, width: float = WIDTH, size: float = 13.5) -> tuple[list[Part], float]:
    """A title of at most two lines and a note of three; and where the drawing may begin."""
    lines, line = textwrap.wrap(clean(title), int(width / (size * 0.62)))[:2], 4 / 3 * size
    parts: list[Part] = [
        Text(at=(0, size * 1.2 + line * i), text=text, size=size, bold=True) for i, text in enumerate(lines)
    ]
    notes = textwrap.wrap(clean(note), int(width / (11 * 0.53)))[:3]
    first = size * 1.2 + line * len(lines)
    parts += [Text(at=(0, first + 14 * i), text=text, size=11, fill="soft") for i, text in enumerate(notes)]
    return parts, first + 14 * len(notes) + 14


def _legend(looks: Sequence[Look], top: float) -> tuple[list[Part], float]:
    across = 2 if all(len(look.label) <= 22 for look in looks) else 1
    parts: list[Part] = []
    for i, look in enumerate(looks):
        x, y = (i % across) * WIDTH / across, top + 19 * (i // across)
        parts.append(Shape(points=((x, y), (x + 30, y)), stroke=look.colour, width=2, dash=look.dash))
        parts.append(replace(look.mark((x + 15, y)), data=False))
        name = clean(look.label, 22 if across == 2 else 54)
        parts.append(Text(at=(x + 38, y + 4), text=name, size=12))
    return parts, top + 19 * math.ceil(len(looks) / across)


def curves(
    title: str, note: str, lines: Sequence[tuple[Look, Sequence[Dot]]], x: Axis, y: Axis, x_name: str,
    trained: Sequence[tuple[float, str]] = (), size: Size = PHONE,
) -> Scene:  # fmt: skip
    """A line a model over x, with a band of one standard error where there is one.

    trained: lengths that models were trained to, ascending, each with what to write there; up to the first is shaded.
    """
    frame = _Frame(title, note, x, y, x_name, size)
    frame.shade(trained)
    for look, dots in lines:
        for run in runs_with_errors(dots):
            upper, lower = (
                [(frame.at_x(dot.x), frame.clip_y(dot.y + sign * (dot.y_error or 0.0))) for dot in run]
                for sign in (1, -1)
            )
            if len(run) > 1:
                band = (*upper, *lower[::-1])
                frame.parts.append(Shape(points=band, fill=look.colour, opacity=0.16, closed=True))
            else:
                frame.parts.append(Shape(points=(*upper, *lower), stroke=look.colour, width=3, opacity=0.4))
    for look, dots in lines:
        path = tuple((frame.at_x(dot.x), frame.clip_y(dot.y)) for dot in dots)
        frame.parts.append(Shape(points=path, stroke=look.colour, width=2, dash=look.dash, data=True))
        step = math.ceil(len(dots) / _MOST_MARKS)
        for at, dot in list(zip(path, dots, strict=True))[::-step]:
            frame.parts.append(look.mark(at, f"{look.label}: {_said(dot)} at {x.write(dot.x)}"))
    return frame.finish([look for look, _ in lines]) if size is PHONE else frame.finish_named(lines)


def runs_with_errors(dots: Sequence[Dot]) -> list[list[Dot]]:
    """Neighbours that all have a standard error; a dot without one parts them."""
    runs = groupby(dots, key=lambda dot: dot.y_error is not None)
    return [list(run) for known, run in runs if known]


def _said(dot: Dot) -> str:
    return f"{dot.y:.3g}" + (f" ±{dot.y_error:.2g}" if dot.y_error is not None else "")


def scatter(title: str, note: str, points: Sequence[tuple[Look, Dot]], x: Axis, y: Axis, x_name: str) -> Scene:
    """A point a model, with both standard errors as bars."""
    frame = _Frame(title, note, x, y, x_name)
    for look, dot in points:
        at = (frame.at_x(dot.x), frame.clip_y(dot.y))
        if dot.y_error:
            ends = [(at[0], frame.clip_y(dot.y + sign * dot.y_error)) for sign in (-1, 1)]
            frame.parts.append(Shape(points=tuple(ends), stroke=look.colour, width=1.4))
        if dot.x_error:
            reach = [max(dot.x - dot.x_error, x.low), min(dot.x + dot.x_error, x.high)]
            frame.parts.append(
                Shape(points=tuple((frame.at_x(v), at[1]) for v in reach), stroke=look.colour, width=1.4)
            )
    for look, dot in points:
        at = (frame.at_x(dot.x), frame.clip_y(dot.y))
        frame.parts.append(look.mark(at, f"{look.label}: {_said(dot)} at {significant(dot.x)}"))
    return frame.finish([look for look, _ in points])


def heat(
    title: str, note: str, rows: Sequence[tuple[str, Sequence[float | None]]], columns: Sequence[str], x_name: str
) -> Scene:
    """A cell for every row and column, darker for a greater share, which stands in it in percent."""
    parts, top = heading(title, note)
    left = 16 + min(140.0, max(len(name) for name, _ in rows) * 11 * WIDE)
    wide, high = (WIDTH - left) / len(columns), 25.0
    for i, (name, values) in enumerate(rows):
        y = top + i * high
        shown = clean(name, int((left - 8) / (11 * 0.62)))
        parts.append(Text(at=(left - 8, y + 17), text=shown, size=11, fill="soft", anchor="end"))
        for j, value in enumerate(values):
            box = rectangle(left + j * wide + 1, y + 1, wide - 2, high - 2)
            if value is None:
                parts.append(Shape(points=box, stroke="grid", closed=True))
                continue
            step = min(int(max(value, 0.0) * palette.STEPS), palette.STEPS - 1)
            tip = f"{name}, {columns[j]}: {value:.0%}"
            parts.append(Shape(points=box, fill=f"h{step}", closed=True, data=True, tip=tip))
            if wide >= 24:
                at = (left + (j + 0.5) * wide, y + 17)
                parts.append(Text(at=at, text=f"{100 * value:.0f}", size=11, fill=f"t{step}", anchor="middle"))
    bottom = top + len(rows) * high
    for j, name in enumerate(columns):
        if wide >= 24 or j % 2 == 0:
            at = (left + (j + 0.5) * wide, bottom + 15)
            parts.append(Text(at=at, text=name, size=11, fill="soft", anchor="middle"))
    at = (left + (WIDTH - left) / 2, bottom + 32)
    parts.append(Text(at=at, text=x_name, size=11, fill="soft", anchor="middle"))
    return Scene(title=title, width=WIDTH, height=bottom + 40, parts=tuple(parts))
