"""The bridge to lm-eval: any of its tasks on a model in memory, from the hub, from local files, or our own offline one.

The task definitions are lm-eval's; with a data folder only the source of the rows changes. Multiple-choice tasks get a
third mark beside acc and acc_norm: the margin of `tasks/continuation.py`.
"""

from __future__ import annotations

import contextlib
import functools
import logging
import math
import random
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from difflib import get_close_matches
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from halobench.errors import HalobenchError, UserError
from halobench.progress import say
from halobench.records import Metric
from halobench.tasks.continuation import judge
from halobench.tasks.lm_eval_tasks import (
    KNOWN_TASKS,
    OFFLINE_TASK,
    NoRowsError,
    TaskSource,
    definitions,
    local_task,
    offline_task,
)
from halobench.tasks.statistics import mean_stderr

if TYPE_CHECKING:
    from lm_eval.api.group import Group
    from lm_eval.api.task import Task
    from lm_eval.tasks import TaskManager
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from halobench.tasks.lm_eval_model import BridgeLM, Work

LM_SUITES: dict[str, tuple[str, ...]] = {
    "csr": (
        OFFLINE_TASK, "arc_easy", "arc_challenge", "hellaswag", "winogrande", "piqa", "lambada_openai", "mmlu",
    ),
    "csr-small": ("hellaswag", "arc_easy", "arc_challenge"),  # the three that HALO selects layers by
    "recall": ("squad_completion", "fda", "swde"),
}  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class BridgeOutcome:
    """What lm-eval found: the metrics, what each task was read from, how the requests were run, and with which lm-eval.

    left_out: the tasks of a suite that could not be had.
    """

    metrics: list[Metric]
    sources: list[TaskSource]
    work: Work
    lm_eval: str
    left_out: list[str] = field(default_factory=list)


@dataclass(frozen=True, kw_only=True)
class TaskOutcome:
    """What was found of one name that was asked for, and how its requests were run."""

    metrics: list[Metric]
    work: Work


Keep = Callable[[str, Callable[[], TaskOutcome]], TaskOutcome | None]


@dataclass(kw_only=True)
class _Loaded:
    """Tasks and groups of one name, as lm-eval wants them, and where the rows of each task are from."""

    tasks: dict[str, Task] = field(default_factory=dict)
    groups: dict[str, Group] = field(default_factory=dict)
    sources: list[TaskSource] = field(default_factory=list)

    def add(self, task: Task, source: TaskSource) -> None:
        """Adds a task that stands alone."""
        self.tasks[source.task] = task
        self.sources.append(source)


def run_lm_eval(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    tasks: Sequence[str],
    *,
    limit: int | None,
    batch_size: int,
    seed: int,
    data_dir: Path | None = None,
    window: int | None = None,
    suite: str = "lm",
    whole: bool = True,
    keep: Keep = lambda name, make: make(),
    manager: TaskManager | None = None,
) -> BridgeOutcome:
    """Runs lm-eval tasks on a model in memory; zero-shot where a definition does not say otherwise.

    Args:
        tasks: `tiny_continuation`, names of KNOWN_TASKS, or any lm-eval name.
        limit: the first so many items of each task; None for all.
        batch_size: sequences in one forward, about.
        seed: order of the shipped items, and of lm-eval's own draws.
        data_dir: a folder with `eval/*.jsonl.gz`, or those files themselves, to read rows from; None for the hub.
        window: tokens of a rolling window (wikitext); None for the model's own. Longer prompts are read whole.
        suite: the name of the metrics' suite.
        whole: whether a task whose rows cannot be had is an error; else it is left out, aloud, as long as one is left.
        keep: is given each name and what measures it, and may give what it has from before, or None to go on without.
        manager: lm-eval's index of its own tasks, when the caller has one already (building it takes seconds).

    Returns:
        Every metric lm-eval reports, with its error and count, and the margin; `samples` where it is a mean over items.
        A group (mmlu) has one row for each metric, over the items of all its tasks.

    Raises:
        UserError: an unknown task, with the nearest name; rows that cannot be had, or that cannot be scored; a prompt
            that the model's positions cannot express.
    """
    from halobench.tasks.scoring import evaluating

    with quiet(), evaluating(model):
        from halobench.tasks.lm_eval_model import BridgeLM

        with _random_state_kept(seed):
            loaded, left_out = _load(tasks, data_dir, seed, whole, manager)
        for line in _without(left_out):
            say(f"suite {suite} without {line}")
        lm = BridgeLM(model, tokenizer, batch_size=batch_size, window=window)
        kept = [keep(name, functools.partial(_measure, lm, suite, one, limit, seed)) for name, one in loaded.items()]
    outcomes = [outcome for outcome in kept if outcome is not None]
    work = lm.work.sum([outcome.work for outcome in outcomes])
    for name, count in work.beyond_window.items():
        say(f"{name}: {count} prompts are beyond the model's window of {lm.max_length} tokens; they are read whole")
    return BridgeOutcome(
        metrics=[metric for outcome in outcomes for metric in outcome.metrics],
        sources=[source for one in loaded.values() for source in one.sources],
        work=work,
        lm_eval=version("lm-eval"),
        left_out=[name for names in left_out.values() for name in names],
    )


def _measure(lm: BridgeLM, suite: str, loaded: _Loaded, limit: int | None, seed: int) -> TaskOutcome:
    """Runs what one name stands for. The generators are seeded anew: it does not matter what was measured before."""
    lm.begin()
    with _random_state_kept(seed):
        results = _evaluate(lm, loaded, limit, seed)
    return TaskOutcome(metrics=_all_metrics(suite, loaded, results), work=lm.work)


def _evaluate(lm: BridgeLM, loaded: _Loaded, limit: int | None, seed: int) -> Mapping[str, Any]:
    """lm-eval's results; what simple_evaluate does without the seconds it spends asking pip and nvidia-smi."""
    import lm_eval

    for task in loaded.tasks.values():
        if task.get_config("num_fewshot") is None:
            task.set_config(key="num_fewshot", value=0)
        task.set_fewshot_seed(seed=seed)
    tasks = {"tasks": loaded.tasks, "groups": loaded.groups}
    results = lm_eval.evaluate(lm=lm, task_dict=tasks, limit=limit, bootstrap_iters=1000)
    if results is None:
        raise HalobenchError("lm-eval gave no results on this process; run it on one process")
    return results


def _load(
    names: Sequence[str], data_dir: Path | None, seed: int, whole: bool, manager: TaskManager | None
) -> tuple[dict[str, _Loaded], dict[str, list[str]]]:
    """What each name stands for, and the names that were left out, by reason."""
    found: dict[str, _Loaded] = {}
    left_out: dict[str, list[str]] = {}
    hub, index = functools.cache(_hub_answers), functools.cache(lambda: manager or _default_manager())
    for name in dict.fromkeys(names):
        loaded = _Loaded()
        try:
            if name == OFFLINE_TASK:
                loaded.add(*offline_task(seed))
            elif data_dir is not None:
                loaded.add(*local_task(name, data_dir))
            else:
                _load_from_hub(name, index, hub, loaded)
            found[name] = loaded
        except NoRowsError as error:
            if whole:
                raise
            left_out.setdefault(error.reason, []).append(name)
    if not found:
        raise UserError(f"none of the tasks can be had: {'; '.join(_without(left_out))}")
    return found, left_out


def _without(left_out: Mapping[str, Sequence[str]]) -> list[str]:
    """What was left out, and why."""
    return [f"{', '.join(names)}: {reason}" for reason, names in left_out.items()]


def _hub_answers() -> bool:
    """Whether the hub can be reached, or is told to answer from its cache (HF_HUB_OFFLINE)."""
    from huggingface_hub import constants, get_session

    if constants.HF_HUB_OFFLINE:
        return True
    try:
        get_session().head(constants.ENDPOINT, timeout=5)
    except Exception:  # whatever it is - no network, no name, a proxy - nothing will be fetched
        return False
    return True


def _default_manager() -> TaskManager:
    """lm-eval's index of the tasks it ships; takes several seconds to build."""
    from lm_eval.tasks import TaskManager

    return TaskManager()


def _load_from_hub(name: str, index: Callable[[], TaskManager], hub: Callable[[], bool], loaded: _Loaded) -> None:
    """Loads a task, a tag's tasks or a group from the hub; a task we know needs no index of all the others."""
    from lm_eval.tasks import TaskManager

    known = KNOWN_TASKS.get(name)
    if known is not None:
        manager = TaskManager(include_path=str((definitions() / known.definition).parent), include_defaults=False)
    else:
        manager = index()
    if name not in manager.all_tasks:
        names = [*manager.all_tasks, OFFLINE_TASK]
        near = get_close_matches(name, names, n=1, cutoff=0.5)
        hint = f"did you mean {near[0]!r}? " if near else ""
        raise UserError(f"unknown lm-eval task {name!r}; {hint}`lm-eval ls tasks` lists all of them")
    if not hub():
        raise NoRowsError(name, "the hub cannot be reached and no data folder is given (--data-dir)")
    try:
        found = manager.load([name])
    except Exception as error:
        offer = "give a data folder that has its file (--data-dir)" if known and known.local else "check the network"
        reason = f"{type(error).__name__}: {error}".splitlines()[0]
        raise NoRowsError(name, f"its dataset could not be fetched from the hub ({reason}); {offer}") from error
    loaded.tasks |= found["tasks"]
    loaded.groups |= found.get("groups", {})
    loaded.sources += [
        TaskSource(
            task=one, version=str(task.VERSION), place=f"hub:{task.DATASET_PATH}", rows=len(task.eval_docs),
            headline=known.headline if known else None,
        )
        for one, task in found["tasks"].items()
    ]  # fmt: skip


def _all_metrics(suite: str, loaded: _Loaded, results: Mapping[str, Any]) -> list[Metric]:
    """The rows of every task that stands alone and of every outermost group."""
    inner = {child for children in _children(loaded).values() for child in children}
    metrics: list[Metric] = []
    for name, task in loaded.tasks.items():
        if name not in inner:
            metrics += _task_metrics(suite, name, task, results)
    for name, group in loaded.groups.items():
        if name not in inner:
            metrics += _group_metrics(suite, name, group, results)
    return metrics


def _children(loaded: _Loaded) -> dict[str, list[str]]:
    """By group, the names of all that is below it."""
    return {
        name: [*(task.task_name for task in group.get_all_tasks()), *(g.name for g in group.get_all_groups())]
        for name, group in loaded.groups.items()
    }


def _task_metrics(suite: str, name: str, task: Task, results: Mapping[str, Any]) -> list[Metric]:
    """Metrics of one task from lm-eval's table, with the values of each item from its log."""
    samples = results.get("samples", {}).get(name, [])
    filters = list(dict.fromkeys(sample["filter"] for sample in samples))
    items = [sample for sample in samples if sample["filter"] == filters[0]] if filters else []
    count = len(items) or int(results["n-samples"][name]["effective"])
    metrics = []
    for metric, used_filter, value, stderr, better in _numbers(name, results):
        same = [sample.get(metric) for sample in samples if sample["filter"] == used_filter]
        numbers = [float(v) for v in same if isinstance(v, int | float | np.number)]
        is_mean = len(numbers) == count and abs(float(np.mean(numbers)) - value) < 1e-9
        metrics.append(
            Metric(
                suite=suite,
                task=name,
                metric=metric if len(filters) < 2 else f"{metric}:{used_filter}",
                value=value,
                n=count,
                stderr=stderr,
                higher_is_better=better,
                samples=[round(v, 5) for v in numbers] if is_mean else None,
            )
        )
    if task.OUTPUT_TYPE == "multiple_choice" and not any(m.metric == "margin" for m in metrics):
        metrics += _margin(suite, name, task, items)
    return metrics


def _numbers(name: str, results: Mapping[str, Any]) -> Iterator[tuple[str, str, float, float | None, bool]]:
    """(metric, filter, value, standard error, whether higher is better) of each number in a row of lm-eval's table."""
    row, better = results["results"][name], results.get("higher_is_better", {}).get(name, {})
    for key, value in row.items():
        metric, _, used_filter = key.partition(",")
        if not used_filter or metric.endswith("_stderr") or not isinstance(value, int | float):
            continue
        stderr = row.get(f"{metric}_stderr,{used_filter}")
        found = float(stderr) if isinstance(stderr, int | float) else None
        if not math.isfinite(value) or not math.isfinite(found or 0.0):
            raise HalobenchError(
                f"task {name}: {metric} is {value} (standard error {stderr}), not a finite number; the model's weights "
                "or its dtype are at fault, or the task is not one for this model; leave it out"
            )
        yield metric, used_filter, float(value), found, better.get(metric) is not False


def _group_metrics(suite: str, name: str, group: Group, results: Mapping[str, Any]) -> list[Metric]:
    """lm-eval's aggregates of a group; `samples` are those of its tasks in order, where the value is their mean."""
    leaves = [task.task_name for task in group.get_all_tasks()]
    logs = [sample for leaf in leaves for sample in results.get("samples", {}).get(leaf, [])]
    count = sum(int(results["n-samples"][leaf]["effective"]) for leaf in leaves)
    metrics = []
    for metric, used_filter, value, stderr, better in _numbers(name, results):
        numbers = [float(sample[metric]) for sample in logs if sample["filter"] == used_filter and metric in sample]
        is_mean = len(numbers) == count and abs(float(np.mean(numbers)) - value) < 1e-9
        metrics.append(
            Metric(
                suite=suite,
                task=name,
                metric=metric,
                value=value,
                n=count,
                stderr=stderr,
                higher_is_better=better,
                samples=[round(v, 5) for v in numbers] if is_mean else None,
            )
        )
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
def quiet() -> Iterator[None]:
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
