"""Joins the records of one model (tasks, perplexity, speed) into one row, and rows into groups by teacher.

A model is known by its hash: records that share one are one row, and two models that share a name are two rows, told
apart by their labels. When a number was measured twice the newer record counts; those of a record that ended in an
error do not count at all.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from halobench.records import Metric, ModelCard, RunRecord
from halobench.reports.table import clean
from halobench.units import format_length

Key = tuple[str, str, str, int | None]
LONGEST_NAME = 60
IMPORTED = "imported"  # the lineage of a record that another harness measured says here which
_PREFERRED = ("value", "median", "mean")
_MEASURES = {"continuation": "csr"}  # what metrics call the suite, where an evaluation asks for it by another name


@dataclass(frozen=True)
class Measured:
    """A metric and the record it came from."""

    metric: Metric
    record: RunRecord


@dataclass(frozen=True, kw_only=True)
class Row:
    """One model with everything that was measured on it. `label` is unique among the rows built together.

    flaws: numbers that were left out because they are not finite, by name.
    """

    card: ModelCard
    label: str
    selection: str
    measured: Mapping[Key, Measured]
    records: tuple[RunRecord, ...]
    tokens: int
    flaws: tuple[str, ...] = ()

    @property
    def imported(self) -> bool:
        """True for a model whose numbers come from another harness."""
        return IMPORTED in self.records[-1].lineage

    @property
    def key(self) -> str:
        """What identifies the model."""
        return model_key(self.card)

    @property
    def untouched(self) -> bool:
        """True for a decoder that was not converted."""
        return self.card.kept is None

    def metric(self, suite: str, task: str, metric: str | None = None, length: int | None = None) -> Metric | None:
        """What was measured, or None. Without `metric`, the task's only one (or its value, median or mean)."""
        found = self.source(suite, task, metric, length)
        return found.metric if found else None

    def source(self, suite: str, task: str, metric: str | None = None, length: int | None = None) -> Measured | None:
        """Like `metric`, with the record the number came from."""
        if metric is not None:
            return self.measured.get((suite, task, metric, length))
        names = sorted(name for s, t, name, at in self.measured if (s, t, at) == (suite, task, length))
        chosen = next((name for name in _PREFERRED if name in names), names[0] if names else None)
        return self.measured[suite, task, chosen, length] if chosen is not None else None

    def keys(self, suite: str) -> list[Key]:
        """Everything measured in `suite`, in a stable order."""
        return sorted((key for key in self.measured if key[0] == suite), key=lambda k: (k[1], k[2], k[3] or 0))

    def failures(self, kind: str, suite: str | None = None, length: int | None = None) -> list[str]:
        """Why records of `kind` ("eval", "profile") failed; those about other suites or lengths are left out."""
        return [why for record in self.records if record.kind == kind for why in _failures(record, suite, length)]


@dataclass(frozen=True, kw_only=True)
class Group:
    """A teacher (None when it was not measured), the hybrids made from it, and rows that another harness measured."""

    name: str
    teacher: Row | None
    hybrids: tuple[Row, ...]
    imported: tuple[Row, ...] = ()

    @property
    def compared(self) -> list[Row]:
        """What this package measured, and so compares: the teacher, then the hybrids."""
        return [*([self.teacher] if self.teacher else []), *self.hybrids]

    @property
    def rows(self) -> list[Row]:
        """The teacher, the hybrids, then what was imported."""
        return [*self.compared, *self.imported]

    @property
    def trained_length(self) -> int | None:
        """See `trained_length`."""
        return trained_length(self.rows)

    @property
    def shared_length(self) -> int | None:
        """The longest context that teacher and hybrids alike were trained on."""
        return shared_length(self.compared)


def shared_length(rows: Sequence[Row]) -> int | None:
    """The longest context that all of `rows` were trained on, as far as that is recorded."""
    return min((row.card.trained_length for row in rows if row.card.trained_length), default=None)


def trained_length(rows: Sequence[Row]) -> int | None:
    """The longest context the hybrids were trained on (the teacher, without hybrids): beyond it all is new to them."""
    known = [(row.untouched, row.card.trained_length) for row in rows if row.card.trained_length and not row.imported]
    own = [length for untouched, length in known if not untouched] or [length for _, length in known]
    return max(own, default=None)


def seed_of(record: RunRecord, suite: str) -> Any:
    """The seed of a suite's questions: the suite's own setting, else the record's; None when it was not noted."""
    own = (settings["seed"] for name, settings in _suites(record) if name == suite and "seed" in settings)
    return next(own, record.settings.get("seed"))


def _suites(record: RunRecord) -> list[tuple[str, dict[str, Any]]]:
    """Each suite that was asked for, as metrics call it ("niah:multikey-4" measures niah), with its settings."""
    found = [(name.partition(":")[0], value) for name, value in record.settings.items() if isinstance(value, dict)]
    return [(_MEASURES.get(name, name), value) for name, value in found]


def _failures(record: RunRecord, suite: str | None, length: int | None) -> list[str]:
    """Errors of the whole record, and of single contexts of a profile or tasks of an evaluation without memory."""
    if record.status == "error" and _concerns(record, suite, length):
        return [record.error or "unknown error"]
    if record.kind == "eval":
        return [
            str(row.get("error")) + (f" at {format_length(row['length'])} tokens" if row.get("length") else "")
            for row in _tables(record.details.get("failed"))
            if suite in (None, row.get("suite")) and length in (None, row.get("length"))
        ]
    # The columns are of single sequences.
    contexts = [row for row in _tables(record.details.get("rows")) if row.get("batch", 1) == 1]
    failed = [row for row in contexts if row.get("status", "ok") != "ok" and length in (None, row.get("context"))]
    reasons = [
        ("out of memory" if row["status"] == "oom" else str(row.get("error")), row.get("context")) for row in failed
    ]
    return [why + (f" at {format_length(at)} tokens" if isinstance(at, int) else "") for why, at in reasons]


def _tables(rows: Any) -> list[dict[str, Any]]:
    """The tables in what should be a list of them."""
    return [row for row in rows if isinstance(row, dict)] if isinstance(rows, list) else []


def _concerns(record: RunRecord, suite: str | None, length: int | None) -> bool:
    """False only when an evaluation's settings say that it was about other suites or other lengths."""
    asked = _suites(record) if record.kind == "eval" else []
    about = [settings.get("lengths") for name, settings in asked if suite in (None, name)]
    sized = [lengths if isinstance(lengths, list) else [] for lengths in about]
    return not asked or any(length is None or not lengths or length in lengths for lengths in sized)


def model_key(card: ModelCard) -> str:
    """The model's hash; a card without one is known by its path and name."""
    return card.hash or f"{card.path}:{card.name}"


def selector_labels(records: Iterable[RunRecord]) -> dict[str, str]:
    """What people call each selector, from the selection records."""
    labels = {"halo": "HALO"}
    for record in records:
        for name, entry in methods(record).items():
            labels[name] = str(entry.get("label") or labels.get(name, name))
    return labels


def methods(record: RunRecord) -> dict[str, dict]:
    """The selectors in a selection record and what each gave; empty when there are none."""
    selection = record.details.get("selection")
    found = selection.get("methods") if isinstance(selection, dict) else None
    return {k: v for k, v in found.items() if isinstance(v, dict)} if isinstance(found, dict) else {}


def build_rows(records: Sequence[RunRecord]) -> list[Row]:
    """One row per evaluated or profiled model, untouched decoders first, otherwise in the order of the records."""
    labels = selector_labels(records)
    by_model: dict[str, list[RunRecord]] = {}
    for record in records:
        by_model.setdefault(model_key(record.model), []).append(record)
    evaluated = [group for group in by_model.values() if any(r.kind in ("eval", "profile") for r in group)]
    rows = [_join(group, labels) for group in evaluated]
    return _with_unique_labels(sorted(rows, key=lambda row: not row.untouched))


def _join(records: list[RunRecord], labels: Mapping[str, str]) -> Row:
    ordered = sorted(records, key=lambda record: record.created)
    sound = [record for record in ordered if record.kind in ("eval", "profile") and record.status == "ok"]
    found = [(metric, record) for record in sound for metric in record.metrics]
    measured = {_key(m): Measured(finite(m), record) for m, record in found if math.isfinite(m.value)}
    flawed = dict.fromkeys(metric_name(_key(m)) for m, _ in found if finite(m) is not m)
    card = max((record.model for record in ordered), key=lambda card: len(card.ledger))
    selectors = list(dict.fromkeys(name for record in ordered for name in record.model.selectors))
    card = replace(card, selectors=selectors)
    converted = max((sum(row.tokens for row in r.ledger) for r in ordered if r.kind == "convert"), default=0)
    selection = " = ".join(labels.get(name, name) for name in selectors)
    source = ordered[-1].lineage.get(IMPORTED)
    return Row(
        card=card,
        label=_label(card, selection) + (f" ({clean(source, 20)})" if source else ""),
        selection=selection,
        measured=measured,
        records=tuple(ordered),
        tokens=card.tokens or converted,
        flaws=tuple(flawed),
    )


def _key(metric: Metric) -> Key:
    return metric.suite, metric.task, metric.metric, metric.length


def metric_name(key: Key) -> str:
    """A measurement in words: "niah multikey-4 accuracy at 4K"."""
    suite, task, metric, length = key
    return f"{suite} {task} {metric}" + (f" at {format_length(length)}" if length else "")


def finite(metric: Metric) -> Metric:
    """`metric` without a standard error or samples that are NaN or infinite; itself when all of it is finite."""
    stderr = metric.stderr if metric.stderr is None or math.isfinite(metric.stderr) else None
    samples = metric.samples if all(map(math.isfinite, metric.samples or [])) else None
    if math.isfinite(metric.value) and (stderr, samples) == (metric.stderr, metric.samples):
        return metric
    beside = metric if samples is not None else replace(metric, clusters=None, depths=None)
    return replace(beside, stderr=stderr, samples=samples)


def _label(card: ModelCard, selection: str) -> str:
    if card.kept is None or not selection:
        return clean(card.name, LONGEST_NAME)
    return clean(selection, 2 * LONGEST_NAME) + (" (RoPE kept)" if card.positions == "rope" else "")


def _with_unique_labels(rows: list[Row]) -> list[Row]:
    """Adds the model's name, then its hash, to labels that several rows share."""
    suffixes: list[Callable[[Row], str]] = [
        lambda row: (
            "" if row.label == clean(row.card.name, LONGEST_NAME) else f" ({clean(row.card.name, LONGEST_NAME)})"
        ),
        lambda row: f" #{row.key[:8]}",
        lambda row: f" #{row.key}",
    ]
    for suffix in suffixes:
        counts = Counter(row.label for row in rows)
        rows = [replace(row, label=row.label + suffix(row)) if counts[row.label] > 1 else row for row in rows]
    return rows


def group_by_teacher(rows: Sequence[Row]) -> list[Group]:
    """Hybrids under their teachers, which they name by hash, path or name; a name that two decoders share fits none.

    Imported rows stand in the only group there is, or under the teacher of their name, or in a group of their own.
    """
    own = [row for row in rows if not row.imported]
    untouched = [row for row in own if row.untouched]
    made: dict[str, list[Row]] = {}
    teachers: dict[str, Row] = {}
    for row in own:
        teacher = row if row.untouched else _teacher_of(row, untouched)
        name = teacher.key if teacher else f"unmeasured:{row.card.teacher}"
        made.setdefault(name, [])
        if teacher:
            teachers[name] = teacher
        if not row.untouched:
            made[name].append(row)
    groups = [
        Group(
            name=teachers[key].label if key in teachers else key.removeprefix("unmeasured:") or "an unnamed teacher",
            teacher=teachers.get(key),
            hybrids=tuple(hybrids),
        )
        for key, hybrids in made.items()
    ]
    return _with_imported(groups, [row for row in rows if row.imported])


def _with_imported(groups: list[Group], imported: Sequence[Row]) -> list[Group]:
    placed: list[list[Row]] = [[] for _ in groups]
    rest: list[Row] = []
    for row in imported:
        named = [i for i, g in enumerate(groups) if g.teacher and row.card.name in (g.teacher.card.name, g.name)]
        fits = [0] if len(groups) == 1 else named
        (placed[fits[0]] if len(fits) == 1 else rest).append(row)
    found = [replace(group, imported=tuple(own)) for group, own in zip(groups, placed, strict=True)]
    return found + ([Group(name="imported", teacher=None, hybrids=(), imported=tuple(rest))] if rest else [])


def _teacher_of(hybrid: Row, untouched: Sequence[Row]) -> Row | None:
    wanted = hybrid.card.teacher
    for known_as in (
        lambda card: {card.hash},
        lambda card: {card.path},
        lambda card: {card.name},
        lambda card: {card.teacher},
    ):
        found = [row for row in untouched if wanted and wanted in known_as(row.card)]
        if found:
            return found[0] if len(found) == 1 else None
    return None
