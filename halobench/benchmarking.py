"""What the benchmark scripts share: forms timed in turns, and the record that a script leaves.

A script prints a table to stderr and one line of JSON to stdout, which is also its record.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from halobench.cli.options import device_or_default
from halobench.errors import HalobenchError, is_out_of_memory
from halobench.files import write_json
from halobench.models import default_device, load
from halobench.provenance import command_line, environment, now
from halobench.shapes import empty_preset, fill, preset_of
from halobench.surgery import SurgeryPlan, transplant
from halobench.tasks.machine import wait_for

Forms = Mapping[str, Callable[[], object]]
MADE = "made from the teacher"
LEAST = 3  # rounds, for a median that one slow moment does not make


@dataclass(frozen=True, kw_only=True)
class Timed:
    """Seconds of a form: median and extremes of n rounds; or what went wrong, with no numbers."""

    median: float | None = None
    min: float | None = None
    max: float | None = None
    n: int = 0
    error: str | None = None


def script_parser(what: str | None) -> argparse.ArgumentParser:
    """A script's command line with what every script takes: the device, and a file for the record."""
    parser = argparse.ArgumentParser(description=what, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default=default_device(), choices=("cpu", "cuda"))
    parser.add_argument("-o", "--output", type=Path)
    return parser


def parse_pair(parser: argparse.ArgumentParser, given: list[str] | None) -> argparse.Namespace:
    """The command line of a script that holds a teacher against a hybrid, complete for its device."""
    parser.add_argument("--teacher", help="a model, or preset:SHAPE; tiny on a CPU, preset:qwen3-1.7b on a GPU")
    parser.add_argument("--hybrid", help=f"the same; {MADE} on a CPU, preset:hypenet-2b on a GPU")
    parser.add_argument("--keep", type=int, default=2, help=f"softmax layers of a hybrid {MADE}")
    found = parser.parse_args(given)
    cpu = found.device == "cpu"
    found.teacher = found.teacher or ("tiny" if cpu else "preset:qwen3-1.7b")
    found.hybrid = found.hybrid or (MADE if cpu else "preset:hypenet-2b")
    return found


def open_pair(given: argparse.Namespace) -> tuple[Any, Any]:
    """The teacher and the hybrid of `parse_pair`, in evaluation mode; one that is made has untrained mixers."""
    device = torch.device(given.device)
    teacher = opened(given.teacher, device)
    if given.hybrid != MADE:
        return teacher, opened(given.hybrid, device)
    hybrid: Any = transplant(teacher, SurgeryPlan.for_model(teacher, keep=given.keep))
    return teacher, hybrid.to(device).eval()


def run_script(
    what: str | None,
    given: argparse.Namespace,
    measure: Callable[[argparse.Namespace], dict[str, Any]],
) -> None:
    """Measures and leaves the record; what cannot be measured as asked is one line and exit code 1 or 2."""
    try:
        device_or_default(given.device)
        record = recorded(what, measure(given))
        print(json.dumps(record))
        if given.output is not None:
            write_json(given.output, record)
    except HalobenchError as error:
        print(f"error: {error}", file=sys.stderr)
        raise SystemExit(error.exit_code) from None


def opened(name: str, device: torch.device, dtype: torch.dtype | None = None) -> Any:
    """A model in evaluation mode, or a preset with random weights; by default in fp32 on a CPU and bf16 on a GPU."""
    dtype = dtype or (torch.float32 if device.type == "cpu" else torch.bfloat16)
    preset = preset_of(name)
    if preset is None:
        return load(name, device=device.type, dtype=dtype)[0]
    return fill(empty_preset(preset, dtype), device).eval()


def in_turns(forms: Forms, device: torch.device, *, seconds: float, rounds: int) -> dict[str, Timed]:
    """Times every form once a round, each round in the other order, after a call of each to warm up.

    Ends after `rounds`, or with the round in which `seconds` are spent, though not before LEAST rounds. Running out of
    memory is a result.
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
        if turn + 1 >= LEAST and time.perf_counter() - begun > seconds:
            break
    return {name: Timed(error=failed[name]) if name in failed else _timed(times[name]) for name in forms}


def _seconds(run: Callable[[], object], device: torch.device) -> float:
    """Seconds of a call; on a GPU between two of its own events."""
    wait_for(device)
    if device.type == "cuda":
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        begin.record()
        run()
        end.record()
        end.synchronize()
        return begin.elapsed_time(end) / 1000
    start = time.perf_counter()
    run()
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


def recorded(what: str | None, found: dict[str, Any]) -> dict[str, Any]:
    """A record: what was found, with the command, the time, machine and versions."""
    return {"what": what, "command": command_line(), "created": now(), "environment": environment(), **found}
