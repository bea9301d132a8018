"""Measures the KL loss from hidden states, loss and gradients: python benchmarks/loss.py [-o RECORD.json]

Forms take turns in one process, each round in the other order; a time is the median over the rounds. `speed` is the
definition's time over a form's: above 1 the form is faster than the definition. On a
GPU the peers that are installed take part (Liger's LigerFusedLinearJSD at beta 0, fla's FusedKLDivLoss), and the floor
is the larger of operations and bytes at the speeds given (an H200's by default).

Memory is the peak above what is held with the two unembeddings (the weights) in place: hidden states of both models,
the gradients, every logit, every temporary; in a fresh process, on a CPU by the kernel's high-water mark, on a GPU by
torch's.

A form that runs out of memory has no times: that is its result. A table goes to stderr, one line of JSON to stdout.
`--memory-of FORM` takes one measurement of memory alone and prints that as JSON.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import math
import subprocess
import sys
from collections.abc import Callable
from typing import Any

import torch

from halobench.benchmarking import in_turns, plain, ratio, run_script, script_parser
from halobench.kernels.chunked_loss import Head, SoftTargets, distillation
from halobench.kernels.chunked_loss.hidden import LIVE_BYTES
from halobench.kernels.chunked_loss.rows import BLOCK_BYTES
from halobench.progress import say
from halobench.tasks.memory import peak, reset_peak

OURS = ("naive", "torch", "triton")
PEERS = {"liger": "liger_kernel", "fla": "fla"}  # form: the package it is in


def arguments(words: list[str] | None = None) -> argparse.Namespace:
    """The command line."""
    parser = script_parser(__doc__)
    parser.add_argument("--tokens", type=int, help="16384 on a GPU, 1024 elsewhere")
    parser.add_argument("--vocabulary", type=int, default=151_936)
    parser.add_argument("--width", type=int, help="2048 on a GPU, 64 elsewhere")
    parser.add_argument("--dtype", choices=["float32", "bfloat16"], help="bfloat16 on a GPU, float32 elsewhere")
    parser.add_argument("--temperature", type=float, default=1.0)
    parser.add_argument("--top-k", type=int, help="of the teacher; leaves the peers out")
    parser.add_argument("--forms", help="comma-separated; by default all that can run")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--memory-tokens", type=int, nargs="*", default=[], help="more lengths for ours, memory alone")
    parser.add_argument("--tflops", type=float, default=790, help="of the GPU, for the floor")
    parser.add_argument("--terabytes", type=float, default=4.3, help="a second, of the GPU, for the floor")
    parser.add_argument("--memory-of", metavar="FORM")
    given = parser.parse_args(words)
    given.cuda = torch.device(given.device).type == "cuda"
    given.tokens = given.tokens or (16_384 if given.cuda else 1024)
    given.width = given.width or (2048 if given.cuda else 64)
    given.dtype = getattr(torch, given.dtype or ("bfloat16" if given.cuda else "float32"))
    return given


def forms_of(given: argparse.Namespace) -> list[str]:
    """The forms to measure: those named, or the definition, ours and the peers that can run here."""
    if given.forms:
        return given.forms.split(",")
    if not given.cuda:
        return ["naive", "torch"]
    peers = [form for form, package in PEERS.items() if importlib.util.find_spec(package) is not None]
    return [*OURS, *(peers if given.top_k is None else [])]


def weights(given: argparse.Namespace) -> tuple[torch.nn.Parameter, torch.Tensor]:
    """The student's unembedding, which trains, and the teacher's."""
    torch.manual_seed(1)
    options = {"device": given.device, "dtype": given.dtype}
    student, teacher = (torch.randn(given.vocabulary, given.width, **options).mul_(0.1) for _ in range(2))
    return torch.nn.Parameter(student), teacher


def mean_kl(form: str, given: argparse.Namespace) -> Callable[..., torch.Tensor]:
    """(hidden, head, target, teacher's head) -> mean over tokens of the KL, by a form."""
    if form == "liger":
        from liger_kernel.transformers import LigerFusedLinearJSD

        # Liger leaves the factor T^2 to the caller.
        loss = LigerFusedLinearJSD(jsd_beta=0.0, temperature=given.temperature)
        return lambda h, w, t, tw: given.temperature**2 * loss(h, w, t, tw)
    if form == "fla":
        from fla.modules.fused_kl_div import FusedKLDivLoss

        loss = FusedKLDivLoss()  # knows no temperature
        return lambda h, w, t, tw: loss(h, t, w, tw)
    asked = SoftTargets(temperature=given.temperature, top_k=given.top_k)

    def ours(h: torch.Tensor, w: torch.Tensor, t: torch.Tensor, tw: torch.Tensor) -> torch.Tensor:
        ones = torch.ones(len(h), device=h.device)
        total = distillation(Head(weight_VD=w), Head(weight_VD=tw), h, t, ones, asked=asked, backend=form)
        return total / len(h)

    return ours


def call(form: str, given: argparse.Namespace, heads: tuple[torch.nn.Parameter, torch.Tensor]) -> Callable[[], float]:
    """A call that takes the loss of new hidden states, and its gradients."""
    loss_of = mean_kl(form, given)

    def run() -> float:
        options = {"device": given.device, "dtype": given.dtype}
        torch.manual_seed(0)
        hidden, target = (torch.randn(given.tokens, given.width, **options) for _ in range(2))
        loss = loss_of(hidden.requires_grad_(), heads[0], target, heads[1])
        loss.backward()
        heads[0].grad = None
        return float(loss.detach())

    return run


def memory(form: str, given: argparse.Namespace) -> dict[str, Any]:
    """Peak bytes above the weights, on a CPU to be called in a fresh process.

    bound_bytes: what ours may take. whole_logits_bytes: of the student's logits, the teacher's and a gradient, which no
    form without chunks can do without.
    """
    small = argparse.Namespace(**{**vars(given), "tokens": 8, "vocabulary": 64, "width": 8})
    call(form, small, weights(small))()  # what libraries allocate once is not the loss's
    heads, device = weights(given), torch.device(given.device)
    before = reset_peak(device)
    loss = call(form, given, heads)()
    most = peak(device)
    size, matrix = given.dtype.itemsize, given.vocabulary * given.width
    place = "cuda" if given.cuda else "cpu"
    logits = min(LIVE_BYTES[place], 2 * size * given.tokens * given.vocabulary)
    gradients = (4 + size) * matrix + 4 * size * given.tokens * given.width
    return {
        "form": form, "tokens": given.tokens, "vocabulary": given.vocabulary, "width": given.width,
        "peak_bytes": most - before, "bound_bytes": logits + gradients + 8 * BLOCK_BYTES[place],
        "whole_logits_bytes": 3 * size * given.tokens * given.vocabulary, "nats_per_token": loss,
    }  # fmt: skip


def fresh(form: str, given: argparse.Namespace, tokens: int) -> dict[str, Any]:
    """`memory` in a process of its own."""
    options = {
        "--memory-of": form, "--device": given.device, "--tokens": tokens, "--vocabulary": given.vocabulary,
        "--width": given.width, "--dtype": str(given.dtype).removeprefix("torch."), "--temperature": given.temperature,
    }  # fmt: skip
    options |= {} if given.top_k is None else {"--top-k": given.top_k}
    command = [sys.executable, __file__, *(str(word) for pair in options.items() for word in pair)]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        return {"form": form, "tokens": tokens, "error": (done.stderr.strip().splitlines() or ["it was killed"])[-1]}
    return json.loads(done.stdout)


def times(given: argparse.Namespace, forms: list[str]) -> dict[str, dict[str, Any]]:
    """Seconds of each form, in turns in this process; the definition's over each."""
    heads = weights(given)
    calls = {form: call(form, given, heads) for form in forms}
    found = in_turns(calls, torch.device(given.device), seconds=math.inf, rounds=given.rounds)
    speeds = {form: ratio(found.get("naive"), timed) for form, timed in found.items()}
    return {form: row | {"speed": speeds[form]} for form, row in plain(found).items()}


def floor(given: argparse.Namespace) -> dict[str, float]:
    """Milliseconds below which no form that makes each logit once can be.

    products: of student, teacher, and the gradients in hidden states and unembedding. rows: bytes of writing both
    logits, of reading them for the gradient, of writing that and reading it for two products.
    """
    logits = given.tokens * given.vocabulary
    products = 4 * 2 * logits * given.width / given.tflops / 1e9
    rows = 7 * given.dtype.itemsize * logits / given.terabytes / 1e9
    return {"products_ms": products, "rows_ms": rows, "floor_ms": max(products, rows)}


def measure(given: argparse.Namespace) -> dict[str, Any]:
    """Times and memory of all forms."""
    forms = forms_of(given)
    rows = [fresh(form, given, given.tokens) for form in forms]
    rows += [fresh("triton" if given.cuda else "torch", given, tokens) for tokens in given.memory_tokens]
    found = {
        "device": given.device, "threads": torch.get_num_threads(),
        "dtype": str(given.dtype).removeprefix("torch."), "tokens": given.tokens, "vocabulary": given.vocabulary,
        "width": given.width, "temperature": given.temperature, "top_k": given.top_k, "rounds": given.rounds,
        "time": times(given, forms), "memory": rows, "floor": floor(given) if given.cuda else None,
    }  # fmt: skip
    for row in rows:
        time_of = found["time"].get(row["form"], {}) if row["tokens"] == given.tokens else {}
        peak = f"{row['peak_bytes'] / 1e9:8.3f} GB" if "peak_bytes" in row else row["error"]
        spent = f"{1000 * time_of['median']:10.1f} ms" if "median" in time_of else f"{'-':>13}"
        speed = f"{time_of['speed']:6.2f}x the definition's speed" if time_of.get("speed") else ""
        say(f"{row['form']:<8} {row['tokens']:>7} tokens {spent} {peak} {speed}")
    if given.cuda:
        say(f"floor {found['floor']['floor_ms']:.1f} ms")
    return found


def main(words: list[str] | None = None) -> None:
    """Measures, prints, and writes the record where one is asked for."""
    given = arguments(words)
    if given.memory_of:
        print(json.dumps(memory(given.memory_of, given)))
    else:
        run_script(__doc__, given, measure)


if __name__ == "__main__":
    main()
