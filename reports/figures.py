"""Which charts a group of models has, and the numbers that go into them; a chart without numbers is left out."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from halobench.records import RunRecord
from halobench.reports.charts import (
    PAGE,
    Axis,
    Dot,
    Look,
    curves,
    doubling,
    heat,
    linear,
    logarithmic,
    scatter,
    shares,
)
from halobench.reports.columns import (
    MIB,
    NEEDLE_SUITE,
    beyond_target,
    csr_target,
    needle_lengths,
    needle_task,
    ruler_lengths,
    ruler_target,
    span,
)
from halobench.reports.pairing import Target
from halobench.reports.rows import Group, Row, model_key
from halobench.reports.scene import Scene
from halobench.reports.table import clean
from halobench.units import format_count, format_length

GRID_SUITE = "grid"
_BINS = 10  # of depth, when needles stand anywhere
_FEW_DEPTHS = 13  # as many different depths are shown as they are
_POINTS = 200  # of a training curve, at most
SCALE = "scale search"
Lines = list[tuple[Look, list[Dot]]]


@dataclass(frozen=True, kw_only=True)
class Figures:
    """The charts of one group, by what they are about; each list may be empty."""

    curves: list[Scene]
    heat: list[Scene]
    tradeoffs: list[Scene]


def figures(group: Group) -> Figures:
    """All charts of one group."""
    looks = looks_of(group)
    return Figures(curves=_curves(group, looks), heat=_heat(group), tradeoffs=_tradeoffs(group, looks))


def looks_of(group: Group) -> dict[str, Look]:
    """How each row is drawn: the teacher apart, others by their place; dashed where RoPE was kept."""
    found: dict[str, Look] = {}
    for row in group.rows:
        index = None if row is group.teacher else sum(look.index is not None for look in found.values())
        kept = row.card.kept
        below = "untouched" if kept is None else f"softmax in {', '.join(map(str, kept)) or 'no layer'}"
        below = "the teacher" if row is group.teacher else "measured elsewhere" if row.imported else below
        found[row.key] = Look(label=clean(row.label), index=index, dashed=row.card.positions == "rope", below=below)
    return found


def needle_figure(group: Group) -> Scene | None:
    """Needles found by context length, as wide as a page, with what is seen at the longest length as its title."""
    looks, task = looks_of(group), needle_task(group.rows)
    lines = _lines(group.rows, looks, NEEDLE_SUITE, task, "accuracy") if task else []
    if task is None or not lines:
        return None
    lengths = needle_lengths(group.rows)
    counts = {m.n for row in group.rows for n in lengths if (m := row.metric(NEEDLE_SUITE, task, "accuracy", n))}
    each = " to ".join(map(str, dict.fromkeys((min(counts), max(counts)))))
    note = _note(f"share of needles found ({clean(task, 40)}), {each} questions a point", lines)
    x = doubling(lengths, lambda v: format_length(int(v)))
    title = needle_title(group)
    return curves(title, note, lines, x, shares(), "context length (tokens)", _trained(group), PAGE)


def needle_title(group: Group) -> str:
    """What is seen at the longest length: the hybrid that finds most, and the teacher."""
    task, longest, trained = needle_task(group.rows), needle_lengths(group.rows)[-1], group.trained_length
    found = [(row, row.metric(NEEDLE_SUITE, task or "", "accuracy", longest)) for row in group.compared]
    at_end = [(row, metric.value) for row, metric in found if metric is not None]
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
    return f"{where}, {', '.join(said)}" if said else f"Needles found by context length ({clean(task or '', 40)})"


def _trained(group: Group) -> list[tuple[float, str]]:
    """Lengths of training, ascending: of all models, and of the hybrids and the teacher where these are longer."""
    shared, hybrids = group.shared_length, group.trained_length
    teacher = group.teacher.card.trained_length if group.teacher else None
    ends = {shared: "all trained to"} if shared else {}
    ends |= {length: f"{who} to" for who, length in (("teacher", teacher), ("hybrids", hybrids))
             if length and length not in ends}  # fmt: skip
    return [(length, f"{who} {format_length(length)}") for length, who in sorted(ends.items())]


def _note(said: str, lines: Lines) -> str:
    """`said` and what the bands are, and why some lines have none."""
    known = {dot.y_error is not None for _, dots in lines for dot in dots}
    bands = {frozenset((True,)): "bands: ±1 standard error", frozenset((False,)): "no standard errors"}
    band = bands.get(frozenset(known), "bands: ±1 standard error; no band: no standard error")
    return f"{said}; {band}" if said else band


def _curves(group: Group, looks: dict[str, Look]) -> list[Scene]:
    rows, trained, found = group.rows, _trained(group), []
    task = needle_task(rows)
    if task is not None:
        lines = _lines(rows, looks, NEEDLE_SUITE, task, "accuracy")
        title = f"Needles found by context length ({clean(task, 40)})"
        found += _by_length(title, "", lines, lambda _: shares(), trained)
        lines = _lines(rows, looks, NEEDLE_SUITE, task, "answer_logprob")
        title = "Log-likelihood of the right answer, nats"
        found += _by_length(title, "", lines, _signed, trained)
    lengths = ruler_lengths(rows)
    if lengths:
        targets = [target for length in lengths if (target := ruler_target(rows, [length])) is not None]
        lines = [(looks[row.key], dots) for row in rows if (dots := _of_targets(row, targets))]
        counts = sorted({len(target.tasks) for target in targets})
        tasks = f"mean over {' to '.join(map(str, dict.fromkeys((counts[0], counts[-1]))))} tasks" if counts else ""
        found += _by_length("RULER score by context length", tasks, lines, lambda _: shares(), trained)
    texts = {key[1] for row in rows for key in row.keys("ppl") if key[2] == "bits_per_byte"}
    for text in sorted(texts):
        lines = _lines(rows, looks, "ppl", text, "bits_per_byte")
        title = f"Bits per byte by window ({clean(text, 40)}), lower is better"
        found += _by_length(title, "", lines, linear, trained)
    for task, title, unit in (
        ("tpot_ms", "Time per output token by context, ms", 1.0),
        ("cache_bytes", "Cache by context, MiB", MIB),
        ("memory_bytes", "Memory by context, MiB", MIB),
    ):
        lines = _lines(rows, looks, "profile", task, None, unit)
        found += _by_length(title, "lower is better", lines, _positive, [])
    return found


def _lines(
    rows: Sequence[Row], looks: dict[str, Look], suite: str, task: str, metric: str | None, unit: float = 1.0
) -> Lines:
    found: Lines = []
    for row in rows:
        lengths = sorted({key[3] for key in row.keys(suite) if key[1] == task and key[3]})
        measured = [(length, row.metric(suite, task, metric, length)) for length in lengths]
        dots = [Dot(x=n, y=m.value / unit, y_error=_in(m.stderr, unit)) for n, m in measured if m is not None]
        if dots:
            found.append((looks[row.key], dots))
    return found


def _in(error: float | None, unit: float) -> float | None:
    return None if error is None else error / unit


def _of_targets(row: Row, targets: Sequence[Target]) -> list[Dot]:
    values = [(target.lengths[0] or 0, target.value(row)) for target in targets]
    return [Dot(x=n, y=value[0], y_error=value[1]) for n, value in values if value is not None]


def _by_length(
    title: str,
    note: str,
    lines: Lines,
    axis: Callable[[Sequence[float]], Axis],
    trained: Sequence[tuple[float, str]],
) -> list[Scene]:
    """The chart, when some model was measured at two lengths or more."""
    if all(len(dots) < 2 for _, dots in lines):
        return []
    every = [dot for _, dots in lines for dot in dots]
    x = doubling([dot.x for dot in every], lambda v: format_length(int(v)))
    y = axis([end for dot in every for end in dot.y_ends])
    return [curves(title, _note(note, lines), lines, x, y, "context length (tokens)", trained)]


def _positive(values: Sequence[float]) -> Axis:
    """From zero; logarithmic when the values differ twentyfold."""
    above = [v for v in values if v > 0]
    return (
        logarithmic(above) if len(above) == len(values) and max(above) > 20 * min(above) else linear(values, zero=True)
    )


def _signed(values: Sequence[float]) -> Axis:
    return linear(values, zero=True)


def _percent(values: Sequence[float]) -> Axis:
    return linear(values, lambda v: f"{100 * v:.3g}%")


def _tradeoffs(group: Group, looks: dict[str, Look]) -> list[Scene]:
    """Quality against time per output token and against memory (the cache alone where no more was measured)."""
    pooled, csr = beyond_target(group), csr_target(group.rows)
    far = f"needles beyond training ({span(pooled.lengths, None)})" if pooled else ""
    qualities: list[tuple[str, Target | None, Callable[[Sequence[float]], Axis]]] = [
        (far, pooled, lambda _: shares()),
        ("commonsense accuracy", csr, _percent),
    ]
    whole = any(key[1] == "memory_bytes" for row in group.rows for key in row.keys("profile"))
    space = ("memory_bytes", "memory", "MiB", MIB) if whole else ("cache_bytes", "cache", "MiB", MIB)
    costs = (("tpot_ms", "time per token", "ms", 1.0), space)
    return [
        scene
        for quality, target, axis in qualities
        for cost in costs
        if target is not None and (scene := _tradeoff(group, looks, quality, target, axis, cost)) is not None
    ]


def _tradeoff(
    group: Group,
    looks: dict[str, Look],
    quality: str,
    target: Target,
    axis: Callable[[Sequence[float]], Axis],
    cost: tuple[str, str, str, float],
) -> Scene | None:
    """At the context most models were profiled at, the longest of these; None when fewer than two have a point."""
    task, name, symbol, unit = cost
    lengths = sorted({key[3] for row in group.compared for key in row.keys("profile") if key[1] == task and key[3]})
    made = {n: {r.key: d for r in group.compared if (d := _point(r, target, task, n, unit))} for n in lengths}
    if not made:
        return None
    at, dots = max(made.items(), key=lambda item: (len(item[1]), item[0]))
    if len(dots) < 2:
        return None
    without = [clean(row.label, 30) for row in group.compared if row.key not in dots]
    note = f"at {format_length(at)} tokens; bars: ±1 standard error; upper left is better"
    note += "; no upright bar: no standard error" if any(dot.y_error is None for dot in dots.values()) else ""
    note += f"; not measured: {', '.join(without[:3])}" if without else ""
    note += f" and {len(without) - 3} more" if len(without) > 3 else ""
    x = _positive([end for dot in dots.values() for end in dot.x_ends])
    y = axis([end for dot in dots.values() for end in dot.y_ends])
    title = f"{quality[:1].upper()}{quality[1:]} against {name}"
    points = [(looks[key], dot) for key, dot in dots.items()]
    return scatter(title, note, points, x, y, f"{name}, {symbol}")


def _point(row: Row, target: Target, task: str, length: int, unit: float) -> Dot | None:
    quality, cost = target.value(row), row.metric("profile", task, None, length)
    if quality is None or cost is None:
        return None
    return Dot(x=cost.value / unit, y=quality[0], x_error=_in(cost.stderr, unit), y_error=quality[1])


def _heat(group: Group) -> list[Scene]:
    """A map of depth by length for each model that noted depths; one of models by length for the others."""
    suite, task, lengths = _mapped(group.rows)
    if task is None or not lengths:
        return []
    names = [format_length(length) for length in lengths]
    maps, whole = [], []
    for row in group.rows:
        cells = by_depth(row, suite, task, lengths)
        if any(cells.values()):
            depths = sorted({depth for found in cells.values() for depth in found})
            grid = [(f"{depth:.0%}", [cells[n].get(depth) for n in lengths]) for depth in depths]
            title = f"{row.label}: needles found by depth and length"
            maps.append(
                heat(title, "percent found; rows: depth, 0% is the start", grid, names, "context length (tokens)")
            )
            continue
        values = [m.value if (m := row.metric(suite, task, "accuracy", n)) else None for n in lengths]
        if any(value is not None for value in values):
            whole.append((clean(row.label), values))
    if whole:
        note = "percent found, all depths together (the records note no depths)"
        maps.insert(0, heat("Needles found by model and length", note, whole, names, "context length (tokens)"))
    return maps


def _mapped(rows: Sequence[Row]) -> tuple[str, str | None, list[int]]:
    """Suite, task and lengths of the map: the grid of exact depths where it was measured, else the needles."""
    keys = [key for row in rows for key in row.keys(GRID_SUITE) if key[2] == "accuracy" and key[3]]
    if not keys:
        return NEEDLE_SUITE, needle_task(rows), needle_lengths(rows)
    task = min(key[1] for key in keys)
    return GRID_SUITE, task, sorted({key[3] for key in keys if key[1] == task and key[3]})


def by_depth(row: Row, suite: str, task: str, lengths: Sequence[int]) -> dict[int, dict[float, float]]:
    """Share found at each length and depth; more than a few different depths are gathered around tenths."""
    metrics = {length: row.metric(suite, task, "accuracy", length) for length in lengths}
    noted = {n: (m.depths, m.samples) if m and m.depths and m.samples else ([], []) for n, m in metrics.items()}
    few = len({depth for depths, _ in noted.values() for depth in depths}) <= _FEW_DEPTHS
    found: dict[int, dict[float, float]] = {}
    for length, (depths, samples) in noted.items():
        at: dict[float, list[float]] = {}
        for depth, sample in zip(depths, samples, strict=True):
            at.setdefault(depth if few else math.floor(depth * _BINS + 0.5) / _BINS, []).append(sample)
        found[length] = {depth: sum(values) / len(values) for depth, values in at.items()}
    return found


def training_lines(groups: Sequence[Group], records: Sequence[RunRecord]) -> dict[str, Lines]:
    """Loss over tokens by stage, a line a conversion, where the records hold it; and the search of the scale."""
    stages: dict[str, Lines] = {}
    known = {key: look for group in groups for key, look in looks_of(group).items()}
    for i, record in enumerate(record for record in records if record.kind == "convert"):
        own = Look(label=clean(record.model.name, 60), index=i, dashed=record.model.positions == "rope")
        look = known.get(model_key(record.model), own)
        losses = record.details.get("curves")
        named = dict(losses) if isinstance(losses, dict) else {}
        if isinstance(record.details.get("scale"), dict):
            named[SCALE] = list(record.details["scale"].items())
        for stage, points in named.items():
            dots = _dots(points)
            if len(dots) > 1:
                stages.setdefault(str(stage), []).append((look, dots))
    return stages


def training_scenes(stages: Mapping[str, Lines]) -> list[Scene]:
    """A chart a stage."""
    return [_training_chart(stage, lines) for stage, lines in stages.items()]


def _training_chart(stage: str, lines: Lines) -> Scene:
    every = [dot for _, dots in lines for dot in dots]
    y = linear([dot.y for dot in every])
    if stage == SCALE:
        x, name = doubling([dot.x for dot in every], lambda v: f"{v:g}"), "base of the position scaling of queries"
    else:
        x, name = linear([dot.x for dot in every], format_count, zero=True), "tokens"
    return curves(f"{clean(stage, 40).capitalize()}: loss", "lower is better", lines, x, y, name)


def _dots(points: Any) -> list[Dot]:
    """The (x, loss) pairs that are finite numbers, x above 0, by x, thinned; the last stays."""
    found = []
    for pair in points if isinstance(points, list) else []:
        try:
            x, y = (float(value) for value in pair)
        except (TypeError, ValueError):
            continue
        if math.isfinite(x) and math.isfinite(y) and x > 0:
            found.append(Dot(x=x, y=y))
    return thinned(sorted(found, key=lambda dot: dot.x), _POINTS)


def thinned(dots: Sequence[Dot], most: int) -> list[Dot]:
    """At most `most` of the dots, evenly spread, the last among them."""
    step = math.ceil((len(dots) - 1) / (most - 1)) if len(dots) > most else 1
    return list(dots[::-1][::step][::-1])
