"""Evaluating models into records: one record a model, and nothing that is finished measured twice.

Beside the record is a hidden folder with the samples and parts that were finished, and, while an evaluation is under
way, the suites that were. The suites go when the record is written, for it has them; the samples stay, so that another
length or a higher limit reads only what is new. The folder can be deleted at any time.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from halobench.config import from_dict, to_dict
from halobench.errors import HalobenchError, UserError
from halobench.files import make_folder, read_json, write_json
from halobench.models import card_of, load, resolve
from halobench.progress import say
from halobench.provenance import file_hash, versions
from halobench.records import ModelCard, RunRecord, read_record
from halobench.units import format_count, format_seconds

if TYPE_CHECKING:
    from halobench.finished import Finished
    from halobench.tasks.estimate import Estimate
    from halobench.tasks.suites import Request, SuiteOutcome

PATIENCE = 3600.0  # seconds that an evaluation may take without being asked for twice


@dataclass(frozen=True, kw_only=True)
class EvalRequest:
    """What to measure: suites, context lengths, samples (`limits` by suite go before `limit`), local data and seed.

    precision: a task at a length ends early when the 95% interval of its headline metric is narrower to each side.
    kernels: the form of the mixers' operators, one of `kernels.backend.BACKENDS`.
    """

    suites: tuple[str, ...]
    lengths: tuple[int, ...]
    limit: int | None = None
    limits: tuple[tuple[str, int], ...] = ()
    data_dir: Path | None = None
    seed: int = 0
    precision: float | None = None
    kernels: str = "auto"

    def check(self) -> None:
        """Raises UserError for what can be known to be wrong before any model is loaded; says what has no effect."""
        from halobench.tasks.schedule import check_precision
        from halobench.tasks.suites import parse_suites

        parse_suites(self.suites)
        check_precision(self.precision)
        if self.limit is not None and self.limit < 1:
            raise UserError(f"--limit {self.limit} leaves nothing to measure; give 1 or more")
        if self.seed < 0:
            raise UserError(f"--seed {self.seed} is negative; give 0 or more")
        if self.seed >= 2**32:
            raise UserError(f"--seed {self.seed} is too large; give less than 2^32")
        if self.data_dir is not None and not self.data_dir.is_dir():
            raise UserError(f"--data-dir {self.data_dir} is not a folder")
        whole = [suite for suite in self.suites if "precision" not in self.settings(suite)]
        if self.precision is not None and whole:
            say(f"--precision ends tasks of numbered samples early; measured whole without it: {', '.join(whole)}")

    def limit_of(self, suite: str) -> int | None:
        """Samples of one suite."""
        return dict(self.limits).get(suite, self.limit)

    def settings(self, suite: str) -> dict[str, Any]:
        """What decides the numbers of one suite, as plain data."""
        from halobench.tasks.suites import settings_of

        return settings_of(
            suite, lengths=self.lengths, limit=self.limit_of(suite), data_dir=self.data_dir, seed=self.seed,
            precision=self.precision,
        )  # fmt: skip


class Evaluation:
    """One model, loaded, and where its record goes; what an interrupted or an earlier evaluation has done is found."""

    def __init__(self, name: str, out: Path, request: EvalRequest, device: str) -> None:
        from halobench.mixers.forms import ask_for
        from halobench.surgery.corpus import check_ids

        resolve(name)
        self.name, self.request, self.device = name, request, device
        self.model, self.tokenizer = load(name, device=device)
        check_ids(self.tokenizer, self.model.config)
        ask_for(self.model, request.kernels)
        self.card = card_of(name, self.model)
        self.path = out / f"{slug(self.card)}.eval.record.json"
        self.folder = self.path.with_name(f".{self.path.name}.samples")
        self.suites = list(dict.fromkeys(request.suites))
        self._recorded, self.finished, self.backends = self._earlier()

    @cached_property
    def identity(self) -> dict[str, Any]:
        """What decides all numbers beside the settings: of another identity nothing is taken."""
        from halobench.assets import CONTINUATIONS, TEXT_HELDOUT, TEXT_LONG
        from halobench.tasks.journal import tokenizer_fingerprint

        return {
            "model": self.card.hash,
            "commit": getattr(self.model.config, "_commit_hash", None),
            "tokenizer": tokenizer_fingerprint(self.tokenizer),
            "dtype": str(self.model.dtype),
            "attention": _attention(self.model),
            "device": self.device,
            "texts": {path.name: file_hash(path) for path in (TEXT_HELDOUT, TEXT_LONG, CONTINUATIONS)},
            "versions": versions(),
            **({} if self.request.kernels == "auto" else {"kernels": self.request.kernels}),
        }

    def missing(self) -> list[str]:
        """The suites that are still to be run with these settings."""
        return [name for name in self.suites if not self._done(name, self.finished)]

    def _done(self, suite: str, finished: dict[str, Finished]) -> bool:
        return suite in finished and finished[suite].answers(self.request.settings(suite))

    def _earlier(self) -> tuple[set[str], dict[str, Finished], dict[str, dict[str, str]]]:
        """What is found of the same identity: suites of the record, those and an interrupted evaluation's, backends."""
        from halobench.finished import Finished, merged, suites_in

        finished = suites_in(read_record(self.path), self.identity) if self.path.exists() else {}
        recorded = set(finished)
        backends = {name: one.backends for name, one in finished.items()}
        if self._under_way.exists():
            found = read_json(self._under_way)
            if found["identity"] == self.identity:
                where = str(self._under_way)
                newer = {name: from_dict(Finished, one, where) for name, one in found["suites"].items()}
                recorded -= set(newer)
                finished |= newer
                backends |= {n: merged([backends.get(n, {}), more]) for n, more in found["backends"].items()}
        return recorded, finished, backends

    @property
    def _under_way(self) -> Path:
        return self.folder / "suites.json"

    def _request(self, suite: str) -> Request:
        """What a suite is asked to do, with the journals of this identity."""
        from halobench.tasks.journal import Journals
        from halobench.tasks.suites import Request

        return Request(
            model=self.model,
            tokenizer=self.tokenizer,
            lengths=sorted(self.request.lengths),
            limit=self.request.limit_of(suite),
            seed=self.request.seed,
            data_dir=self.request.data_dir,
            device=self.device,
            precision=self.request.precision,
            journals=Journals(folder=self.folder, identity=self.identity),
        )

    def estimate(self) -> Estimate:
        """What is still to be read, and how long this machine will take for it."""
        from halobench.tasks.estimate import Estimate, Speed, measure_speed
        from halobench.tasks.suites import probe_length, work_of

        work = [row for name in self.missing() for row in work_of(name, self._request(name))]
        longest, steps = probe_length(self.model, work), any(row.missing_steps for row in work)
        idle = Speed(base=0.0, slope=0.0)
        speed = measure_speed(self.model, longest, self.device, steps=steps) if longest else idle
        return Estimate(model=self.card.name, work=work, speed=speed)

    def run(self) -> RunRecord:
        """Runs the suites that are missing and writes the record; one that has all of them already is left alone."""
        from halobench.finished import Finished, make_record

        make_folder(self.path.parent)
        missing = self.missing()
        other = sorted(set(missing) & set(read_record(self.path).settings)) if self.path.exists() else []
        if other:
            what = ", ".join(other)
            say(f"suite {what} was measured with other settings before; replaced here, another -o keeps both")
        for name in self.suites:
            if name not in missing:
                say(f"suite {name}: done before, taken as it is")
                continue
            outcome = self._run_suite(name)
            self.finished[name] = Finished(
                settings=self.request.settings(name), backends=self.backends[name], outcome=outcome
            )
            self._save()
        if not missing and self._recorded >= set(self.suites):
            return read_record(self.path)
        record = make_record(self.card, self.identity, self._kept())
        self._set_aside(record)
        record.save(self.path)
        self._under_way.unlink(missing_ok=True)
        return record

    def _run_suite(self, name: str) -> SuiteOutcome:
        """Runs a suite, and notes what really ran even when it is interrupted."""
        from halobench.finished import merged
        from halobench.surgery.hybrid import HybridForCausalLM, backends_of
        from halobench.tasks.suites import run_suite

        if isinstance(self.model, HybridForCausalLM):  # what ran before, for other numbers, is not this suite's
            for mixer in self.model.mixer_modules().values():
                mixer.used_backend = None
        try:
            return run_suite(name, self._request(name))
        finally:
            mixers = {f"mixer {mixer}": form for mixer, form in backends_of(self.model).items()}
            ran = {"device": self.device, "attention": _attention(self.model), **mixers}
            self.backends[name] = merged([self.backends.get(name, {}), ran])
            self._save()

    def _save(self) -> None:
        suites = {name: to_dict(one) for name, one in self.finished.items()}
        write_json(self._under_way, {"identity": self.identity, "suites": suites, "backends": self.backends})

    def _kept(self) -> dict[str, Finished]:
        """The suites asked for, and of the others those that measured something else."""
        asked = {name: self.finished[name] for name in self.suites}
        taken = {pair for one in asked.values() for pair in one.pairs}
        others = {n: one for n, one in self.finished.items() if not one.pairs & taken and not one.truncated}
        return asked | {name: one for name, one in others.items() if name not in asked}

    def _set_aside(self, record: RunRecord) -> None:
        """Renames an earlier record that has a suite which the new one has not; reports read both."""
        if not self.path.exists():
            return
        earlier = read_record(self.path)
        lost = sorted(set(earlier.settings) - set(record.settings))
        if lost:
            day = re.sub(r"[^0-9]", "", earlier.created)[:14]
            aside = self.path.with_name(self.path.name.replace(".eval.", f".{day}.eval."))
            self.path.rename(aside)
            say(f"the earlier record has suite {', '.join(lost)}, measured otherwise; it is kept as {aside.name}")


def _attention(model: Any) -> str:
    return str(getattr(model.config, "_attn_implementation", ""))


def evaluate_model(name: str, out: Path, request: EvalRequest, device: str) -> RunRecord:
    """Measures one model; what was finished before with the same settings is taken from the earlier work."""
    return Evaluation(name, out, request, device).run()


def estimate_models(names: Sequence[str], out: Path, request: EvalRequest, device: str) -> list[Estimate]:
    """What each model has still to read, told line by line."""
    return [_told(Evaluation(name, out, request, device)) for name in names]


def _told(evaluation: Evaluation) -> Estimate:
    estimate = evaluation.estimate()
    for line in estimate.lines():
        say(line)
    return estimate


def evaluate_models(
    names: Sequence[str], out: Path, request: EvalRequest, device: str, *, yes: bool = False
) -> list[RunRecord]:
    """Measures several models, one in memory at a time, after telling what each has still to read.

    Raises:
        UserError: all of it would take more than an hour, and `yes` is not given.
    """
    from halobench.tasks.memory import release

    evaluation: Evaluation | None = None
    estimates = []
    for name in names:
        evaluation = None  # frees the one before
        release()
        evaluation = Evaluation(name, out, request, device)
        estimates.append(_told(evaluation))
    if not yes:
        check_patience(estimates)
    records = []
    for name in names:
        if evaluation is None or evaluation.name != name:
            evaluation = None
            release()
            evaluation = Evaluation(name, out, request, device)
        try:
            records.append(evaluation.run())
        except HalobenchError as error:
            kind = UserError if isinstance(error, UserError) else HalobenchError
            raise kind(f"{name}: {error}") from error
    return records


def check_patience(estimates: Sequence[Estimate]) -> None:
    """Refuses more than an hour of work, and says how to go on and how to ask for less."""
    from halobench.tasks.estimate import total

    tokens, seconds = total(estimates)
    if seconds > PATIENCE:
        raise UserError(
            f"this would take about {format_seconds(seconds)} ({format_count(tokens)} tokens); add --yes to go on, or "
            "ask for less: a lower --limit, a --precision such as 0.05, or shorter --lengths"
        )


def slug(card: ModelCard) -> str:
    """A file name for a model: its name in plain characters and the start of its hash, so that no two collide."""
    plain = re.sub(r"[^a-z0-9]+", "-", card.name.lower()).strip("-")[:60]
    return f"{plain}-{re.sub(r'[^a-z0-9]+', '-', card.hash.lower())[:8]}"
