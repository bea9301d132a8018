"""What each selector thinks of every layer, as Scenes: bars with whiskers, the kept layers filled and dotted."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from halobench.records import RunRecord
from halobench.reports.charts import WIDTH, Part, plain, round_ticks
from halobench.reports.rows import methods
from halobench.reports.scene import Scene, Shape, Text, marker, rectangle
from halobench.reports.table import clean
from halobench.units import format_count

LEGEND = (
    "Filled and dotted: kept as softmax. Each has its own scale; whiskers: ±1 standard error; slash: off the scale."
)
_LEFT, _TOP, _PLOT = 46.0, 46.0, 96.0


@dataclass(frozen=True)
class Scale:
    """The y range of a chart. Bars stand on `base`; a score outside `body_low..body_high` is drawn cut."""

    low: float
    high: float
    base: float
    body_low: float
    body_high: float

    @property
    def span(self) -> float:
        """Height of the range."""
        return self.high - self.low


def layer_scenes(record: RunRecord) -> list[Scene]:
    """A chart for each selector of a selection record."""
    found, layers = methods(record), scored_layers(record)
    return [layer_bars(name, entry, layers) for name, entry in found.items()]


def scored_layers(record: RunRecord) -> int:
    """How many layers a selection record speaks of."""
    scores = [entry["scores"] for entry in methods(record).values() if isinstance(entry.get("scores"), list)]
    return max([record.model.layers, 1, *map(len, scores)])


def layers_title(found: dict[str, dict]) -> str:
    """Which layers the selectors agree on most."""
    names = [clean(str(entry.get("label") or name), 60) for name, entry in found.items()]
    kept = Counter(layer for entry in found.values() for layer in set(kept_layers(entry)))
    if not kept:
        return "No selector keeps a layer"
    if len(found) == 1:
        return f"{names[0]} keeps {_listed(sorted(kept))}"
    most = max(kept.values())
    if most == 1:
        return f"The {len(found)} selectors agree on no layer"
    who = f"{most} of the {len(found)}" if most < len(found) else "both" if most == 2 else f"all {most}"
    agreed = sorted(layer for layer, count in kept.items() if count == most)
    return f"{_listed(agreed).capitalize()} {'are' if len(agreed) > 1 else 'is'} kept by {who} selectors"


def _listed(layers: Sequence[int]) -> str:
    names = [str(layer) for layer in layers]
    shown = names[0] if len(names) == 1 else ", ".join(names[:-1]) + f" and {names[-1]}"
    return f"layer{'s' * (len(names) > 1)} {shown}"


def kept_layers(entry: dict) -> list[int]:
    """The layers that a selector keeps."""
    return [layer for layer in entry.get("layers") or [] if isinstance(layer, int)]


def layer_numbers(values: Any, layers: int) -> list[float]:
    """A number for each layer, NaN where there is none."""
    given = [v if isinstance(v, int | float) else math.nan for v in values] if isinstance(values, list) else []
    return [float(v) for v in given[:layers]] + [math.nan] * (layers - len(given))


def ticked(kept: Sequence[int], layers: int) -> list[int]:
    """Layers to number: every one when there is room; otherwise the kept, and every fourth that is not beside one."""
    beside = {n + step for n in kept for step in (-1, 0, 1)}
    plain = [n for n in range(layers) if layers <= 16 or (n % 4 == 0 and n not in beside)]
    return sorted({*plain, *(n for n in kept if 0 <= n < layers)})


def fit(scores: Sequence[float], errors: Sequence[float]) -> Scale:
    """The range for a chart: from zero, or from just below scores that are all close together.

    Up to a quarter of the scores may be far beyond the others (more than five times the next); they are left out of the
    range and drawn cut, so that the others can be told apart.
    """
    body = sorted(zip(scores, errors, strict=True), key=lambda pair: abs(pair[0]))
    for i in range(max(1, math.ceil(len(body) * 0.75)), len(body)):
        if abs(body[i][0]) > 5 * abs(body[i - 1][0]) > 0:
            body = body[:i]
            break
    limit = 0.5 * max(abs(s) for s, _ in body)  # whiskers longer than the scores themselves run off the axis
    low, high = min(s - min(e, limit) for s, e in body), max(s + min(e, limit) for s, e in body)
    if low < high and (low > 0.6 * high > 0 or high < 0.6 * low < 0):
        margin = 0.3 * (high - low)
        return Scale(low - margin, high + 0.5 * margin, low - margin, low, high)
    reach = (max(high, 0.0) - min(low, 0.0)) or 1.0
    above = 0.6 if any(score > high for score in scores) else 0.08
    below = 0.6 if any(score < low for score in scores) else 0.08 if low < 0 else 0.0
    return Scale(min(low, 0.0) - below * reach, max(high, 0.0) + above * reach, 0.0, low, high)


def inside(score: float, scale: Scale) -> bool:
    """False for a score that is drawn cut."""
    return scale.body_low <= score <= scale.body_high


def layer_bars(name: str, entry: dict[str, Any], layers: int) -> Scene:
    """name: of the selector. entry: what it answered (label, layers, scores, stderr, cost_tokens)."""
    kept = sorted(kept_layers(entry))
    label = clean(str(entry.get("label") or name), 40)
    cost = entry.get("cost_tokens")
    spent = f"; {format_count(cost)} tokens" if isinstance(cost, int | float) and cost else ""
    keeps = f"keeps {', '.join(map(str, kept)) or 'none'}{spent}"
    parts: list[Part] = [
        Text(at=(0, 16), text=label, size=13.5, bold=True),
        Text(at=(0, 33), text=clean(keeps, 80), size=11, fill="soft"),
    ]
    wide = (WIDTH - _LEFT) / layers
    centres = [_LEFT + (i + 0.5) * wide for i in range(layers)]
    scores, errors = layer_numbers(entry.get("scores"), layers), layer_numbers(entry.get("stderr"), layers)
    known = [(s, e if math.isfinite(e) else 0.0) for s, e in zip(scores, errors, strict=True) if math.isfinite(s)]
    blind = len({score for score, _ in known}) < 2 or scores == [float(i in kept) for i in range(layers)]
    scale = Scale(0, 1, 0, 0, 1) if blind else fit([s for s, _ in known], [e for _, e in known])
    if blind:
        scores, errors = [0.5] * layers, [math.nan] * layers
        parts.append(Text(at=(_LEFT, _TOP + 12), text="chosen without looking at the model", size=11, fill="soft"))
    else:
        parts += _scale_labels(scale)
    for layer, (score, error) in enumerate(zip(scores, errors, strict=True)):
        if math.isfinite(score):
            parts += _bar(centres[layer], wide, score, error, scale, layer in kept, f"{label}, layer {layer}")
    bottom = _TOP + _PLOT
    parts.append(Shape(points=((_LEFT, bottom), (WIDTH, bottom)), stroke="line"))
    for layer in ticked(kept, layers):
        fill, at = ("accent" if layer in kept else "soft"), (centres[layer], bottom + 16)
        parts.append(Text(at=at, text=str(layer), size=11, fill=fill, anchor="middle", bold=layer in kept))
        if layer in kept:
            dot = marker(0, (centres[layer], bottom + 25), 2.6)
            parts.append(Shape(points=dot, fill="accent", closed=True))
    return Scene(title=f"{label} {keeps}", width=WIDTH, height=bottom + 36, parts=tuple(parts))


def _y(value: float, scale: Scale) -> float:
    return _TOP + _PLOT * (1 - (min(max(value, scale.low), scale.high) - scale.low) / scale.span)


def _scale_labels(scale: Scale) -> list[Part]:
    found: list[Part] = []
    for value in round_ticks(scale.low, scale.high, 3):
        at = _y(value, scale)
        found.append(Shape(points=((_LEFT, at), (WIDTH, at)), stroke="grid"))
        found.append(Text(at=(_LEFT - 6, at + 4), text=plain(value), size=10.5, fill="soft", anchor="end"))
    return found


def _bar(x: float, wide: float, score: float, error: float, scale: Scale, kept: bool, name: str) -> list[Part]:
    """A bar on the scale's base; one beyond the scale runs to its edge and carries its number."""
    cut = not inside(score, scale)
    top, base = _y(score, scale), _y(scale.base, scale)
    if cut:
        top = _TOP + 14 if score > scale.base else _TOP + _PLOT - 14
    said = f"{name}: {score:.3g}" + (f" ±{error:.2g}" if math.isfinite(error) else "") + (", kept" if kept else "")
    box = rectangle(x - 0.36 * wide, min(top, base), 0.72 * wide, max(abs(base - top), 1.0))
    parts: list[Part] = [Shape(points=box, fill="kept" if kept else "rest", closed=True, data=True, tip=said)]
    if cut:
        where = (x, top - 4 if score > scale.base else top + 12)
        written = f"{score:.3g}" if abs(score) < 1000 else f"{score:,.0f}"
        parts.append(Text(at=where, text=written, size=10, fill="soft", anchor="middle"))
        gap = top + (8 if score > scale.base else -8)
        slash = ((x - 0.45 * wide, gap + 3), (x + 0.45 * wide, gap - 3))
        parts.append(Shape(points=slash, stroke="paper", width=2.5))
    elif math.isfinite(error) and error > 0:
        ends = [score - error, score + error]
        places = [_y(end, scale) for end in ends]
        parts.append(Shape(points=((x, places[0]), (x, places[1])), stroke="ink", width=1.2))
        # A whisker that runs off the scale has no end to show.
        capped = [y for end, y in zip(ends, places, strict=True) if scale.low <= end <= scale.high]
        parts += [Shape(points=((x - 3, y), (x + 3, y)), stroke="ink", width=1.2) for y in capped]
    return parts
