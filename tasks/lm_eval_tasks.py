"""The lm-eval tasks we know by name: definition, headline metric, and local files that can stand for the hub's rows.

A definition is always lm-eval's own file; with a data folder only the source of the rows changes. Local rows are read
and checked here, so that a damaged or foreign file is one line that names it and not a strange score.
"""

from __future__ import annotations

import gzip
import hashlib
import json
import zlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from halobench.assets import CONTINUATIONS
from halobench.errors import UserError

if TYPE_CHECKING:
    from lm_eval.api.task import Task

Row = Mapping[str, Any]


class NoRowsError(UserError):
    """The rows of a task cannot be had: no file, no network. A suite can go on without it."""

    def __init__(self, task: str, reason: str) -> None:
        super().__init__(f"task {task}: {reason}")
        self.task, self.reason = task, reason


OUR_TASKS = Path(__file__).resolve().parent / "lm_eval"
OFFLINE_TASK = "tiny_continuation"
_SPLITS = ("training", "validation", "test")


@dataclass(frozen=True, kw_only=True)
class LocalFile:
    """A file of a data folder with the rows that a task is scored on.

    split: the split of the definition that it is. columns: what the definition reads of a row. right: whether a row can
    be scored, its answer among its choices. changes: fields of the definition that the file makes unnecessary.
    """

    name: str
    split: str
    columns: tuple[str, ...]
    right: Callable[[Row], bool]
    changes: Mapping[str, Any] = field(default_factory=dict)
    folder: str = "eval"


@dataclass(frozen=True, kw_only=True)
class KnownTask:
    """Where lm-eval defines a task, the metric that leaderboards quote, and the local file where there is one."""

    definition: str
    headline: str
    local: LocalFile | None = None


@dataclass(frozen=True, kw_only=True)
class TaskSource:
    """What a task's numbers were measured on: what a record keeps beside them.

    version: of lm-eval's definition. rows: in the split that is scored, before any limit. place: the file's name within
    the data folder, "hub:DATASET", or "package" for what we ship. sha256: of that file; None for the hub.
    headline: the metric that leaderboards quote, where we know it.
    """

    task: str
    version: str
    place: str
    rows: int
    sha256: str | None = None
    headline: str | None = None


def _lettered(row: Row) -> bool:
    labels, texts = row["choices"]["label"], row["choices"]["text"]
    return len(labels) == len(texts) > 1 and row["answerKey"].strip() in labels


def _file(name: str, split: str, columns: str, right: Callable[[Row], bool], **more: Any) -> LocalFile:
    return LocalFile(name=f"{name}.jsonl.gz", split=split, columns=tuple(columns.split()), right=right, **more)


KNOWN_TASKS: dict[str, KnownTask] = {
    "arc_easy": KnownTask(
        definition="arc/arc_easy.yaml",
        headline="acc_norm",
        local=_file("arc_easy.test", "test", "question choices answerKey", _lettered),
    ),
    "arc_challenge": KnownTask(
        definition="arc/arc_challenge.yaml",
        headline="acc_norm",
        local=_file("arc_challenge.test", "test", "question choices answerKey", _lettered),
    ),
    "hellaswag": KnownTask(
        definition="hellaswag/hellaswag.yaml",
        headline="acc_norm",
        local=_file(
            "hellaswag.validation",
            "validation",
            "query choices label",
            lambda row: row["label"] in range(len(row["choices"])),
            changes={"process_docs": None},  # the rows are what process_docs yields
        ),
    ),
    "piqa": KnownTask(
        definition="piqa/piqa.yaml",
        headline="acc_norm",
        local=_file("piqa.validation", "validation", "goal sol1 sol2 label", lambda row: row["label"] in (0, 1)),
    ),
    "winogrande": KnownTask(
        definition="winogrande/default.yaml",
        headline="acc",
        local=_file(
            "winogrande_xl.validation",
            "validation",
            "sentence option1 option2 answer",
            lambda row: row["answer"] in ("1", "2") and "_" in row["sentence"],
        ),
    ),
    "lambada_openai": KnownTask(
        definition="lambada/lambada_openai.yaml",
        headline="acc",
        local=_file("lambada_openai.test", "test", "text", lambda row: " " in row["text"].strip()),
    ),
    "mmlu": KnownTask(definition="mmlu/default/_mmlu.yaml", headline="acc"),
    "squad_completion": KnownTask(definition="squad_completion/squad_completion.yaml", headline="contains"),
    "fda": KnownTask(definition="fda/fda.yaml", headline="contains"),
    "swde": KnownTask(definition="swde/swde.yaml", headline="contains"),
    "openbookqa": KnownTask(
        definition="openbookqa/openbookqa.yaml",
        headline="acc_norm",
        local=_file("openbookqa.test", "test", "question_stem choices answerKey", _lettered),
    ),
    "boolq": KnownTask(
        definition="super_glue/boolq/default.yaml",
        headline="acc",
        local=_file("boolq.validation", "validation", "passage question label", lambda row: row["label"] in (0, 1)),
    ),
    "copa": KnownTask(
        definition="super_glue/copa/default.yaml",
        headline="acc",
        local=_file(
            "copa.validation",
            "validation",
            "premise question choice1 choice2 label",
            lambda row: row["label"] in (0, 1) and row["question"] in ("cause", "effect"),
        ),
    ),
    "social_iqa": KnownTask(
        definition="siqa/siqa.yaml",
        headline="acc",
        local=_file(
            "social_iqa.validation",
            "validation",
            "context question answerA answerB answerC label",
            lambda row: row["label"] in ("1", "2", "3"),
        ),
    ),
    "commonsense_qa": KnownTask(
        definition="commonsense_qa/default.yaml",
        headline="acc",
        local=_file(
            "commonsense_qa.validation",
            "validation",
            "question choices answerKey",
            lambda row: _lettered(row) and list(row["choices"]["label"]) == list("ABCDE"),
        ),
    ),
    "nq_open": KnownTask(
        definition="nq_open/nq_open.yaml",
        headline="exact_match",
        local=_file("nq_open.validation", "validation", "question answer", lambda row: any(row["answer"])),
    ),
    "drop": KnownTask(
        definition="drop/default.yaml",
        headline="f1",
        local=_file(
            "drop_olmes1000.validation",
            "validation",
            "passage question answers",
            lambda row: all(row["answers"]) and len(row["answers"]) > 0,
            # The answers are lists already. What is scored is `answers`; the target is only shown in lm-eval's log.
            changes={"process_docs": None, "doc_to_target": "{{answers[0]|join(',')}}"},
        ),
    ),
    "wikitext": KnownTask(
        definition="wikitext/wikitext.yaml",
        headline="word_perplexity",
        local=_file(
            "wikitext2_raw.test.documents", "test", "page", lambda row: bool(row["page"].strip()), folder="ppl"
        ),
    ),
}


def definitions() -> Path:
    """The folder of lm-eval's own task definitions."""
    import lm_eval.tasks

    return Path(lm_eval.tasks.__file__).parent


def find_file(name: str, data_dir: Path) -> Path | None:
    """The file of task `name` in a data folder (`eval/*.jsonl.gz`, or the files themselves); None without one."""
    known = KNOWN_TASKS.get(name)
    if known is None or known.local is None:
        return None
    places = (data_dir / known.local.folder / known.local.name, data_dir / known.local.name)
    return next((place.resolve() for place in places if place.is_file()), None)


def local_task(name: str, data_dir: Path) -> tuple[Task, TaskSource]:
    """lm-eval's task `name` over its file in `data_dir`.

    Raises:
        NoRowsError: there is no file for it.
        UserError: the file is damaged, or has a row that cannot be scored.
    """
    from datasets import Dataset
    from lm_eval.api.task import ConfigurableTask
    from lm_eval.tasks._yaml_loader import load_yaml

    known, path = KNOWN_TASKS.get(name), find_file(name, data_dir)
    if known is None or known.local is None:
        served = ", ".join(task for task, about in KNOWN_TASKS.items() if about.local)
        raise NoRowsError(name, f"its rows come from the hub only; leave out the data folder (it can serve {served})")
    local = known.local
    if path is None:
        raise NoRowsError(name, f"{data_dir / local.folder} has no {local.name}; check the data folder")
    rows, digest = read_rows(name, path, local)
    config = load_yaml(definitions() / known.definition)
    for key in ("tag", "group", "task_list", "dataset_path", "dataset_name", "dataset_kwargs"):
        config.pop(key, None)
    config |= {f"{split}_split": split if split == local.split else None for split in _SPLITS} | dict(local.changes)
    config["custom_dataset"] = lambda **_: {local.split: Dataset.from_list(rows)}
    task = ConfigurableTask(config=config)
    place = f"{local.folder}/{local.name}"
    return task, TaskSource(
        task=name, version=str(task.VERSION), place=place, rows=len(rows), sha256=digest, headline=known.headline
    )


def read_rows(name: str, path: Path, local: LocalFile) -> tuple[list[dict[str, Any]], str]:
    """The rows of a file, what the definition of task `name` reads of them, all checked; and the file's SHA-256."""
    data = path.read_bytes()
    try:
        lines = gzip.decompress(data).decode("utf-8").split("\n")
    except (EOFError, OSError, zlib.error, UnicodeDecodeError) as error:
        raise UserError(f"{path} is not a whole gzip file of UTF-8 text ({error}); fetch it again") from None
    rows = []
    for number, line in enumerate(lines, 1):
        if line.strip():
            rows.append(_row(name, line, f"{path} line {number}", local))
    if not rows:
        raise UserError(f"{path} has no rows, so task {name} has nothing to score; fetch it again")
    return rows, hashlib.sha256(data).hexdigest()


def _row(name: str, line: str, where: str, local: LocalFile) -> dict[str, Any]:
    try:
        row = json.loads(line)
    except json.JSONDecodeError as error:
        raise UserError(f"{where} is not JSON ({error}); fetch the file again") from None
    missing = [column for column in local.columns if column not in row] if isinstance(row, dict) else local.columns
    if missing:
        raise UserError(f"{where} lacks {', '.join(missing)}; task {name} reads a table of {', '.join(local.columns)}")
    try:
        right = local.right(row)
    except (KeyError, TypeError, ValueError, AttributeError):
        right = False
    if not right:
        raise UserError(f"{where} cannot be scored by task {name}: it has no right answer among its choices")
    return {column: row[column] for column in local.columns}


def offline_task(seed: int) -> tuple[Task, TaskSource]:
    """The four-way choice that is shipped with the package; `seed` orders its items."""
    from lm_eval.tasks import TaskManager

    manager = TaskManager(include_path=str(OUR_TASKS), include_defaults=False, metadata={"seed": seed})
    task = manager.load([OFFLINE_TASK])["tasks"][OFFLINE_TASK]
    digest = hashlib.sha256(CONTINUATIONS.read_bytes()).hexdigest()
    return task, TaskSource(
        task=OFFLINE_TASK, version=str(task.VERSION), place="package", rows=len(task.eval_docs), sha256=digest,
        headline="acc_norm",
    )  # fmt: skip
