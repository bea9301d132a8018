"""The bridge to lm-eval: any of its tasks on a model in memory, from the hub, from local files, or our own offline one.

The task definitions are lm-eval's; with a data folder only the source of the rows changes. Multiple-choice tasks get a
third mark beside acc and acc_norm: the margin of `tasks/continuation.py`.
"""

from __future__ import annotations

import contextlib
import logging
import random
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from difflib import get_close_matches
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from halobench.errors import HalobenchError, UserError
from halobench.records import Metric
from halobench.tasks.continuation import judge
from halobench.tasks.statistics import mean_stderr

if TYPE_CHECKING:
    from lm_eval.api.task import Task
    from lm_eval.tasks import TaskManager
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

OUR_TASKS = Path(__file__).resolve().parent / "lm_eval"
OFFLINE_TASK = "tiny_continuation"


@dataclass(frozen=True, kw_only=True)
class LocalSource:
    """Where a task's definition lies within lm-eval, and the files of each split within a data folder.

    changes: fields of the definition that the files make unnecessary.
    """

    definition: str
    files: dict[str, str]
    changes: dict[str, Any] = field(default_factory=dict)


LOCAL_TASKS: dict[str, LocalSource] = {
    "arc_easy": LocalSource(
        definition="arc/arc_easy.yaml",
        files={"test": "arc_easy.test.jsonl.gz", "validation": "arc_easy.validation.jsonl.gz"},
    ),
    "arc_challenge": LocalSource(
        definition="arc/arc_challenge.yaml",
        files={"test": "arc_challenge.test.jsonl.gz", "validation": "arc_challenge.validation.jsonl.gz"},
    ),
    "hellaswag": LocalSource(
        definition="hellaswag/hellaswag.yaml",
        files={"validation": "hellaswag.validation.jsonl.gz"},
        changes={"process_docs": None},  # the rows are what process_docs yields
    ),
    "piqa": LocalSource(definition="piqa/piqa.yaml", files={"validation": "piqa.validation.jsonl.gz"}),
    "winogrande": LocalSource(
        definition="winogrande/default.yaml", files={"validation": "winogrande_xl.validation.jsonl.gz"}
    ),
    "lambada_openai": LocalSource(
        definition="lambada/lambada_openai.yaml", files={"test": "lambada_openai.test.jsonl.gz"}
    ),
    "openbookqa": LocalSource(definition="openbookqa/openbookqa.yaml", files={"test": "openbookqa.test.jsonl.gz"}),
    "boolq": LocalSource(definition="super_glue/boolq/default.yaml", files={"validation": "boolq.validation.jsonl.gz"}),
}


def run_lm_eval(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    tasks: Sequence[str],
    *,
    limit: int | None,
    batch_size: int,
    max_length: int,
    data_dir: Path | None = None,
    seed: int,
    suite: str = "csr",
    manager: TaskManager | None = None,
) -> list[Metric]:
    """Runs lm-eval tasks zero-shot on a model in memory.

    Args:
        tasks: `tiny_continuation`, names of LOCAL_TASKS (read from `data_dir` when it is given), or any lm-eval name.
        limit: the first so many items of each task; None for all.
        batch_size: sequences in one forward.
        max_length: tokens of a prompt; lm-eval cuts longer ones on the left.
        data_dir: a folder with `eval/*.jsonl.gz`, or those files themselves.
        manager: lm-eval's index of its own tasks, when the caller has one already (building it takes seconds).

    Returns:
        Every metric lm-eval reports, with its error and count, and the margin; `samples` where it is a mean over items.

    Raises:
        UserError: an unknown task, with the nearest name, or a file that is missing.
        HalobenchError: a dataset that cannot be fetched.
    """
    from halobench.tasks.scoring import evaluating

    with _quiet(), _random_state_kept(seed), evaluating(model):
        import lm_eval
        from lm_eval.tasks import TaskManager

        offline = TaskManager(include_path=str(OUR_TASKS), include_defaults=False, metadata={"seed": seed})
        loaded = _load(tasks, data_dir, offline, manager)
        # Not simple_evaluate, which does this too and then spends seconds asking pip and nvidia-smi about the machine.
        for task in loaded.values():
            if task.get_config("num_fewshot") is None:
                task.set_config(key="num_fewshot", value=0)
            task.set_fewshot_seed(seed=seed)
        results = lm_eval.evaluate(
            lm=_wrapped(model, tokenizer, batch_size, max_length),
            task_dict={"tasks": loaded},
            limit=limit,
            bootstrap_iters=1000,
        )
        if results is None:
            raise HalobenchError("lm-eval gave no results on this process; run it on one process")
        table = [(name, row) for name, row in results["results"].items() if name in loaded]
        return [metric for name, row in table for metric in _metrics(suite, name, loaded[name], row, results)]


def _wrapped(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, batch_size: int, max_length: int) -> Any:
    from lm_eval.models.huggingface import HFLM

    class QuietLM(HFLM):
        """HFLM whose progress bar appears on a terminal only."""

        def loglikelihood(self, requests: Any, disable_tqdm: bool = False) -> Any:
            return super().loglikelihood(requests, disable_tqdm=disable_tqdm or not sys.stderr.isatty())

    return QuietLM(
        pretrained=model, tokenizer=tokenizer, backend="causal", batch_size=batch_size, max_length=max_length
    )


def _load(
    names: Sequence[str], data_dir: Path | None, offline: TaskManager, manager: TaskManager | None
) -> dict[str, Task]:
    tasks: dict[str, Task] = {}
    for name in names:
        if name == OFFLINE_TASK:
            tasks |= offline.load([name])["tasks"]
        elif data_dir is not None and name in LOCAL_TASKS:
            tasks[name] = local_task(name, data_dir)
        else:
            manager = manager or default_manager()
            tasks |= _hub_tasks(name, manager)
    return tasks


def default_manager() -> TaskManager:
    """lm-eval's index of the tasks it ships; takes several seconds to build."""
    from lm_eval.tasks import TaskManager

    return TaskManager()


def local_task(name: str, data_dir: Path) -> Task:
    """The lm-eval task `name` over the files of `data_dir`."""
    import lm_eval.tasks
    from lm_eval.api.task import ConfigurableTask
    from lm_eval.tasks._yaml_loader import load_yaml

    source = LOCAL_TASKS[name]
    files = {split: str(_data_file(name, data_dir, file)) for split, file in source.files.items()}
    config = load_yaml(Path(lm_eval.tasks.__file__).parent / source.definition)
    for key in ("tag", "group", "task_list"):
        config.pop(key, None)
    splits = {f"{split}_split": split if split in files else None for split in ("training", "validation", "test")}
    config |= splits | source.changes
    config |= {"dataset_path": "json", "dataset_name": None, "dataset_kwargs": {"data_files": files}}
    return ConfigurableTask(config=config)


def _data_file(name: str, data_dir: Path, file: str) -> Path:
    for folder in (data_dir / "eval", data_dir):
        if (folder / file).is_file():
            return (folder / file).resolve()
    raise UserError(f"task {name} needs {file}, which is not in {data_dir / 'eval'}; check the data folder")


def _hub_tasks(name: str, manager: TaskManager) -> dict[str, Task]:
    if name not in manager.all_tasks:
        near = get_close_matches(name, [*manager.all_tasks, OFFLINE_TASK], n=1, cutoff=0.5)
        hint = f"did you mean {near[0]!r}? " if near else ""
        raise UserError(f"unknown lm-eval task {name!r}; {hint}`lm-eval ls tasks` lists all of them")
    try:
        return dict(manager.load([name])["tasks"])
    except Exception as error:
        offer = "give a data folder that has its files (--data-dir)" if name in LOCAL_TASKS else "check the network"
        raise HalobenchError(
            f"the dataset of lm-eval task {name!r} could not be loaded ({type(error).__name__}: {error}); {offer}"
        ) from error


def _metrics(suite: str, name: str, task: Task, row: dict[str, Any], results: Any) -> list[Metric]:
    """Metrics of one task from lm-eval's table, with the values of each item from its log."""
    samples = results.get("samples", {}).get(name, [])
    filters = list(dict.fromkeys(sample["filter"] for sample in samples))
    items = [sample for sample in samples if sample["filter"] == filters[0]] if filters else []
    count = len(items) or int(results["n-samples"][name]["effective"])
    better = results.get("higher_is_better", {}).get(name, {})
    metrics = []
    for key, value in row.items():
        metric, _, used_filter = key.partition(",")
        if not used_filter or metric.endswith("_stderr") or not isinstance(value, int | float):
            continue
        stderr = row.get(f"{metric}_stderr,{used_filter}")
        values = [item.get(metric) for item in items]
        numbers = [float(v) for v in values if isinstance(v, int | float | np.number)]
        is_mean = len(numbers) == count and abs(float(np.mean(numbers)) - value) < 1e-9
        metrics.append(
            Metric(
                suite=suite,
                task=name,
                metric=metric if len(filters) < 2 else f"{metric}:{used_filter}",
                value=float(value),
                n=count,
                stderr=float(stderr) if isinstance(stderr, int | float) else None,
                higher_is_better=bool(better.get(metric, True)),
                samples=[round(v, 5) for v in numbers] if is_mean else None,
            )
        )
    if task.OUTPUT_TYPE == "multiple_choice" and not any(m.metric == "margin" for m in metrics):
        metrics += _margin(suite, name, task, items)
    return metrics


def _margin(suite: str, name: str, task: Any, items: Sequence[dict[str, Any]]) -> list[Metric]:
    """The margin of a multiple-choice task, from the log-likelihoods in the log."""
    margins = []
    for item in items:
        choices = task.doc_to_choice(item["doc"])
        label = task.doc_to_text(item["doc"]) if task.multiple_input else task.doc_to_target(item["doc"])
        if isinstance(label, str) and label in choices:
            label = choices.index(label)
        logprobs = [float(response[0]) for response in item["filtered_resps"]]
        if not isinstance(label, int) or not 0 <= label < len(choices) or len(logprobs) != len(choices):
            return []  # several right answers, or an item with none: there is no margin
        # Where the choice stands in the context (winogrande), what is scored is the same text after each.
        scored = [str(arguments[1]).strip() for arguments in item["arguments"]] if task.multiple_input else choices
        margins.append(judge(logprobs, scored, label)["margin"])
    if not margins:
        return []
    value, stderr = mean_stderr(margins)
    samples = [round(margin, 5) for margin in margins]
    return [
        Metric(suite=suite, task=name, metric="margin", value=value, n=len(margins), stderr=stderr, samples=samples)
    ]


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Keeps lm-eval's messages below errors to itself, and what it prints away from stdout, which is for results."""
    logger = logging.getLogger("lm_eval")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        with contextlib.redirect_stdout(sys.stderr):
            yield
    finally:
        logger.setLevel(level)


@contextlib.contextmanager
def _random_state_kept(seed: int) -> Iterator[None]:
    """Seeds the global generators, which lm-eval draws from; whoever called us gets theirs back."""
    import torch

    python, numpy = random.getstate(), np.random.get_state()
    with torch.random.fork_rng():
        random.seed(seed)
        np.random.seed(seed)
        torch.manual_seed(seed)
        try:
            yield
        finally:
            random.setstate(python)
            np.random.set_state(numpy)
