"""Reading a file of scores that someone else wrote: everything it may have wrong is said in one line."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from halobench.config import from_dict
from halobench.errors import HalobenchError, UserError
from halobench.files import read_json
from halobench.surgery.selection.evidence import Evidence

MOST_LAYERS = 10_000  # of any decoder; a larger number is a mistake
LARGEST = 1e100  # of a score; differences and ratios of such numbers stay finite
LONGEST = 400  # characters of a message: what stands in the wrong place can be the whole file


def read_scores(path: Path) -> Evidence:
    """The evidence in a scores file.

    Raises:
        UserError: the file cannot be read, lacks a field, has an unknown one or one of the wrong type, does not hold
            every layer once, or holds a number that is NaN, infinite or beyond LARGEST; its place is named.
    """
    if not path.exists():
        raise UserError(f"scores file {path} does not exist")
    if not path.is_file():
        raise UserError(
            f"--scores {path} is not a file; give the JSON file of layer scores, or the run without --scores"
        )
    try:
        data = read_json(path)
        _check_count(data, path)
        evidence = from_dict(Evidence, data, str(path))
    except HalobenchError as error:
        raise UserError(_cut(str(error))) from error
    except OSError as error:
        raise UserError(f"scores file {path} cannot be read ({error.strerror})") from error
    except (ValueError, OverflowError, RecursionError) as error:  # numbers too long, lists too deep
        raise UserError(f"scores file {path} cannot be read ({error})") from error
    for where, task, metric, value in _numbers(evidence):
        if not abs(value) < LARGEST:
            raise UserError(f"{where}, task {task!r}: {metric} is {value}, not a number one can rank by")
    return evidence


def _cut(message: str) -> str:
    return message if len(message) <= LONGEST else f"{message[:LONGEST]} ..."


def _check_count(data: Any, path: Path) -> None:
    count = data.get("num_layers") if isinstance(data, dict) else None
    if isinstance(count, int | float) and not 1 <= count <= MOST_LAYERS:
        raise UserError(f"{path}.num_layers is {count}; it must be the number of the model's layers")


def _numbers(evidence: Evidence) -> Iterator[tuple[str, str, str, float]]:
    """Every (place, task, metric, number) of scores and samples."""
    models = [
        ("the original", evidence.original, evidence.original_samples),
        ("the all-linear student", evidence.linear, evidence.linear_samples),
    ]
    for part, entries in (
        ("", evidence.replaced),
        (" restored", evidence.restored),
        (" re-distilled", evidence.redistilled),
    ):
        models += [(f"layer {entry.layer}{part}", entry.scores, entry.samples) for entry in entries]
    for where, scores, samples in models:
        for task, metrics in scores.items():
            yield from ((where, task, metric, value) for metric, value in metrics.items())
        for task, lists in (samples or {}).items():
            for metric, values in lists.items():
                yield from ((where, task, f"a sample of {metric}", value) for value in values)
