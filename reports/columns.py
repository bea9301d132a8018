"""The columns of a leaderboard: what each is called, how its cells read, and what it is compared by.

Columns are found from what the rows measured: one per needle length, per text that perplexity was taken on, and so on.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from halobench.reports.comparison import Target
from halobench.reports.rows import Group, Key, Row
from halobench.reports.table import MISSING, Markup, escape, number, significant
from halobench.units import format_count, format_length

NEEDLE_SUITE, NEEDLE_TASK = "niah", "multikey-4"
CSR_SUITE, CSR_TASK = "csr", "tiny_continuation"
POSITIONS = {"rope": "RoPE", "hype": "HyPE"}


@dataclass(frozen=True, kw_only=True)
class Column:
    """`cell` reads a row; `target`, when there is one, is what the mark of the best hybrid is decided on."""

    title: Markup
    cell: Callable[[Row], str]
    meaning: str = ""
    target: Target | None = None
    uses: tuple[Key, ...] = ()


def needle_task(rows: Sequence[Row]) -> str | None:
    """The needle task of the table and the plot: four keys when measured, else the first by name."""
    tasks = sorted({key[1] for row in rows for key in row.keys(NEEDLE_SUITE) if key[2] == "accuracy" and key[3]})
    return NEEDLE_TASK if NEEDLE_TASK in tasks else (tasks[0] if tasks else None)


def needle_lengths(rows: Sequence[Row]) -> list[int]:
    """Every context length the needle task was measured at, ascending."""
    task = needle_task(rows)
    found = {key[3] for row in rows for key in row.keys(NEEDLE_SUITE) if key[1] == task and key[2] == "accuracy"}
    return sorted(length for length in found if length)


def needle_target(rows: Sequence[Row], lengths: Sequence[int]) -> Target | None:
    """Needle accuracy over `lengths`; None when there are none."""
    task = needle_task(rows)
    return (
        Target(suite=NEEDLE_SUITE, task=task, metric="accuracy", lengths=tuple(lengths)) if task and lengths else None
    )


def beyond_target(group: Group) -> Target | None:
    """Needle accuracy pooled over the lengths beyond training (over all lengths when training's is not recorded)."""
    lengths = needle_lengths(group.rows)
    trained = group.trained_length
    return needle_target(group.rows, [length for length in lengths if trained is None or length > trained])


def inside_target(group: Group) -> Target | None:
    """Needle accuracy over the lengths that teacher and hybrids alike were trained on."""
    trained = min((row.card.trained_length for row in group.rows if row.card.trained_length), default=0)
    return needle_target(group.rows, [length for length in needle_lengths(group.rows) if length <= trained])


def margin_target(rows: Sequence[Row]) -> Target | None:
    """The log-likelihood margin of the commonsense stand-in; None when no row has it."""
    target = Target(suite=CSR_SUITE, task=CSR_TASK, metric="margin")
    return target if any(row.metric(CSR_SUITE, CSR_TASK, "margin") for row in rows) else None


def text_targets(rows: Sequence[Row]) -> list[Target]:
    """Bits per byte on every text, in its shortest and its longest window."""
    measured = {k for row in rows for k in row.keys("ppl") if k[2] == "bits_per_byte"}
    windows: dict[str, list[int]] = {}
    for _, task, _, window in measured:
        windows.setdefault(task, []).append(window or 0)
    keys = [k for k in measured if (k[3] or 0) in (min(windows[k[1]]), max(windows[k[1]]))]
    return [
        Target(suite="ppl", task=k[1], metric=k[2], lengths=(k[3],))
        for k in sorted(keys, key=lambda k: (k[1], k[3] or 0))
    ]


def multiple(length: int, trained: int | None) -> str:
    """A length in training lengths: "×4"; empty when training's is not recorded."""
    return f"×{length / trained:.3g}" if trained else ""


def span(lengths: Sequence[int | None], trained: int | None) -> str:
    """A range of lengths: "1K to 8K, ×2 to ×16"."""
    known = [length for length in lengths if length]
    if not known:
        return "all lengths"
    ends = list(dict.fromkeys((known[0], known[-1])))
    shown = " to ".join(format_length(end) for end in ends)
    return shown + (", " + " to ".join(multiple(end, trained) for end in ends) if trained else "")


def columns(group: Group) -> list[Column]:
    """All columns of the group's table, the first three being text."""
    layers = sorted({row.card.layers for row in group.rows})
    return [
        Column(
            title=Markup("selection"), cell=_name, meaning="how the kept layers were chosen; equal choices share a row"
        ),
        Column(
            title=Markup(f"kept layers (of {', '.join(map(str, layers))})"),
            cell=_kept,
            meaning="softmax layers that stay, counted from 0; all others became recurrent",
        ),
        Column(
            title=Markup("positions"),
            cell=lambda row: POSITIONS.get(row.card.positions, row.card.positions),
            meaning="RoPE: the kept layers carry rotary positions; HyPE: they carry none, recurrent layers do",
        ),
        *_quality(group),
        Column(
            title=Markup("tokens"),
            cell=_tokens,
            meaning="tokens spent on the conversion, selection and alignment included",
        ),
        *_costs(group),
    ]


def _name(row: Row) -> str:
    return Markup(f"**{escape(row.label)}** (teacher)") if row.untouched else row.label


def _kept(row: Row) -> str:
    if row.card.kept is None:
        return "all"
    return ", ".join(map(str, row.card.kept)) or "none"


def _tokens(row: Row) -> str:
    return MISSING if row.untouched or not row.tokens else format_count(row.tokens)


def _quality(group: Group) -> list[Column]:
    rows, trained, found = group.rows, group.trained_length, []
    margin = margin_target(rows)
    if margin:
        meaning = (
            "commonsense stand-in: log-likelihood of the true continuation over the others, nats per byte; acc: how "
            "often the true one is the likeliest"
        )
        found.append(
            Column(title=Markup("CSR margin (acc)"), cell=_margin, meaning=meaning, target=margin, uses=_keys(margin))
        )
    found += _csr_mean(rows)
    for length in needle_lengths(rows):
        target = needle_target(rows, [length])
        mark = f" {multiple(length, trained)}" + (" (trained)" if length == trained else "")
        found.append(_score(f"needles {format_length(length)}{mark.rstrip()}", target))
    pooled = beyond_target(group)
    if pooled and trained:
        found.append(_score("needles beyond training", pooled, f"mean over {span(pooled.lengths, trained)}"))
    meaning = "on held-out text; lower is better"
    for target in text_targets(rows):
        at = f" at {format_length(target.lengths[0])}" if target.lengths[0] else ""
        title = f"bits per byte, {escape(target.task)}{at}"
        found.append(_score(title, target, meaning))
        meaning = ""
    return found


def _csr_mean(rows: Sequence[Row]) -> list[Column]:
    """Mean over the commonsense tasks that every row with any of them has: normalised accuracy where there is one."""
    tasks = [{key[1] for key in row.keys(CSR_SUITE)} - {CSR_TASK} for row in rows]
    common = sorted(set.intersection(*(own for own in tasks if own))) if any(tasks) else []
    if not common:
        return []

    def cell(row: Row) -> str:
        scores = [row.metric(CSR_SUITE, t, "acc_norm") or row.metric(CSR_SUITE, t, "acc") for t in common]
        known = [m for m in scores if m is not None]
        if len(known) < len(common):
            return missing(row, "eval", Target(suite=CSR_SUITE, task=common[0], metric="acc"))
        errors = [m.stderr for m in known if m.stderr is not None]
        stderr = math.sqrt(sum(e * e for e in errors)) / len(known) if len(errors) == len(known) else None
        return number(sum(m.value for m in known) / len(known), stderr)

    meaning = f"mean accuracy, length-normalised where there is one, over {', '.join(common)}"
    return [Column(title=Markup(f"CSR mean ({len(common)} tasks)"), cell=cell, meaning=meaning)]


def _keys(target: Target) -> tuple[Key, ...]:
    return tuple((target.suite, target.task, target.metric, length) for length in target.lengths)


def _score(title: str, target: Target | None, meaning: str = "") -> Column:
    def cell(row: Row) -> str:
        found = target.value(row) if target else None
        return number(*found) if found else missing(row, "eval", target)

    return Column(title=Markup(title), cell=cell, meaning=meaning, target=target, uses=_keys(target) if target else ())


def _margin(row: Row) -> str:
    margin = row.metric(CSR_SUITE, CSR_TASK, "margin")
    if margin is None:
        return missing(row, "eval", Target(suite=CSR_SUITE, task=CSR_TASK, metric="margin"))
    accuracy = row.metric(CSR_SUITE, CSR_TASK, "acc")
    beside = f" ({number(accuracy.value)})" if accuracy else ""
    return Markup(number(margin.value, margin.stderr) + beside)


def missing(row: Row, kind: str, target: Target | None = None) -> str:
    """A dash; when a record about it ended in an error, what kind of error: that is a result too."""
    lengths = target.lengths if target else (None,)
    failures = [why for length in lengths for why in row.failures(kind, target.suite if target else None, length)]
    if any("out of memory" in reason.lower() for reason in failures):
        return "out of memory"
    return "failed" if failures else MISSING


def profile_contexts(rows: Sequence[Row]) -> list[int]:
    """The shortest and the longest context that speed or memory was measured at."""
    lengths = sorted({key[3] for row in rows for key in row.keys("profile") if key[3]})
    return list(dict.fromkeys([lengths[0], lengths[-1]])) if lengths else []


def _costs(group: Group) -> list[Column]:
    kinds = (
        ("TPOT ms", "tpot_ms", 1.0, "time per output token while decoding"),
        (
            "cache MiB",
            "cache_bytes",
            2.0**20,
            "what the model remembers between tokens: keys, values, recurrent states",
        ),
    )
    contexts = profile_contexts(group.rows)
    at = " / ".join(format_length(length) for length in contexts)
    return [
        Column(
            title=Markup(f"{title} at {at}"),
            cell=_cost_cell(task, contexts, unit),
            meaning=f"{meaning} ({', '.join(sorted({key[2] for key in keys}))})",
            uses=tuple(keys),
        )
        for title, task, unit, meaning in kinds
        if (keys := {key for length in contexts for key in _profile_keys(group.rows, task, length)})
    ]


def _cost_cell(task: str, contexts: Sequence[int], unit: float) -> Callable[[Row], str]:
    def cell(row: Row) -> str:
        shown = []
        for length in contexts:
            found = row.metric("profile", task, None, length)
            absent = Target(suite="profile", task=task, metric="value", lengths=(length,))
            shown.append(significant(found.value / unit) if found else missing(row, "profile", absent))
        return Markup(MISSING) if set(shown) == {MISSING} else Markup(" / ".join(shown))

    return cell


def _profile_keys(rows: Sequence[Row], task: str, length: int) -> set[Key]:
    sources = [row.source("profile", task, None, length) for row in rows]
    return {("profile", task, source.metric.metric, length) for source in sources if source}
