"""Suites of sampled tasks at every length: needles, lists, the grid, RULER."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from halobench.errors import UserError, some
from halobench.progress import say
from halobench.records import Metric
from halobench.surgery.documents import content_hash
from halobench.tasks.estimate import Work
from halobench.tasks.request import Request
from halobench.tasks.sampled import SampledTask
from halobench.tasks.schedule import GROUP_TOKENS, measure
from halobench.units import format_length


@dataclass(frozen=True, kw_only=True)
class SampledSuite:
    """A suite of sampled tasks, at every length.

    names: of all its tasks. make: builds one. left_out: those that cannot be had with this data folder, and why. files:
    of the data folder, by task. count: samples of each task and length by default. version: raised when what a sample
    is changes, so that older ones are not mistaken for it. only: the one task that is asked for.
    """

    names: Callable[[], Sequence[str]]
    make: Callable[[Request, str], SampledTask]
    count: int
    version: int
    left_out: Callable[[Path | None], dict[str, str]] = lambda data_dir: {}
    files: Callable[[Path | None], Mapping[str, Path]] | None = None
    only: str | None = None
    needs_lengths = True

    @property
    def takes(self) -> frozenset[str]:
        """See request.Suite."""
        return frozenset({"lengths", "precision", *(["data_dir"] if self.files is not None else [])})

    def pairs(self, request: Request) -> tuple[list[tuple[SampledTask, int]], dict[str, str]]:
        """Tasks with the lengths they are measured at, and what of the whole suite is left out and why.

        A task of the whole suite may be left out at lengths that have no room for it; one that is asked for by name is
        an error then.
        """
        if self.only is not None:
            task = self.make(request, self.only)
            return [(task, length) for length in request.lengths], {}
        out = self.left_out(request.data_dir)
        pairs = []
        for task in [self.make(request, name) for name in self.names() if name not in out]:
            shortest = getattr(task, "shortest", 0)
            pairs += [(task, length) for length in request.lengths if length >= shortest]
            short = [format_length(length) for length in request.lengths if length < shortest]
            if short:
                out = out | {f"{task.name} at {', '.join(short)}": f"it needs {shortest} tokens"}
        if not pairs:
            raise UserError(f"no task of the suite can be run: {some(f'{what}: {why}' for what, why in out.items())}")
        return pairs, out

    def _sample_settings(self, request: Request, task: SampledTask) -> dict[str, Any]:
        """What decides a task's samples beside its name and length."""
        path = (self.files(request.data_dir) if self.files is not None else {}).get(task.name)
        return {"version": self.version, "seed": request.seed, "data": None if path is None else content_hash(path)}

    def __call__(self, request: Request) -> list[Metric]:
        found: list[Metric] = []
        pairs, out = self.pairs(request)
        for what, why in out.items():
            say(f"left out {what}: {why}")
        request.details |= {"left_out": out} if out else {}
        for task, length in pairs:
            journals = request.journals
            with request.surviving(task.suite, task.name, length):
                metrics, reading = measure(
                    task, request.model, length, request.limit or self.count,
                    precision=request.precision, device=request.torch_device,
                    journal=journals.of(task, length, self._sample_settings(request, task)) if journals else None,
                )  # fmt: skip
                found += metrics
                request.readings.append(reading)
            ran = getattr(task, "ran", None)
            if ran:
                request.details.setdefault("decode", {}).update(ran)
        return found

    def work(self, request: Request) -> list[Work]:
        """Every task at every length, at the most samples it may take and the longest answers it may hear."""
        count = request.limit or self.count
        rows = []
        for task, length in self.pairs(request)[0]:
            known = 0
            if request.journals is not None:
                done = request.journals.of(task, length, self._sample_settings(request, task)).read()
                known = sum(index < count for index in done)
            together = max(1, min(GROUP_TOKENS, getattr(task, "batch_tokens", GROUP_TOKENS)) // length)
            said = getattr(task, "answer_tokens", 0)
            answers = -(-count // together) if said else 0
            rows.append(
                Work(
                    suite=task.suite, task=task.name, length=length, samples=count, known=known,
                    tokens=count * task.sample_tokens(length),
                    answers=answers, steps=answers * said,
                )
            )  # fmt: skip
        return rows
