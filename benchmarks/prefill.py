"""Measures reading a prompt, teacher against hybrid: python benchmarks/prefill.py [-o RECORD.json]

All read the same random tokens in chunks, in turns in one process; a time is the median over the rounds, and the floor
the operations of the shapes at the rate of a large matrix product measured here. transformers gives the teacher a mask
from its second chunk on, which keeps the fastest kernels out, so it is measured with our softmax layers in place of its
attention as well, which compute the same; ratios are to the faster of the two. By default the embedded teacher and a
hybrid made from it with untrained mixers on a CPU, and on a GPU Qwen3-1.7B's shape and HypeNet-2B's with random
weights: speed does not depend on weights. On two idle cores it takes three minutes; records are committed as
benchmarks/prefill-cpu.json and benchmarks/prefill-cuda.json.
"""

from __future__ import annotations

import argparse
from dataclasses import asdict
from typing import Any

import torch

from halobench.benchmarking import in_turns, open_pair, parse_pair, plain, ratio, run_script, script_parser
from halobench.floors import sizes_of, theory_of
from halobench.mixers.forms import ask_for, used
from halobench.progress import say
from halobench.surgery import SurgeryPlan, transplant
from halobench.tasks.kernels_seen import attention_kernels
from halobench.tasks.machine import measure_machine
from halobench.tasks.scoring import prefill
from halobench.units import format_length, parse_length, parse_lengths

CHUNK = 4096
OURS = "teacher, our attention"


def arguments(given: list[str] | None = None) -> argparse.Namespace:
    """The command line; what is left out depends on the device."""
    parser = script_parser(__doc__)
    parser.add_argument("--kernels", default="auto", choices=("auto", "torch", "triton", "fla"))
    parser.add_argument("--lengths", help="tokens: 1k to 16k on a CPU, 4k to 512k on a GPU")
    parser.add_argument("--teacher-up-to", default="512k", help="longest prompt of the teacher")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--seconds", type=float, default=20.0, help="of a length, after which no further round begins")
    found = parse_pair(parser, given)
    found.lengths = found.lengths or ("1k,2k,4k,8k,16k" if found.device == "cpu" else "4k,32k,128k,512k")
    return found


def with_our_attention(teacher: Any) -> Any:
    """The teacher with softmax mixers that compute what its attention does."""
    plan = SurgeryPlan.for_model(teacher, keep="all")
    for layer in range(len(plan.layers)):
        plan = plan.with_layer(layer, "softmax", rope=True, output_gate=False)
    return transplant(teacher, plan).to(teacher.device).eval()


def measure(given: argparse.Namespace) -> dict[str, Any]:
    """A row for each length."""
    device = torch.device(given.device)
    teacher, hybrid = open_pair(given)
    ask_for(hybrid, given.kernels)
    models = {"teacher": teacher, OURS: with_our_attention(teacher), "hybrid": hybrid}
    machine = measure_machine(device, teacher.dtype)
    rows = []
    for length in sorted(parse_lengths(given.lengths)):
        ids = torch.randint(0, teacher.config.vocab_size, (1, length), device=device)
        able = {n: m for n, m in models.items() if n == "hybrid" or length <= parse_length(given.teacher_up_to)}
        with torch.inference_mode():
            calls = {name: lambda model=model, ids=ids: prefill(model, ids, CHUNK)[1] for name, model in able.items()}
            found = in_turns(calls, device, seconds=given.seconds, rounds=given.rounds)
        floors = {name: theory_of(sizes_of(m), machine, length, 1, CHUNK).ttft_floor_s for name, m in models.items()}
        ratios = [r for n in ("teacher", OURS) if (r := ratio(found.get(n), found["hybrid"])) is not None]
        faster = min(ratios, default=None)
        rows.append({"length": length, "seconds": plain(found), "floor": floors, "teacher over hybrid": faster})
        told = "  ".join(f"{n} {t.error or f'{t.median:8.3f} s'} (floor {floors[n]:.3f})" for n, t in found.items())
        say(f"{format_length(length):>6}  {told}" + ("" if faster is None else f"  {faster:5.2f}x"))
    return {
        "device": given.device, "teacher": given.teacher, "hybrid": given.hybrid, "dtype": str(teacher.dtype)[6:],
        "keep": sum(part.name == "softmax" for part in hybrid.mixer_modules().values()),
        "layers": teacher.config.num_hidden_layers, "chunk": CHUNK, "kernels": given.kernels,
        "backends": {"mixers": used(hybrid), "attention": _kernels(models)}, "machine": asdict(machine), "rows": rows,
    }  # fmt: skip


def _kernels(models: dict[str, Any]) -> dict[str, list[str]]:
    """The attention kernels that torch picked for a prompt of two chunks."""
    found = {}
    for name, model in models.items():
        ids = torch.zeros(1, 256, dtype=torch.long, device=model.device)
        with attention_kernels() as seen:
            prefill(model, ids, ids.shape[1] // 2)
        found[name] = sorted(seen)
    return found


def main(given: list[str] | None = None) -> None:
    """Measures, prints, and writes the record where one is asked for."""
    run_script(__doc__, arguments(given), measure)


if __name__ == "__main__":
    main()
