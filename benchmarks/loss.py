"""Measures the KL loss from hidden states on this machine: python benchmarks/loss.py

Writes benchmarks/loss.json: peak memory at 16K tokens and a vocabulary of 151,936, and time against the loss by its
definition where that fits. `python benchmarks/loss.py FORM TOKENS VOCABULARY WIDTH` takes one measurement of memory and
prints it as JSON.

Memory is the peak of a fresh process above what it held with Python, torch and the two unembeddings (the weights) in
place. So it counts the hidden states of both models, the gradients of the student's hidden states and of its
unembedding in fp32, every logit and every temporary. The kernel's high-water mark of the process (VmHWM) is what
getrusage gives as ru_maxrss, without the parent's share that ru_maxrss inherits.
"""

from __future__ import annotations

import json
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from halobench.files import write_json
from halobench.kernels.chunked_loss import chunked_loss, forward_kl, naive, tokens_per_chunk
from halobench.kernels.chunked_loss.chunked import LIVE_BYTES
from halobench.kernels.chunked_loss.rows import BLOCK_BYTES
from halobench.provenance import command_line, environment, now

RECORD = Path(__file__).resolve().with_suffix(".json")
TARGET = 1_500_000_000
FULL = (16_384, 151_936)  # tokens, vocabulary: the case the target is about
FITTING = (1024, 151_936, 64)  # where the definition fits as well, for times


def bound(tokens: int, vocabulary: int, width: int) -> int:
    """Bytes above the weights that the loss may take: logits, unembedding gradients, hidden states, temporaries."""
    logits = min(LIVE_BYTES, 4 * 5 * tokens * vocabulary)
    return logits + 3 * 4 * vocabulary * width + 4 * 4 * tokens * width + 8 * BLOCK_BYTES


def loss_of(form: str, tokens: int, head: torch.nn.Parameter, teacher_head: torch.Tensor) -> Callable[[], float]:
    """A call that takes the loss of new hidden states, and its gradients."""
    width = head.shape[1]

    def run() -> float:
        torch.manual_seed(0)
        hidden, target = torch.randn(tokens, width).requires_grad_(), torch.randn(tokens, width)
        ones = torch.ones(tokens)

        def piece(part_hidden: torch.Tensor, part: slice) -> torch.Tensor:
            return forward_kl(part_hidden @ head.T, target[part] @ teacher_head.T, ones[part])

        if form == "chunked":
            loss = chunked_loss(piece, hidden, [head])
        else:
            loss = naive.forward_kl(hidden @ head.T, target @ teacher_head.T, ones)
        loss.backward()
        head.grad = None
        return loss.item()

    return run


def weights(vocabulary: int, width: int) -> tuple[torch.nn.Parameter, torch.Tensor]:
    """The student's unembedding, which trains, and the teacher's."""
    torch.manual_seed(1)
    return torch.nn.Parameter(torch.randn(vocabulary, width).mul_(0.1)), torch.randn(vocabulary, width).mul_(0.1)


def memory(form: str, tokens: int, vocabulary: int, width: int) -> dict[str, Any]:
    """Peak bytes above the weights, in this process: to be called in a fresh one.

    whole_logits_bytes: of the student's logits, the teacher's and a gradient in fp32, which no form without chunks can
    do without.
    """
    loss_of(form, 8, *weights(64, 8))()  # what libraries allocate once is not the loss's
    head, teacher_head = weights(vocabulary, width)
    before = _status("VmRSS")
    start = time.perf_counter()
    loss = loss_of(form, tokens, head, teacher_head)()
    return {
        "form": form, "tokens": tokens, "vocabulary": vocabulary, "width": width, "chunk": tokens_per_chunk(vocabulary),
        "peak_bytes": _status("VmHWM") - before, "bound_bytes": bound(tokens, vocabulary, width),
        "whole_logits_bytes": 3 * 4 * tokens * vocabulary, "seconds": time.perf_counter() - start,
        "nats_per_token": loss / tokens,
    }  # fmt: skip


def _status(field: str) -> int:
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(f"{field}:"):
            return int(line.split()[1]) * 1024
    raise RuntimeError(f"/proc/self/status has no {field}")


def fresh(form: str, tokens: int, vocabulary: int, width: int) -> dict[str, Any]:
    """`memory` in a process of its own."""
    command = [sys.executable, __file__, form, *map(str, (tokens, vocabulary, width))]
    return json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout)


def times(repeats: int = 5) -> dict[str, Any]:
    """Median seconds of both forms, forward and backward, in turns in this process."""
    tokens, vocabulary, width = FITTING
    heads = weights(vocabulary, width)
    forms = {form: loss_of(form, tokens, *heads) for form in ("chunked", "naive")}
    found: dict[str, list[float]] = {form: [] for form in forms}
    values = {form: run() for form, run in forms.items()}
    for _ in range(repeats):
        for form, run in forms.items():
            start = time.perf_counter()
            run()
            found[form].append(time.perf_counter() - start)
    rows = {
        form: {"median": statistics.median(x), "min": min(x), "max": max(x), "n": len(x)} for form, x in found.items()
    }
    return {
        "tokens": tokens, "vocabulary": vocabulary, "width": width, "threads": torch.get_num_threads(), **rows,
        "naive over chunked": rows["naive"]["median"] / rows["chunked"]["median"],
        "relative difference of the losses": abs(values["naive"] - values["chunked"]) / values["naive"],
    }  # fmt: skip


def main() -> None:
    """Measures everything and writes the record."""
    rows = []
    for case in (("chunked", *FULL, 64), ("chunked", *FULL, 128), ("chunked", *FITTING), ("naive", *FITTING)):
        rows.append(fresh(*case))
        print(case, f"{rows[-1]['peak_bytes'] / 1e9:.3f} GB, {rows[-1]['seconds']:.1f} s")
    timed = times()
    print(f"naive over chunked: {timed['naive over chunked']:.2f}")
    facts = {"what": __doc__, "command": command_line(), "created": now(), "environment": environment()}
    write_json(RECORD, {**facts, "target_bytes": TARGET, "dtype": "float32", "memory": rows, "time": timed})


if __name__ == "__main__":
    if len(sys.argv) == 5:
        print(json.dumps(memory(sys.argv[1], *map(int, sys.argv[2:]))))
    elif len(sys.argv) == 1:
        main()
    else:
        raise SystemExit("usage: python benchmarks/loss.py [FORM TOKENS VOCABULARY WIDTH]")
