"""What the benchmark scripts share: forms timed in turns, and the record that a script leaves.

A script prints a table to stderr and one line of JSON to stdout, which is also its record.
"""

from __future__ import annotations

import json
import statistics
import sys
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from halobench.errors import is_out_of_memory
from halobench.files import write_json
from halobench.models import load
from halobench.provenance import command_line, environment, now
from halobench.shapes import empty_preset, fill, preset_of
from halobench.tasks.machine import wait_for

Forms = Mapping[str, Callable[[], object]]


@dataclass(frozen=True, kw_only=True)
class Timed:
    """Seconds of a form: median and extremes of n rounds; or what went wrong, with no numbers."""

    median: float | None = None
    min: float | None = None
    max: float | None = None
    n: int = 0
    error: str | None = None


def opened(name: str, device: torch.device, dtype: torch.dtype | None = None) -> Any:
    """A model in evaluation mode, or a preset with random weights; by default in fp32 on a CPU and bf16 on a GPU."""
    dtype = dtype or (torch.float32 if device.type == "cpu" else torch.bfloat16)
    preset = preset_of(name)
    if preset is None:
        return load(name, device=device.type, dtype=dtype)[0]
    return fill(empty_preset(preset, dtype), device).eval()


def in_turns(forms: Forms, device: torch.device, *, seconds: float, rounds: int) -> dict[str, Timed]:
    """Times every form once a round, each round in the other order, after a call of each to warm up.

    Ends after `rounds`, or with the round in which `seconds` are spent. Running out of memory is a result.
    """
    times: dict[str, list[float]] = {name: [] for name in forms}
    failed: dict[str, str] = {}
    begun = time.perf_counter()
    for turn in range(-1, rounds):
        for name in list(forms)[:: 1 if turn % 2 else -1]:
            if name in failed:
                continue
            try:
                spent = _seconds(forms[name], device)
            except (MemoryError, RuntimeError) as error:
                if not is_out_of_memory(error):
                    raise
                failed[name] = "out of memory"
                continue
            if turn >= 0:
                times[name].append(spent)
        if turn >= 0 and time.perf_counter() - begun > seconds:
            break
    return {name: Timed(error=failed[name]) if name in failed else _timed(times[name]) for name in forms}


def _seconds(run: Callable[[], object], device: torch.device) -> float:
    wait_for(device)
    start = time.perf_counter()
    run()
    wait_for(device)
    return time.perf_counter() - start


def _timed(found: list[float]) -> Timed:
    return Timed(median=statistics.median(found), min=min(found), max=max(found), n=len(found))


def ratio(slow: Timed | None, fast: Timed | None) -> float | None:
    """How many times faster the second is, by medians; None where one was not measured."""
    if slow is None or fast is None or slow.median is None or fast.median is None:
        return None
    return slow.median / fast.median


def plain(found: Mapping[str, Timed]) -> dict[str, dict[str, Any]]:
    """As JSON has it, without what is empty."""
    return {name: {k: v for k, v in asdict(timed).items() if v is not None} for name, timed in found.items()}


def leave(what: str | None, found: dict[str, Any], output: Path | None) -> None:
    """Prints the record as one line of JSON, and writes it where a file is asked for."""
    record = {"what": what, "command": command_line(), "created": now(), "environment": environment(), **found}
    if output is not None:
        write_json(output, record)
    json.dump(record, sys.stdout)
    print()
