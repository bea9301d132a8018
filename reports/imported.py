"""Results that lm-eval wrote itself as a record of ours, so that they can stand in a leaderboard.

Only what its results file (`lm_eval --output_path`) says is taken over: values, standard errors, numbers of samples. It
holds no single answers, so such a row is never paired with ours, and is marked as measured elsewhere.
"""

from __future__ import annotations

import hashlib
import json
import math
from datetime import UTC, datetime
from typing import Any

from halobench.errors import UserError
from halobench.records import Metric, ModelCard, RunRecord
from halobench.reports.rows import IMPORTED

HARNESS = "lm-eval"
_SUITES = {
    "csr": ("arc_easy", "arc_challenge", "hellaswag", "piqa", "winogrande", "lambada_openai", "mmlu"),
    "recall": ("squad_completion", "fda", "swde"),
}
_UNKNOWN = ("N/A", "", " ")  # how lm-eval writes that there is no number
_KEPT_SETTINGS = ("model", "model_args", "num_fewshot", "batch_size", "limit", "random_seed", "fewshot_seed")


def is_lm_eval(data: Any) -> bool:
    """True for a document of the shape that lm-eval writes."""
    beside = ("config", "configs", "versions", "n-shot", "n-samples", "lm_eval_version")
    return isinstance(data, dict) and "results" in data and any(key in data for key in beside)


def lm_eval_record(data: dict[str, Any], where: str) -> RunRecord:
    """The record of one results document. where: its file, for messages. Raises UserError for what does not fit."""
    results = _table(data, "results", where)
    if not results:
        raise UserError(f"{where} has no results; give a results_*.json of an evaluation that finished")
    config = data["config"] if isinstance(data.get("config"), dict) else {}
    name = _model_name(data, config, where)
    digest = hashlib.sha256(json.dumps(data, sort_keys=True).encode()).hexdigest()[:16]
    versions = {"lm-eval": data.get("lm_eval_version"), "transformers": data.get("transformers_version")}
    commit = data.get("git_hash")
    return RunRecord(
        kind="eval",
        model=ModelCard(
            name=name,
            path=name,
            hash=digest,
            layers=0,
            parameters=_count(config.get("model_num_parameters")),
            teacher=name,
        ),
        metrics=[metric for task in results for metric in _metrics(data, task, where)],
        settings={HARNESS: {key: config[key] for key in _KEPT_SETTINGS if key in config}},
        lineage={IMPORTED: HARNESS, "results": digest} | ({"git": commit} if isinstance(commit, str) else {}),
        backends={"harness": HARNESS},
        command="lm_eval" + "".join(f" --{key} {config[key]}" for key in ("model", "model_args") if config.get(key)),
        created=_date(data.get("date")),
        environment={"versions": {key: str(value) for key, value in versions.items() if value}},
    )


def _table(data: dict[str, Any], key: str, where: str) -> dict[str, Any]:
    found = data.get(key)
    if not isinstance(found, dict):
        raise UserError(f"{where}: {key!r} must be a table of tasks, got {type(found).__name__}; is it whole?")
    return found


def _model_name(data: dict[str, Any], config: dict[str, Any], where: str) -> str:
    given = data.get("model_name") or config.get("model_args")
    if isinstance(given, str) and given:
        pretrained = [part.partition("=")[2] for part in given.split(",") if part.startswith("pretrained=")]
        return pretrained[0] if pretrained else given
    raise UserError(f"{where} does not name its model ('model_name'); add the field to import it")


def _metrics(data: dict[str, Any], task: str, where: str) -> list[Metric]:
    row = data["results"][task]
    if not isinstance(row, dict):
        raise UserError(f"{where}: results.{task} must be a table of metrics, got {type(row).__name__}")
    suite = next((suite for suite, tasks in _SUITES.items() if task in tasks), HARNESS)
    samples, better = _of_task(data, "n-samples", task), _of_task(data, "higher_is_better", task)
    found = []
    for key, value in row.items():
        metric, _, used_filter = key.partition(",")
        if not used_filter or metric.endswith("_stderr") or value in _UNKNOWN:
            continue
        error = row.get(f"{metric}_stderr,{used_filter}")
        found.append(
            Metric(
                suite=suite,
                task=task,
                metric=metric if used_filter == "none" else f"{metric}:{used_filter}",
                value=_number(value, f"{where}: results.{task}.{key}"),
                n=_count(samples.get("effective")),
                stderr=None
                if error is None or error in _UNKNOWN
                else _number(error, f"{where}: error of {task}.{key}"),
                higher_is_better=better.get(metric) is not False,
            )
        )
    return found


def _of_task(data: dict[str, Any], key: str, task: str) -> dict[str, Any]:
    table = data.get(key)
    found = table.get(task) if isinstance(table, dict) else None
    return found if isinstance(found, dict) else {}


def _number(value: Any, what: str) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise UserError(f"{what} must be a number, got {type(value).__name__} {str(value)[:40]!r}")
    return float(value)


def _count(value: Any) -> int:
    return value if isinstance(value, int) and not isinstance(value, bool) and value > 0 else 0


def _date(value: Any) -> str:
    """lm-eval notes seconds since 1970."""
    if isinstance(value, int | float) and math.isfinite(value) and 0 < value < 2**32:
        return datetime.fromtimestamp(value, UTC).isoformat(timespec="seconds")
    return ""
