"""Measures the bridge against plain lm-eval HFLM on the same requests: python benchmarks/bridge.py [-o RECORD.json]

Both answer the requests that lm-eval itself builds, tokenising included, in turns in one process and in float32. The
ratio of a task is the median over the rounds of (HFLM's seconds / the bridge's); above 1 the bridge is faster. Answers
are compared as well: the largest difference of two log-likelihoods, and how many answers that were greedy are not, or
generated texts that differ. A table goes to stderr, one line of JSON to stdout.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time
from pathlib import Path
from typing import Any

from halobench.benchmarking import recorded
from halobench.files import write_json
from halobench.models import default_device, load, resolve
from halobench.progress import say
from halobench.provenance import model_hash
from halobench.tasks.lm_eval_bridge import quiet
from halobench.tasks.lm_eval_tasks import OFFLINE_TASK, local_task, offline_task
from halobench.tasks.scoring import evaluating
from halobench.tasks.statistics import Z95, median_stderr

LOCAL = ("hellaswag", "arc_easy", "arc_challenge", "piqa", "winogrande", "lambada_openai", "boolq", "commonsense_qa")


def arguments() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="tiny")
    parser.add_argument("--data-dir", type=Path, help=f"folder with eval/*.jsonl.gz; without it {OFFLINE_TASK} only")
    parser.add_argument("--tasks", help="comma-separated names of local tasks")
    parser.add_argument("--limit", type=int, default=48, help="items of each task")
    parser.add_argument("--batch-size", type=int, default=16)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("-o", "--output", type=Path)
    return parser.parse_args()


def compare(given: list[Any], forms: dict[str, Any], rounds: int) -> dict[str, Any]:
    """Seconds of both forms on requests of one kind, in turns, and how far their answers are apart."""
    kind = given[0].request_type
    seconds: dict[str, list[float]] = {name: [] for name in forms}
    answers = {name: getattr(lm, kind)(given, disable_tqdm=True) for name, lm in forms.items()}
    for turn in range(rounds):
        for name in list(forms)[:: 1 if turn % 2 == 0 else -1]:
            start = time.perf_counter()
            getattr(forms[name], kind)(given, disable_tqdm=True)
            seconds[name].append(time.perf_counter() - start)
    pairs = list(zip(answers["hflm"], answers["bridge"], strict=True))
    ratio, stderr = median_stderr([a / b for a, b in zip(seconds["hflm"], seconds["bridge"], strict=True)])
    return {
        "requests": len(given),
        "seconds": {name: statistics.median(values) for name, values in seconds.items()},
        "requests_per_second": {name: len(given) / statistics.median(values) for name, values in seconds.items()},
        "ratio": ratio,
        "ratio_interval": [ratio - Z95 * (stderr or 0.0), ratio + Z95 * (stderr or 0.0)],
        "largest_difference": max((abs(a[0] - b[0]) for a, b in pairs if isinstance(a, tuple)), default=0.0),
        "answers_that_differ": sum((a[1] != b[1]) if isinstance(a, tuple) else a != b for a, b in pairs),
    }


def measure(given: argparse.Namespace) -> dict[str, Any]:
    """A row for each task, and the tokens that sharing contexts left unread."""
    import torch
    from lm_eval.models.huggingface import HFLM

    from halobench.tasks.lm_eval_model import BridgeLM

    model, tokenizer = load(given.model, device=default_device(), dtype=torch.float32)
    names = given.tasks.split(",") if given.tasks else list(LOCAL) if given.data_dir else []
    tasks = dict([local_task(name, given.data_dir) for name in names] or [offline_task(0)])
    rows = {}
    for task, source in tasks.items():
        task.set_config(key="num_fewshot", value=0)
        task.build_all_requests(limit=given.limit, rank=0, world_size=1)
        bridge = BridgeLM(model, tokenizer, batch_size=given.batch_size)
        plain = HFLM(pretrained=model, tokenizer=tokenizer, backend="causal", batch_size=given.batch_size)
        with evaluating(model):
            row = compare(task.instances, {"hflm": plain, "bridge": bridge}, given.rounds)
        work = bridge.work
        row |= {"tokens_ratio": work.tokens_plain / max(1, work.tokens), "shared": work.shared > 0}
        rows[source.task] = row
        low, high = row["ratio_interval"]
        say(
            f"{source.task:<18} {row['requests']:>5} requests  HFLM {row['seconds']['hflm']:7.2f} s  bridge "
            f"{row['seconds']['bridge']:7.2f} s  ratio {row['ratio']:5.2f} [{low:.2f}, {high:.2f}]  tokens "
            f"{row['tokens_ratio']:4.2f}x fewer  difference {row['largest_difference']:.1e}"
        )
    totals = {form: sum(row["seconds"][form] for row in rows.values()) for form in ("hflm", "bridge")}
    return {
        "model": given.model, "model_hash": model_hash(Path(resolve(given.model))), "limit": given.limit,
        "batch_size": given.batch_size, "rounds": given.rounds, "tasks": rows,
        "ratio_of_totals": totals["hflm"] / totals["bridge"],
    }  # fmt: skip


def main() -> None:
    """Measures, prints, and writes the record where one is asked for."""
    given = arguments()
    with quiet():
        found = measure(given)
    if given.output is not None:
        write_json(given.output, recorded(__doc__, found))
    json.dump(found, sys.stdout)
    print()


if __name__ == "__main__":
    main()
