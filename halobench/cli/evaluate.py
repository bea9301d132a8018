"""`halobench eval`: commonsense, recall, needles, RULER and perplexity of one or more models."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from halobench.cli import options

if TYPE_CHECKING:
    from halobench.records import RunRecord


def evaluate(
    models: Annotated[list[str], typer.Argument(help="Model folders, runs, hub names, or `tiny`.")],
    out: options.Out = Path("runs/eval"),
    suite: Annotated[
        str,
        typer.Option(
            help="Comma-separated: csr, csr-small, continuation, recall, niah, kv, grid, ruler, ruler:TASK, ppl, or "
            "lm:TASK for a task of lm-eval."
        ),
    ] = "csr,niah,ppl",
    lengths: Annotated[str, typer.Option(help="Context lengths: 512,4k,32k.")] = "512,1k,2k,4k,8k",
    limit: Annotated[int | None, typer.Option(help="Samples per task and length, at most.")] = None,
    precision: Annotated[
        float | None, typer.Option(help="Stop a task once its 95% interval is narrower to each side, e.g. 0.05.")
    ] = None,
    data_dir: Annotated[Path | None, typer.Option(help="A folder of local task files, in place of the hub.")] = None,
    seed: Annotated[int, typer.Option(help="Of the samples.")] = 0,
    device: options.Device = None,
    kernels: options.Kernels = "auto",
    yes: Annotated[bool, typer.Option("--yes", help="Go on although it will take more than an hour.")] = False,
    estimate: Annotated[bool, typer.Option("--estimate", help="Tell tokens and time, and do nothing else.")] = False,
    as_json: options.Json = False,
) -> None:
    """Evaluate models on the same samples, one record each. What an earlier run has finished is not done again."""
    from halobench.config import to_dict
    from halobench.evaluation import EvalRequest, estimate_models, evaluate_models
    from halobench.units import parse_lengths

    chosen = options.device_or_default(device)
    request = EvalRequest(
        suites=tuple(name.strip() for name in suite.split(",")), lengths=tuple(parse_lengths(lengths)),
        limit=limit, data_dir=data_dir, seed=seed, precision=precision, kernels=options.kernels_for(kernels, chosen),
    )  # fmt: skip
    request.check()
    if estimate:
        estimates = estimate_models(models, out, request, chosen)
        if as_json:
            print(json.dumps([to_dict(e) | {"tokens": e.tokens, "seconds": round(e.seconds, 1)} for e in estimates]))
        return
    records = evaluate_models(models, out, request, chosen, yes=yes)
    if as_json:
        print(json.dumps([to_dict(record) for record in records]))
    else:
        for record in records:
            _show(record)
    if any(record.status == "error" for record in records):
        raise typer.Exit(1)


def _show(record: RunRecord) -> None:
    """Prints a record's numbers, and says what went wrong."""
    from halobench.progress import say

    print(record.model.name)
    for m in record.metrics:
        where = f" @{m.length}" if m.length else ""
        error = f" ±{m.stderr:.4f}" if m.stderr is not None else ""
        print(f"  {m.suite + '/' + m.task + where:<34} {m.metric:<16} {m.value:.4f}{error}  n={m.n}")
    for row in record.details.get("failed", []):
        where = f" @{row['length']}" if row["length"] else ""
        print(f"  {row['suite'] + '/' + row['task'] + where:<34} {row['error']}")
    if record.error:
        say(f"{record.model.name}: {record.error}")
