"""`halobench eval`: commonsense, needles and perplexity of one or more models."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer

from halobench.cli import options


def evaluate(
    models: Annotated[list[str], typer.Argument(help="Model folders, runs, hub names, or `tiny`.")],
    out: options.Out = Path("runs/eval"),
    suite: Annotated[
        str, typer.Option(help="Comma-separated: csr, niah, ppl, or lm:TASK for a task of lm-eval.")
    ] = "csr,niah,ppl",
    lengths: Annotated[str, typer.Option(help="Context lengths of the needles: 512,1k,2k.")] = "512,1k,2k,4k,8k",
    limit: Annotated[int | None, typer.Option(help="Samples per task and length.")] = None,
    data_dir: Annotated[Path | None, typer.Option(help="A folder of local task files, in place of the hub.")] = None,
    seed: Annotated[int, typer.Option(help="Of the samples.")] = 0,
    device: options.Device = None,
    as_json: options.Json = False,
) -> None:
    """Evaluate models on the same samples, one record each. Finished suites are not run again."""
    from halobench.config import to_dict
    from halobench.evaluation import EvalRequest, evaluate_model
    from halobench.units import parse_lengths

    request = EvalRequest(
        suites=tuple(suite.split(",")), lengths=tuple(parse_lengths(lengths)), limit=limit, data_dir=data_dir, seed=seed
    )
    request.check()
    chosen = options.device_or_default(device)
    records = [evaluate_model(name, out, request, chosen) for name in models]
    if as_json:
        print(json.dumps([to_dict(record) for record in records]))
        return
    for record in records:
        print(record.model.name)
        for m in record.metrics:
            where = f" @{m.length}" if m.length else ""
            error = f" ±{m.stderr:.4f}" if m.stderr is not None else ""
            print(f"  {m.suite + '/' + m.task + where:<34} {m.metric:<16} {m.value:.4f}{error}  n={m.n}")
