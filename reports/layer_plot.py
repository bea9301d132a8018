"""The layer plot: what each selector thinks of every layer, and which layers it keeps."""

from __future__ import annotations

import math
import textwrap
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from halobench.errors import HalobenchError
from halobench.records import RunRecord
from halobench.reports import canvas
from halobench.reports.rows import methods
from halobench.reports.table import clean
from halobench.units import format_count

if TYPE_CHECKING:
    from matplotlib.axes import Axes

_TOP, _PANEL, _BOTTOM = 0.82, 1.72, 0.42  # inches: heading, a row of panels, legend


@dataclass(frozen=True)
class Scale:
    """The y range of a panel. Bars stand on `base`; a score outside `body_low..body_high` is drawn cut."""

    low: float
    high: float
    base: float
    body_low: float
    body_high: float

    @property
    def span(self) -> float:
        """Height of the range."""
        return self.high - self.low


def plot_layer_scores(record: RunRecord, path: Path) -> Path:
    """One panel a selector: its score for every layer on its own scale, the layers it keeps in colour."""
    found = methods(record)
    if not found:
        raise HalobenchError("the record has no selection to plot; run `halobench select` first")
    layers = max([record.model.layers, *(len(entry.get("scores") or []) for entry in found.values())])
    across = 1 if len(found) == 1 else 2
    height = _TOP + _PANEL * math.ceil(len(found) / across) + _BOTTOM
    figure = canvas.page(9.6, height)
    canvas.heading(figure, layers_title(found), _subtitle(record, layers), 0.03)
    width = (0.92 - 0.065 * (across - 1)) / across
    notes: dict[str, None] = {"blue: kept as softmax": None, "each panel has its own scale": None}
    for i, (name, entry) in enumerate(found.items()):
        bottom = (height - _TOP - _PANEL * (i // across + 1) + 0.32) / height
        axes = figure.add_axes((0.055 + (i % across) * (width + 0.065), bottom, width, 1.08 / height))
        notes |= dict.fromkeys(_panel(axes, str(entry.get("label") or name), entry, layers))
    figure.text(0.03, 0.12 / height, "; ".join(notes), size=8, color=canvas.SOFT, va="bottom")
    return canvas.save(figure, path)


def layers_title(found: dict[str, dict]) -> str:
    """Which layers the selectors agree on most."""
    names = [clean(str(entry.get("label") or name), 60) for name, entry in found.items()]
    kept = Counter(layer for entry in found.values() for layer in set(_kept(entry)))
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


def _subtitle(record: RunRecord, layers: int) -> str:
    keep = record.details["selection"].get("keep")
    return f"{clean(record.model.name, 60)}: {layers} layers" + (f", {keep} kept" if isinstance(keep, int) else "")


def _kept(entry: dict) -> list[int]:
    return [layer for layer in entry.get("layers") or [] if isinstance(layer, int)]


def _numbers(values: Any, layers: int) -> list[float]:
    given = [v if isinstance(v, int | float) else math.nan for v in values] if isinstance(values, list) else []
    return [float(v) for v in given[:layers]] + [math.nan] * (layers - len(given))


def _panel(axes: Axes, label: str, entry: dict, layers: int) -> list[str]:
    """Draws one selector and returns what the legend must explain."""
    from matplotlib.ticker import MaxNLocator

    kept = _kept(entry)
    scores, errors = _numbers(entry.get("scores"), layers), _numbers(entry.get("stderr"), layers)
    _frame(axes, label, entry, layers)
    known = [(s, e if math.isfinite(e) else 0.0) for s, e in zip(scores, errors, strict=True) if math.isfinite(s)]
    if len({score for score, _ in known}) < 2 or scores == [float(layer in kept) for layer in range(layers)]:
        _pattern(axes, kept, layers)
        return []
    scale = fit([score for score, _ in known], [error for _, error in known])
    for layer, (score, error) in enumerate(zip(scores, errors, strict=True)):
        if math.isfinite(score):
            _bar(axes, layer, score, error, scale, canvas.BLUE if layer in kept else canvas.FAINT)
    axes.set_ylim(scale.low, scale.high)
    axes.yaxis.set_major_locator(MaxNLocator(3, min_n_ticks=2))
    if scale.low < 0 < scale.high:
        axes.axhline(0, color=canvas.FAINT, linewidth=0.8, zorder=2)
    notes = ["whiskers: ±1 standard error"] if any(error for _, error in known) else []
    notes += ["cut bars run off it"] if any(not _inside(score, scale) for score, _ in known) else []
    return notes + (["some axes do not start at 0"] if scale.base != 0 else [])


def _frame(axes: Axes, label: str, entry: dict, layers: int) -> None:
    kept = sorted(_kept(entry))
    canvas.tidy(axes)
    axes.set_xlim(-0.7, layers - 0.3)
    axes.set_title(clean(label, 30), loc="left", size=10, weight="bold", color=canvas.INK, pad=8, parse_math=False)
    cost = entry.get("cost_tokens")
    spent = f" · {format_count(cost)} tokens" if isinstance(cost, int | float) and cost else ""
    shown = textwrap.shorten(f"keeps {', '.join(map(str, kept)) or 'none'}", 40, placeholder=" …")
    axes.set_title(shown + spent, loc="right", size=8, color=canvas.SOFT, pad=8)
    # Every layer is numbered when there is room; otherwise the kept ones, and every fourth that is not beside one.
    beside = {n + step for n in kept for step in (-1, 0, 1)}
    plain = [n for n in range(layers) if layers <= 16 or (n % 4 == 0 and n not in beside)]
    ticks = sorted({*plain, *(n for n in kept if 0 <= n < layers)})
    axes.set_xticks(ticks, [str(n) for n in ticks])
    for n, text in zip(ticks, axes.get_xticklabels(), strict=True):
        if n in kept:
            text.set(color=canvas.BLUE, fontweight="bold")


def fit(scores: Sequence[float], errors: Sequence[float]) -> Scale:
    """The range for a panel: from zero, or from just below scores that are all close together.

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
    if low > 0.6 * high > 0 or high < 0.6 * low < 0:
        margin = 0.3 * (high - low)
        return Scale(low - margin, high + 0.5 * margin, low - margin, low, high)
    reach = (max(high, 0.0) - min(low, 0.0)) or 1.0
    above = 0.6 if any(score > high for score in scores) else 0.08
    below = 0.6 if any(score < low for score in scores) else 0.08 if low < 0 else 0.0
    return Scale(min(low, 0.0) - below * reach, max(high, 0.0) + above * reach, 0.0, low, high)


def _inside(score: float, scale: Scale) -> bool:
    return scale.body_low <= score <= scale.body_high


def _bar(axes: Axes, layer: int, score: float, error: float, scale: Scale, color: str) -> None:
    if _inside(score, scale):
        axes.bar(layer, score - scale.base, bottom=scale.base, width=0.72, color=color, zorder=3)
        if math.isfinite(error) and error > 0:
            style: dict[str, Any] = {
                "color": canvas.INK,
                "linewidth": 0.9,
                "capsize": 1.8,
                "capthick": 0.9,
                "zorder": 5,
            }
            axes.errorbar(layer, score, yerr=error, **style)
        return
    up = 1 if score > scale.base else -1
    top = scale.high - 0.17 * scale.span if up > 0 else scale.low + 0.17 * scale.span
    axes.bar(layer, top - scale.base, bottom=scale.base, width=0.72, color=color, zorder=3)
    gap = top - up * 0.11 * scale.span
    for shift in (-0.025, 0.025):
        y = gap + shift * scale.span
        axes.plot([layer - 0.5, layer + 0.5], [y - 0.03 * scale.span, y + 0.03 * scale.span], color="white", zorder=4)
    axes.annotate(
        f"{score:.3g}" if abs(score) < 1000 else f"{score:,.0f}",
        (layer, top),
        (0, 2 * up),
        textcoords="offset points",
        ha="center",
        va="bottom" if up > 0 else "top",
        size=7.5,
        color=canvas.INK,
    )


def _pattern(axes: Axes, kept: Sequence[int], layers: int) -> None:
    """A selector that scores nothing: only its choice is drawn."""
    for layer in range(layers):
        axes.bar(layer, 0.5, width=0.72, color=canvas.BLUE if layer in kept else canvas.GRID, zorder=3)
    axes.set_ylim(0, 1)
    axes.set_yticks([])
    axes.grid(visible=False)
    axes.text(
        0,
        0.6,
        "chosen without looking at the model",
        transform=axes.transAxes,
        size=8,
        color=canvas.SOFT,
        style="italic",
    )
