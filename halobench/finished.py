"""Finished suites of an evaluation, into a record and out of it again."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from halobench.config import from_dict, to_dict
from halobench.records import LedgerRow, Metric, ModelCard, RunRecord
from halobench.tasks.request import Failure
from halobench.tasks.schedule import Reading
from halobench.tasks.suites import SuiteOutcome

Pair = tuple[str, str]  # suite and task, as metrics call them


@dataclass(frozen=True, kw_only=True)
class Finished:
    """A suite that was run, the settings that decided its numbers, and the kernels and device that really ran."""

    settings: dict[str, Any]
    backends: dict[str, str]
    outcome: SuiteOutcome

    @property
    def pairs(self) -> set[Pair]:
        """What it measured."""
        outcome = self.outcome
        rows: list[Metric | Reading | Failure] = [*outcome.metrics, *outcome.readings, *outcome.failed]
        return {(row.suite, row.task) for row in rows}

    @property
    def truncated(self) -> int:
        """Prompts that were not read whole: of sampled tasks, and what other suites say among their `work`."""
        work = self.outcome.details.get("work") or {}
        return sum(row.truncated for row in self.outcome.readings) + int(work.get("truncated", 0))

    def answers(self, settings: Mapping[str, Any]) -> bool:
        """Whether a request with these settings need not be run: prompts were whole, and nothing ran out of memory.

        What ran out is tried again, for how much memory is free is no setting.
        """
        return self.settings == settings and not self.truncated and not self.outcome.failed


def make_record(card: ModelCard, identity: Mapping[str, Any], finished: Mapping[str, Finished]) -> RunRecord:
    """The record of these suites, all of one model and one `identity` (see Evaluation).

    `details`: `reading`, what the results rest on; `suites`, what each suite says of itself; `of`, the (suite, task)
    pairs of the metrics that belong to each suite asked for; `identity`; `backends` of each suite; and `failed`, what
    found no memory: a list of {"suite", "task", "length", "error"}. These have no metrics, and the status stays "ok".
    """
    outcomes = {name: one.outcome for name, one in finished.items()}
    failed = [to_dict(failure) for outcome in outcomes.values() for failure in outcome.failed]
    cut = sum(one.truncated for one in finished.values())
    return RunRecord(
        kind="eval",
        model=card,
        metrics=[metric for outcome in outcomes.values() for metric in outcome.metrics],
        details={
            "reading": _reading(finished),
            "suites": {name: outcome.details for name, outcome in outcomes.items() if outcome.details},
            "of": {name: [list(pair) for pair in sorted(one.pairs)] for name, one in finished.items()},
            "identity": dict(identity),
            "backends": {name: one.backends for name, one in finished.items()},
            **({"failed": failed} if failed else {}),
        },
        settings={name: one.settings for name, one in finished.items()},
        ledger=[
            LedgerRow(what=name, tokens=outcome.tokens, seconds=round(outcome.seconds, 2))
            for name, outcome in outcomes.items()
        ],
        backends=merged(one.backends for one in finished.values()),
        status="error" if cut else "ok",
        error=f"{cut} prompts were not read whole; their numbers do not count" if cut else None,
    )


def _reading(finished: Mapping[str, Finished]) -> dict[str, Any]:
    """A row for each sampled task and length, sums, and the peak memory of each suite."""
    rows = [to_dict(row) for one in finished.values() for row in one.outcome.readings]
    sums = {key: sum(row[key] for row in rows) for key in ("samples", "questions", "tokens", "tokens_plain")}
    sums["truncated"] = sum(one.truncated for one in finished.values())
    return {"tasks": rows, "total": sums, "peak_bytes": {n: one.outcome.peak_bytes for n, one in finished.items()}}


def merged(backends: Iterable[Mapping[str, str]]) -> dict[str, str]:
    """What ran, by part of the model; several forms of one part side by side."""
    forms: dict[str, dict[str, None]] = {}
    for some in backends:
        for part, form in some.items():
            forms.setdefault(part, {}).update(dict.fromkeys(form.split(", ")))
    return {part: ", ".join(found) for part, found in forms.items()}


def suites_in(record: RunRecord, identity: Mapping[str, Any]) -> dict[str, Finished]:
    """The suites of a finished record, each with all that is needed to put it into another.

    None when the record is of another identity, or does not say which metrics belong to which suite.
    """
    details = record.details
    if details.get("identity") != dict(identity) or "of" not in details:
        return {}
    spent = {row.what: row for row in record.ledger}
    return {name: _finished(record, name, spent[name]) for name in record.settings if name in spent}


def _finished(record: RunRecord, name: str, spent: LedgerRow) -> Finished:
    details = record.details
    mine = {tuple(pair) for pair in details["of"][name]}

    def own(rows: Iterable[dict[str, Any]]) -> list[dict[str, Any]]:
        return [row for row in rows if (row["suite"], row["task"]) in mine]

    metrics: list[Metric] = [metric for metric in record.metrics if (metric.suite, metric.task) in mine]
    outcome = {
        "suite": name,
        "metrics": [to_dict(metric) for metric in metrics],
        "tokens": spent.tokens,
        "seconds": spent.seconds,
        "readings": own(details["reading"]["tasks"]),
        "details": details["suites"].get(name, {}),
        "failed": own(details.get("failed", [])),
        "peak_bytes": details["reading"]["peak_bytes"][name],
    }
    return Finished(
        settings=record.settings[name],
        backends=details["backends"][name],
        outcome=from_dict(SuiteOutcome, outcome, f"suite {name} of the record"),
    )
