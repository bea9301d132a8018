"""Evaluating and profiling models into records: one record a model, finished suites kept when work is interrupted."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from halobench.config import from_dict, to_dict
from halobench.errors import UserError
from halobench.files import read_json, write_json
from halobench.models import card_of, load, resolve
from halobench.progress import say
from halobench.records import LedgerRow, Metric, ModelCard, RunRecord, read_record


@dataclass(frozen=True, kw_only=True)
class EvalRequest:
    """What to measure: suites, context lengths, samples (`limits` by suite go before `limit`), local data and seed."""

    suites: tuple[str, ...]
    lengths: tuple[int, ...]
    limit: int | None = None
    limits: tuple[tuple[str, int], ...] = ()
    data_dir: Path | None = None
    seed: int = 0

    def check(self) -> None:
        """Raises UserError for what can be known to be wrong before any model is loaded."""
        from halobench.tasks.suites import parse_suites

        parse_suites(self.suites)
        if self.limit is not None and self.limit < 1:
            raise UserError(f"--limit {self.limit} leaves nothing to measure; give 1 or more")
        if self.data_dir is not None and not self.data_dir.is_dir():
            raise UserError(f"--data-dir {self.data_dir} is not a folder")

    def limit_of(self, suite: str) -> int | None:
        """Samples of one suite."""
        return dict(self.limits).get(suite, self.limit)

    def settings(self, suite: str) -> dict[str, Any]:
        """What decides the numbers of one suite, as plain data."""
        return {
            "lengths": list(self.lengths),
            "limit": self.limit_of(suite),
            "data_dir": str(self.data_dir) if self.data_dir else None,
            "seed": self.seed,
        }


def evaluate_model(name: str, out: Path, request: EvalRequest, device: str) -> RunRecord:
    """Measures one model; a suite that was finished before with the same settings is taken from the earlier work."""
    from halobench.surgery.hybrid import backends_of
    from halobench.tasks.suites import SuiteOutcome, evaluate

    resolve(name)
    model, tokenizer = load(name, device=device)
    card = card_of(name, model)
    path = out / f"{slug(card)}.eval.record.json"
    partial = path.with_name(f".{path.name}.partial")
    finished: dict[str, dict[str, Any]] = _finished(partial, path, card)
    for suite in request.suites:
        settings = request.settings(suite)
        if suite in finished and finished[suite]["settings"] == settings:
            say(f"suite {suite}: done before, taken as it is")
            continue

        def keep(outcome: SuiteOutcome, suite: str = suite, settings: dict[str, Any] = settings) -> None:
            finished[suite] = {"settings": settings, **to_dict(outcome)}
            write_json(partial, {"hash": card.hash, "suites": finished})

        evaluate(
            model,
            tokenizer,
            [suite],
            request.lengths,
            request.limit_of(suite),
            seed=request.seed,
            data_dir=request.data_dir,
            device=device,
            on_suite=keep,
        )
    chosen = {suite: finished[suite] for suite in request.suites}
    record = RunRecord(
        kind="eval",
        model=card,
        metrics=[from_dict(Metric, m, "metric") for entry in chosen.values() for m in entry["metrics"]],
        settings={suite: entry["settings"] for suite, entry in chosen.items()},
        ledger=[
            LedgerRow(what=suite, tokens=entry["tokens"], seconds=round(entry["seconds"], 2))
            for suite, entry in chosen.items()
        ],
        backends={
            "device": device,
            "attention": str(getattr(model.config, "_attn_implementation", "")),
            **{f"mixer {name}": form for name, form in backends_of(model).items()},
        },
    )
    record.save(path)
    partial.unlink(missing_ok=True)
    return record


def _finished(partial: Path, path: Path, card: ModelCard) -> dict[str, dict[str, Any]]:
    """Suites of the same model that an interrupted or an earlier evaluation has done."""
    if partial.exists():
        found = read_json(partial)
        return found["suites"] if found["hash"] == card.hash else {}
    if not path.exists():
        return {}
    record = read_record(path)
    if record.model.hash != card.hash:
        return {}
    spent = {row.what: row for row in record.ledger}
    return {
        suite: {
            "settings": settings,
            "suite": suite,
            "metrics": [to_dict(m) for m in record.metrics if m.suite == suite],
            "tokens": spent[suite].tokens,
            "seconds": spent[suite].seconds,
        }
        for suite, settings in record.settings.items()
        if suite in spent
    }


def profile_models(names: list[str], contexts: list[int], out: Path, device: str) -> list[RunRecord]:
    """Speed and memory of several models, in turns in one process so that the machine's moods fall on all alike."""
    from halobench.tasks.profile import profile_metrics, profile_together

    models = [load(name, device=device)[0] for name in names]
    cards = [card_of(name, model) for name, model in zip(names, models, strict=True)]
    rows = profile_together([(card.name, model) for card, model in zip(cards, models, strict=True)], contexts)
    records = []
    for place, card in enumerate(cards):
        own = [of_context[place] for of_context in rows]
        failed = [row for row in own if row.status != "ok"]
        record = RunRecord(
            kind="profile",
            model=card,
            metrics=profile_metrics(own),
            details={"rows": [row.to_dict() for row in own]},
            backends={"device": device, "attention": own[0].backend},
            status="error" if len(failed) == len(own) else "ok",
            error=failed[0].error if failed else None,
        )
        record.save(out / f"{slug(card)}.profile.record.json")
        records.append(record)
    return records


def slug(card: ModelCard) -> str:
    """A file name for a model: its name in plain characters and the start of its hash, so that no two collide."""
    plain = re.sub(r"[^a-z0-9]+", "-", card.name.lower()).strip("-")[:60]
    return f"{plain}-{re.sub(r'[^a-z0-9]+', '-', card.hash.lower())[:8]}"
