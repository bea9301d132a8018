"""The columns of a leaderboard: what each is called, how its cells read, and what it is compared by.

Columns are found from what the rows measured: one per needle length, per text that perplexity was taken on, and so on.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial

from halobench.reports.comparison import Comparisons
from halobench.reports.pairing import Target
from halobench.reports.rows import Group, Key, Row
from halobench.reports.table import MISSING, Markup, escape, number, significant
from halobench.units import format_count, format_length

NEEDLE_SUITE, NEEDLE_TASK = "niah", "multikey-4"
CSR_SUITE, CSR_TASK = "csr", "tiny_continuation"
RULER_SUITE = "ruler"
MEANS = {  # of suites of lm-eval's tasks: the title, and the metrics that are averaged, the first that all rows have
    CSR_SUITE: ("CSR", ("acc_norm", "acc")),
    "csr-small": ("CSR of HALO's selection", ("acc_norm", "acc")),
    "recall": ("recall", ("contains", "acc")),
}
MIB = 2.0**20
POSITIONS = {"rope": "RoPE", "hype": "HyPE"}


@dataclass(frozen=True, kw_only=True)
class Column:
    """`cell` reads a row; `target`, when there is one, is what the mark of the best hybrid is decided on.

    order: what rows are sorted by in this column. falling: numbers are sorted from the highest, which is the best.
    """

    title: Markup
    cell: Callable[[Row], str]
    order: Callable[[Row], float | str | None]
    falling: bool = False
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
    trained = group.shared_length or 0
    return needle_target(group.rows, [length for length in needle_lengths(group.rows) if length <= trained])


def margin_target(rows: Sequence[Row]) -> Target | None:
    """The log-likelihood margin of the commonsense stand-in; None when no row has it."""
    target = Target(suite=CSR_SUITE, task=CSR_TASK, metric="margin")
    return target if any(row.metric(CSR_SUITE, CSR_TASK, "margin") for row in rows) else None


def suite_mean(rows: Sequence[Row], suite: str) -> Target | None:
    """Mean over the tasks of an lm-eval suite that every row with any of them has; None when there are none."""
    known = MEANS[suite][1]
    measured = [{(key[1], key[2]) for key in row.keys(suite) if key[2] in known} for row in rows if not row.imported]
    measured = [own for own in measured if {task for task, _ in own} - {CSR_TASK}]
    if not measured:
        return None
    tasks = sorted(set.intersection(*({task for task, _ in own} - {CSR_TASK} for own in measured)))
    chosen = [
        next(((task, metric) for metric in known if all((task, metric) in own for own in measured)), None)
        for task in tasks
    ]
    pairs = [pair for pair in chosen if pair is not None]
    return Target(suite=suite, task=pairs[0][0], metric=pairs[0][1], also=tuple(pairs[1:])) if pairs else None


def csr_target(rows: Sequence[Row]) -> Target | None:
    """Commonsense accuracy: the mean over lm-eval's tasks, else the stand-in's."""
    if mean := suite_mean(rows, CSR_SUITE):
        return mean
    target = Target(suite=CSR_SUITE, task=CSR_TASK, metric="acc")
    return target if any(target.sources(row) for row in rows) else None


def ruler_lengths(rows: Sequence[Row]) -> list[int]:
    """Every context length a RULER task was scored at, ascending."""
    return sorted({key[3] for row in rows for key in row.keys(RULER_SUITE) if key[2] == "score" and key[3]})


def ruler_target(rows: Sequence[Row], lengths: Sequence[int]) -> Target | None:
    """Mean RULER score over the tasks that every row with any of them has at all of `lengths`; None without one."""
    measured = [{k for k in row.keys(RULER_SUITE) if k[2] == "score" and k[3] in lengths} for row in rows]
    measured = [keys for keys in measured if keys]
    if not measured or not lengths:
        return None
    shared = set.intersection(*measured)
    tasks = [t for t in sorted({k[1] for k in shared}) if sum(k[1] == t for k in shared) == len(lengths)]
    also = tuple((task, "score") for task in tasks[1:])
    if not tasks:
        return None
    return Target(suite=RULER_SUITE, task=tasks[0], metric="score", lengths=tuple(lengths), also=also)


def standing_targets(group: Group) -> dict[str, Target]:
    """What a hybrid must not be worse in than its teacher, by name: commonsense, and contexts both were trained on.

    RULER stands for its longest such length alone: some of its questions are the same at every length.
    """
    rows, trained = group.compared, group.shared_length or 0
    inside = [length for length in ruler_lengths(rows) if length <= trained]
    found = {"CSR": csr_target(rows), "needles": inside_target(group), "RULER": ruler_target(rows, inside[-1:])}
    return {name: target for name, target in found.items() if target is not None}


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


TEXT_COLUMNS = 4


def columns(group: Group) -> list[Column]:
    """All columns of the group's table, the first TEXT_COLUMNS being text."""
    layers = sorted({row.card.layers for row in group.rows if not row.imported})
    of = f" (of {', '.join(map(str, layers))})" if layers else ""
    return [
        _text("selection", _name, "how the kept layers were chosen; equal choices share a row", lambda row: row.label),
        _text(
            f"kept layers{of}",
            _kept,
            "softmax layers that stay, counted from 0; all others became recurrent",
            lambda row: _count(row.card.kept),
        ),
        _text("mixer", lambda row: row.card.mixer or MISSING, "what the other layers became"),
        _text(
            "positions",
            lambda row: MISSING if row.imported else POSITIONS.get(row.card.positions, row.card.positions),
            "RoPE: the kept layers carry rotary positions; HyPE: they carry none, recurrent layers do",
        ),
        *_quality(group),
        Column(
            title=Markup("tokens"),
            cell=_tokens,
            order=lambda row: None if row.untouched or not row.tokens else row.tokens,
            meaning="tokens spent on the conversion, selection and alignment included",
        ),
        *_costs(group),
    ]


def table_columns(group: Group, made: Comparisons) -> list[Column]:
    """The columns of the group's table, and whether each hybrid is shown to be as good as the teacher."""
    if not made.standings:
        return columns(group)
    names = {target: name for name, target in standing_targets(group).items()}
    tested = {s.row for s in made.standings if s.lowest is not None}
    shown = {row: [names[s.target] for s in made.standings if s.row == row and s.shown] for row in tested}

    def text(row: Row) -> str:
        return ", ".join(shown[row.key]) or "not shown" if row.key in shown else MISSING

    margin = made.standings[0].margin
    meaning = (
        f"in what the hybrid is shown to be at most {margin:g} worse than the teacher, of {', '.join(names.values())} "
        "(one-sided 97.5%, corrected with the comparisons behind the marks; needles at all lengths both were trained "
        "on, RULER at the longest of them)"
    )
    column = Column(
        title=Markup(f"within {margin:g} of teacher"),
        cell=text,
        order=lambda row: len(shown[row.key]) if row.key in shown else None,
        falling=True,
        meaning=meaning,
    )
    return [*columns(group), column]


def _text(
    title: str, cell: Callable[[Row], str], meaning: str, order: Callable[[Row], float | str | None] | None = None
) -> Column:
    def text(row: Row) -> str | None:
        shown = cell(row)
        return None if shown == MISSING else shown

    return Column(title=Markup(title), cell=cell, meaning=meaning, order=order or text)


def _count(kept: Sequence[int] | None) -> float | None:
    return None if kept is None else len(kept)


def _name(row: Row) -> str:
    return Markup(f"**{escape(row.label)}** (teacher)") if row.untouched and not row.imported else row.label


def _kept(row: Row) -> str:
    if row.card.kept is None:
        return MISSING if row.imported else "all"
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
        title = "CSR margin (acc)"
        found.append(replace(_score(title, margin, meaning), cell=_margin))
    for suite in MEANS:
        found += _mean(rows, suite)
    for length in needle_lengths(rows):
        found.append(_score(f"needles {_at(length, trained)}", needle_target(rows, [length])))
    pooled = beyond_target(group)
    if pooled and trained:
        found.append(_score("needles beyond training", pooled, f"mean over {span(pooled.lengths, trained)}"))
    told: set[str] = set()  # what is said of one length need not be said of the next
    for length in ruler_lengths(rows):
        target = ruler_target(rows, [length])
        if target is not None:
            meaning = _mean_of(target)
            found.append(
                _score(f"RULER {_at(length, trained)} ({_tasks(target)})", target, "" if meaning in told else meaning)
            )
            told.add(meaning)
    meaning = "on held-out text; lower is better"
    for target in text_targets(rows):
        at = f" at {format_length(target.lengths[0])}" if target.lengths[0] else ""
        title = f"bits per byte, {escape(target.task)}{at}"
        found.append(_score(title, target, meaning, falling=False))
        meaning = ""
    return found


def _at(length: int, trained: int | None) -> str:
    mark = f" {multiple(length, trained)}" + (" (trained)" if length == trained else "")
    return f"{format_length(length)}{mark.rstrip()}"


def _tasks(target: Target) -> str:
    count = len(target.tasks)
    return f"{count} task{'s' * (count != 1)}"


def _mean_of(target: Target) -> str:
    return f"mean score over {', '.join(task for task, _ in target.tasks)}"


def _mean(rows: Sequence[Row], suite: str) -> list[Column]:
    target = suite_mean(rows, suite)
    if target is None:
        return []
    normalised = ", length-normalised where there is one," if suite == CSR_SUITE else ""
    meaning = f"mean accuracy{normalised} over {', '.join(task for task, _ in target.tasks)}"
    return [_score(f"{MEANS[suite][0]} mean ({_tasks(target)})", target, meaning)]


def _keys(target: Target) -> tuple[Key, ...]:
    return tuple((target.suite, task, metric, length) for task, metric in target.tasks for length in target.lengths)


def _score(title: str, target: Target | None, meaning: str = "", *, falling: bool = True) -> Column:
    def value(row: Row) -> tuple[float, float | None] | None:
        return target.value(row) if target else None

    def cell(row: Row) -> str:
        found = value(row)
        return number(*found) if found else missing(row, "eval", target)

    return Column(
        title=Markup(title),
        cell=cell,
        order=lambda row: found[0] if (found := value(row)) else None,
        falling=falling,
        meaning=meaning,
        target=target,
        uses=_keys(target) if target else (),
    )


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
        ("cache MiB", "cache_bytes", MIB, "what the model remembers between tokens: keys, values, recurrent states"),
        ("memory MiB", "memory_bytes", MIB, "weights and the peak of what was held beside them"),
    )
    contexts = profile_contexts(group.rows)
    at = " / ".join(format_length(length) for length in contexts)
    return [
        Column(
            title=Markup(f"{title} at {at}"),
            cell=_cost_cell(task, contexts, unit),
            order=partial(_cost, task=task, length=contexts[-1]),
            meaning=f"{meaning} ({', '.join(sorted({key[2] for key in keys}))})",
            uses=tuple(keys),
        )
        for title, task, unit, meaning in kinds
        if (keys := {key for length in contexts for key in _profile_keys(group.rows, task, length)})
    ]


def _cost(row: Row, task: str, length: int) -> float | None:
    found = row.metric("profile", task, None, length)
    return found.value if found else None


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
