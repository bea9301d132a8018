"""Where records come from: folders of runs, single records, results of lm-eval. What cannot be used is refused in one
line that names the file; nothing of a damaged file reaches a table.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from halobench.config import to_dict
from halobench.errors import HalobenchError, UserError
from halobench.files import read_json
from halobench.records import Metric, RunRecord, find_records, read_record
from halobench.reports.imported import is_lm_eval, lm_eval_record
from halobench.reports.rows import methods, metric_name
from halobench.reports.table import clean

_MOST_LAYERS = 4096
_LARGEST = 1e30
_DEEPEST = 60
_ORACLE_PARTS = ("layers", "keep", "methods", "agreement", "cells")


def read_runs(runs: Sequence[Path]) -> list[RunRecord]:
    """Every record of `runs`, each once: folders that hold records (*.record.json), record files, lm-eval's results."""
    found = [record for run in runs for record in _read(Path(run))]
    return list({json.dumps(to_dict(record), sort_keys=True): record for record in found}.values())


def _read(run: Path) -> list[RunRecord]:
    if run.is_file():
        return [_one(run)]
    paths = sorted(run.rglob("*.record.json")) if run.is_dir() else []
    foreign = sorted(run.rglob("results_*.json")) if run.is_dir() and not paths else []
    if foreign:
        raise UserError(f"no records (*.record.json) below {run}, but results of lm-eval; give {foreign[0]} itself")
    return [_one(path) for path in paths] or find_records(run)  # which says why there are none


def _one(path: Path) -> RunRecord:
    try:
        data = read_json(path)
        _sound(data, path)
        if is_lm_eval(data):
            return checked(lm_eval_record(data, str(path)), str(path))
        return checked(read_record(path), str(path))
    except OSError as error:
        raise HalobenchError(f"{path} cannot be read ({error.strerror})") from error
    except (RecursionError, OverflowError, ValueError) as error:
        raise HalobenchError(f"{path} is not a record: {clean(str(error))}") from error


def _sound(data: Any, path: Path) -> None:
    """UserError for what no record holds anywhere: endless depth, text that is no text, numbers without measure."""
    level = [data]
    for _ in range(_DEEPEST):
        if not level:
            return
        for value in level:
            if isinstance(value, str) and re.search("[\ud800-\udfff]", value):
                raise UserError(
                    f"{path} holds half a character (a lone surrogate) in {clean(value, 40)!r}; write it anew"
                )
            if isinstance(value, int | float) and abs(value) > _LARGEST and value not in (math.inf, -math.inf):
                raise UserError(f"{path}: a number is larger than {_LARGEST:g}, which nothing measured is")
        tables = [list(value.items()) for value in level if isinstance(value, dict)]
        lists = [value for value in level if isinstance(value, list)]
        level = [part for pairs in tables for pair in pairs for part in pair] + [p for found in lists for p in found]
    if level:
        raise UserError(f"{path} nests deeper than {_DEEPEST} levels; give a record as `halobench` writes it")


def checked(record: RunRecord, where: str) -> RunRecord:
    """`record`, when its parts fit together; a UserError that names `where` and the part otherwise."""
    if not 0 <= record.model.layers <= _MOST_LAYERS:
        raise UserError(f"{where}: model.layers is {record.model.layers}; a decoder has 1 to {_MOST_LAYERS}")
    if record.model.trained_length is not None and record.model.trained_length < 1:
        raise UserError(f"{where}: model.trained_length is {record.model.trained_length}; give tokens, or null")
    for name, entry in methods(record).items():
        for part in ("layers", "scores", "stderr"):
            found = entry.get(part)
            if not (found is None or (isinstance(found, list) and len(found) <= _MOST_LAYERS)):
                raise UserError(
                    f"{where}: {part} of the selector {clean(name, 40)!r} must be a list of at most {_MOST_LAYERS}, "
                    "or null"
                )
    for metric in record.metrics:
        wrong = _wrong(metric)
        if wrong:
            name = clean(metric_name((metric.suite, metric.task, metric.metric, None)))
            raise UserError(f"{where}: metric {name}: {wrong}")
    oracle = record.details.get("oracle")
    if record.kind == "oracle" and not (isinstance(oracle, dict) and all(part in oracle for part in _ORACLE_PARTS)):
        raise UserError(f"{where}: details.oracle must have {', '.join(_ORACLE_PARTS)}; run `halobench oracle` again")
    return record


def _wrong(metric: Metric) -> str | None:
    """What is amiss in one metric, if anything."""
    if metric.stderr is not None and metric.stderr < 0:
        return f"stderr is {metric.stderr:g}; give 0 or more, or null where there is none"
    if metric.n < 0:
        return f"n is {metric.n}; give the number of samples"
    if metric.length is not None and metric.length < 1:
        return f"length is {metric.length}; give a number of tokens, or null where there is none"
    for name, values in (("clusters", metric.clusters), ("depths", metric.depths)):
        if values is not None and len(values) != len(metric.samples or []):
            return f"{len(values)} {name} for {len(metric.samples or [])} samples; give one a sample"
    if any(not (math.isfinite(depth) and 0 <= depth <= 1) for depth in metric.depths or []):
        return "a depth is not between 0 (start) and 1 (end)"
    return None
