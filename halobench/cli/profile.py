"""`halobench profile`: speed and memory over context, models side by side."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer

from halobench.cli import options


def profile(
    models: Annotated[list[str], typer.Argument(help="Model folders, runs, hub names, or `tiny`.")],
    context: Annotated[str, typer.Option(help="Context lengths: 512,8k.")] = "512,8k",
    out: options.Out = Path("runs/profile"),
    device: options.Device = None,
    as_json: options.Json = False,
) -> None:
    """Prefill tokens/s, time per output token, cache bytes, peak memory; several models take turns in one process."""
    from halobench.config import to_dict
    from halobench.evaluation import profile_models
    from halobench.units import parse_lengths

    records = profile_models(models, parse_lengths(context), out, options.device_or_default(device))
    if as_json:
        print(json.dumps([to_dict(record) for record in records]))
        return
    for record in records:
        print(record.model.name)
        for m in record.metrics:
            print(
                f"  {m.task:<24} @{m.length:<8} {m.value:.6g}" + (f" ±{m.stderr:.3g}" if m.stderr is not None else "")
            )
