"""Suites of lm-eval tasks, each task kept as soon as it is finished."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from halobench.assets import CONTINUATIONS
from halobench.config import from_dict, to_dict
from halobench.records import Metric
from halobench.surgery.documents import content_hash
from halobench.tasks import estimate
from halobench.tasks.request import Request

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from halobench.tasks.lm_eval_bridge import TaskOutcome

ROW_READ = 2.0  # times that the text of an lm-eval row is read, padding included: 1.4 to 2.9 on six commonsense tasks


@dataclass(frozen=True, kw_only=True)
class LmEvalSuite:
    """Tasks of lm-eval: those of its suite `name` that can be had, or the tasks given."""

    name: str
    given: tuple[str, ...] | None = None

    @property
    def tasks(self) -> tuple[str, ...]:
        """The names that are asked for."""
        from halobench.tasks.lm_eval_bridge import LM_SUITES

        return self.given or LM_SUITES[self.name]

    @property
    def takes(self) -> frozenset[str]:
        """See request.Suite; what is shipped needs no data folder."""
        from halobench.tasks.lm_eval_tasks import OFFLINE_TASK

        return frozenset() if set(self.tasks) == {OFFLINE_TASK} else frozenset({"data_dir"})

    def files(self, data_dir: Path | None) -> dict[str, Path]:
        """The files of a data folder that the tasks are read from."""
        from halobench.tasks.lm_eval_tasks import find_file

        found = {task: find_file(task, data_dir) for task in self.tasks} if data_dir is not None else {}
        return {task: path for task, path in found.items() if path is not None}

    def _task_settings(self, request: Request, task: str) -> dict[str, Any]:
        """What decides the numbers of one task."""
        from halobench.tasks.lm_eval_tasks import OFFLINE_TASK

        path = CONTINUATIONS if task == OFFLINE_TASK else self.files(request.data_dir).get(task)
        place = "hub" if path is None else content_hash(path)
        return {"limit": request.limit, "seed": request.seed, "batch_size": request.batch_size, "data": place}

    def __call__(self, request: Request) -> list[Metric]:
        from halobench.tasks.lm_eval_bridge import TaskOutcome, run_lm_eval
        from halobench.tasks.lm_eval_model import Work

        def keep(task: str, make: Callable[[], TaskOutcome]) -> TaskOutcome | None:
            def parted() -> tuple[list[Metric], dict[str, Any]]:
                made = make()
                return made.metrics, {"work": to_dict(made.work)}

            part = request.part(self.name, task, None, self._task_settings(request, task), parted)
            if part is None:
                return None
            return TaskOutcome(metrics=part.metrics, work=from_dict(Work, part.details["work"], f"what {task} took"))

        outcome = run_lm_eval(
            request.model, request.tokenizer, self.tasks, limit=request.limit, batch_size=request.batch_size,
            seed=request.seed, data_dir=request.data_dir, suite=self.name, whole=self.given is not None, keep=keep,
        )  # fmt: skip
        request.details |= {key: value for key, value in to_dict(outcome).items() if key != "metrics"}
        return outcome.metrics

    def work(self, request: Request) -> list[estimate.Work]:
        """From the text of the rows, where they are at hand: right to a factor of two. Else nothing is known."""
        rows = []
        for task in self.tasks:
            sizes = _row_sizes(task, request.data_dir)
            if sizes is None and self.given is None and request.data_dir is not None:
                continue  # left out
            characters = None if sizes is None else sum(sizes[: request.limit])
            tokens = None if characters is None else round(characters * tokens_per_character(request.tokenizer))
            done = request.kept(self.name, task, self._task_settings(request, task)) is not None
            rows.append(
                estimate.Work(suite=self.name, task=task, length=None, samples=1, tokens=tokens, known=int(done))
            )
        return rows


def _row_sizes(task: str, data_dir: Path | None) -> list[int] | None:
    """Characters that are read for each row of an lm-eval task whose rows are on this machine."""
    from halobench.tasks.continuation import load_items
    from halobench.tasks.lm_eval_tasks import KNOWN_TASKS, OFFLINE_TASK, find_file, read_rows

    if task == OFFLINE_TASK:
        return [len(item.context) + sum(map(len, item.choices)) for item in load_items()]
    path = None if data_dir is None else find_file(task, data_dir)
    local = KNOWN_TASKS[task].local if path is not None else None
    if path is None or local is None:
        return None
    return [round(ROW_READ * _characters(row)) for row in read_rows(task, path, local)[0]]


def _characters(value: Any) -> int:
    """Of all text in a row."""
    if isinstance(value, str):
        return len(value)
    parts = value.values() if isinstance(value, dict) else value if isinstance(value, list) else ()
    return sum(map(_characters, parts))


def tokens_per_character(tokenizer: PreTrainedTokenizerBase) -> float:
    """Of a tokenizer on held-out text."""
    from halobench.assets import TEXT_HELDOUT
    from halobench.tasks.text import read_jsonl

    text = "".join(document.text[:2000] for document in read_jsonl(TEXT_HELDOUT)[:20])
    return len(tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]) / len(text)
