"""Measures Lightning Attention's operator against softmax attention: python benchmarks/operators.py [-o RECORD.json]

One decay per head, forward and then forward with gradients, by length. In turns in one process: the recurrence in our
chunked torch form, in Triton and in flash-linear-attention where these run, and torch's scaled_dot_product_attention
(causal). A time is the median over the rounds. The floor is what the shapes ask for at least at rates measured here:
queries, keys, values and outputs once through memory, or the operations of writing and reading the state. On two idle
cores it takes three minutes; records of a CPU are committed as benchmarks/operators-cpu.json, of a GPU as
benchmarks/operators-cuda.json.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from dataclasses import asdict
from typing import Any

import torch
import torch.nn.functional as F

from halobench.benchmarking import Timed, in_turns, plain, ratio, run_script, script_parser
from halobench.errors import UserError
from halobench.kernels.backend import choose, explain
from halobench.kernels.scalar_decay.recurrence import scalar_decay
from halobench.kernels.scalar_decay.slopes import alibi_slopes
from halobench.progress import say
from halobench.tasks.kernels_seen import attention_kernels
from halobench.tasks.machine import Machine, measure_machine
from halobench.units import format_length, parse_length, parse_lengths

LINEAR_FROM = 16_384  # tokens; below, inputs and outputs fit into the caches, which makes a token cheaper
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}


def arguments(given: list[str] | None = None) -> argparse.Namespace:
    """The command line; what is left out depends on the device."""
    parser = script_parser(__doc__)
    parser.add_argument("--lengths", default="1k,2k,4k,8k,16k,32k,64k,128k,256k,512k", help="tokens")
    parser.add_argument("--heads", type=int, help="8 on a CPU, 16 on a GPU")
    parser.add_argument("--size", type=int, help="of a head: 64 on a CPU, 128 on a GPU")
    parser.add_argument("--batch", type=int, default=1)
    parser.add_argument("--dtype", choices=DTYPES, help="fp32 on a CPU, bf16 on a GPU")
    parser.add_argument("--sdpa-up-to", help="longest text of softmax attention: 16k on a CPU, 512k on a GPU")
    parser.add_argument("--gradients-up-to", help="longest text with gradients: 16k on a CPU, 512k on a GPU")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--seconds", type=float, default=6.0, help="of a length, after which no further round begins")
    found = parser.parse_args(given)
    cpu = found.device == "cpu"
    found.heads, found.size = found.heads or (8 if cpu else 16), found.size or (64 if cpu else 128)
    found.dtype = found.dtype or ("fp32" if cpu else "bf16")
    longest = "16k" if cpu else "512k"
    found.sdpa_up_to = parse_length(found.sdpa_up_to or longest)
    found.gradients_up_to = parse_length(found.gradients_up_to or longest)
    return found


def forms_here(like: torch.Tensor) -> tuple[list[str], dict[str, str]]:
    """The forms of the recurrence that run on tensors like this one, and why the others do not."""
    able, unable = [], {}
    for form in ("torch", "triton", "fla"):
        try:
            choose("scalar_decay", form, like)
            able.append(form)
        except UserError as error:
            unable[form] = str(error)
    return able, unable


def competitors(
    names: list[str], length: int, given: argparse.Namespace, *, gradients: bool
) -> dict[str, Callable[[], object]]:
    """A call for each form, on the same numbers; softmax attention has them heads first, as it wants them."""
    device, dtype = torch.device(given.device), DTYPES[given.dtype]
    shape = given.batch, length, given.heads, given.size
    q, k, v, weight = (torch.randn(shape, device=device, dtype=dtype) for _ in range(4))
    decay, scale = -torch.tensor(alibi_slopes(given.heads), device=device), given.size**-0.5
    leaves = [x.requires_grad_(gradients) for x in (q, k, v)]

    def recurrence(form: str) -> Callable[[], object]:
        return lambda: finished(scalar_decay(*leaves, decay, scale=scale, backend=form)[0], leaves, weight)

    def finished(o: torch.Tensor, into: list[torch.Tensor], d_o: torch.Tensor) -> object:
        return torch.autograd.grad(o, into, d_o) if gradients else o

    calls = {form: recurrence(form) for form in names}
    if length <= given.sdpa_up_to:
        first = [x.detach().transpose(1, 2).contiguous().requires_grad_(gradients) for x in leaves]
        d_o = weight.transpose(1, 2).contiguous()
        calls["sdpa"] = lambda: finished(F.scaled_dot_product_attention(*first, is_causal=True), first, d_o)
    return calls


def floor_seconds(length: int, given: argparse.Namespace, machine: Machine) -> float:
    """No program is faster: four tensors through memory, and 4 K V operations for a token and head."""
    numbers = given.batch * length * given.heads * given.size
    moved = 4 * numbers * DTYPES[given.dtype].itemsize / machine.bytes_per_s
    return max(moved, 4 * numbers * given.size / machine.flops_per_s)


def measure(given: argparse.Namespace) -> dict[str, Any]:
    """A row for each length."""
    device = torch.device(given.device)
    like = torch.zeros(1, 64, given.heads, given.size, device=device, dtype=DTYPES[given.dtype])
    able, unable = forms_here(like)
    able_to_train, unable_to_train = forms_here(like.clone().requires_grad_())
    ours = choose("scalar_decay", "auto", like)
    machine = measure_machine(device, DTYPES[given.dtype])
    rows = []
    for length in sorted(parse_lengths(given.lengths)):
        with torch.no_grad():
            calls = competitors(able, length, given, gradients=False)
            forward = in_turns(calls, device, seconds=given.seconds, rounds=given.rounds)
        both: dict[str, Timed] = {}
        if length <= given.gradients_up_to:
            calls = competitors(able_to_train, length, given, gradients=True)
            both = in_turns(calls, device, seconds=given.seconds, rounds=given.rounds)
        floor = floor_seconds(length, given, machine)
        rows.append(
            {
                "length": length, "forward": plain(forward), "forward and gradients": plain(both),
                "floor": floor, "sdpa over ours": ratio(forward.get("sdpa"), forward[ours]),
                "sdpa over ours with gradients": ratio(both.get("sdpa"), both.get(ours)),
            }
        )  # fmt: skip
        say(f"{format_length(length):>6}  floor {1e3 * floor:9.2f} ms  forward {_told(forward)}")
        if both:
            say(f"{'':>6}  {'':>18}  with gradients {_told(both)}")
    with attention_kernels() as seen:
        F.scaled_dot_product_attention(*[like.transpose(1, 2)] * 3, is_causal=True)
    return {
        "device": given.device, "heads": given.heads, "size": given.size, "batch": given.batch, "dtype": given.dtype,
        "ours": ours, "why": explain("scalar_decay", like),
        "not here": unable_to_train | unable, "sdpa kernels": sorted(seen),
        "machine": asdict(machine), "linear": linearity(rows, ours), "rows": rows,
    }  # fmt: skip


def linearity(rows: list[dict[str, Any]], ours: str) -> dict[str, Any] | None:
    """How far the time of a token strays from its mean over the lengths from LINEAR_FROM on; None for under two.

    Of the fastest round: gigabytes of new memory take the system a time that has nothing to do with the operator.
    """
    found = [(row["length"], row["forward"][ours].get("min")) for row in rows if row["length"] >= LINEAR_FROM]
    each = {length: seconds / length for length, seconds in found if seconds is not None}
    if len(each) < 2:
        return None
    mean = sum(each.values()) / len(each)
    return {
        "from": min(each), "to": max(each), "seconds a token": mean,
        "largest deviation": max(abs(seconds / mean - 1) for seconds in each.values()),
    }  # fmt: skip


def _told(found: dict[str, Timed]) -> str:
    return "  ".join(
        f"{name} {t.error}" if t.median is None else f"{name} {1e3 * t.median:9.2f} ms" for name, t in found.items()
    )


def main(given: list[str] | None = None) -> None:
    """Measures, prints, and writes the record where one is asked for."""
    run_script(__doc__, arguments(given), measure)


if __name__ == "__main__":
    main()
