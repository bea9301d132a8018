"""`halobench profile`: speed and memory over context and batch, with the machine's floor beside each number."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from halobench.cli import options

if TYPE_CHECKING:
    from rich.console import Console

    from halobench.records import RunRecord

WIDTH = 120  # of the tables where there is no terminal to ask
COLUMNS = (
    "context", "batch", "prefill tokens/s", "TTFT ms", "x floor", "TPOT ms", "x floor", "tokens/s", "cache", "peak",
    "in theory",
)  # fmt: skip


def profile(
    models: Annotated[
        list[str],
        typer.Argument(
            help="Model folders, runs, hub names, `tiny`, or preset:SHAPE for random weights: the shapes of `plan` and "
            "hypenet-2b, hypenet-5b, hypenet-9b."
        ),
    ],
    context: Annotated[str, typer.Option(help="Context lengths: 512,8k.")] = "512,8k",
    batch: Annotated[str, typer.Option(help="Sequences at a time: 1,4.")] = "1",
    vs: Annotated[
        str | None, typer.Option(help="Measure in turns with this model, and tell where it is overtaken.")
    ] = None,
    dtype: Annotated[str | None, typer.Option(help="bf16, fp16 or fp32; by default bf16 on a GPU, else fp32.")] = None,
    new_tokens: Annotated[int, typer.Option(help="Decode steps timed in each round.")] = 16,
    repeats: Annotated[int, typer.Option(help="Rounds; each prefills anew.")] = 3,
    out: options.Out = Path("runs/profile"),
    device: options.Device = None,
    kernels: options.Kernels = "auto",
    as_json: options.Json = False,
) -> None:
    """Prefill, time per output token and memory, each model in a fresh process. What -o holds is not measured again."""
    from halobench.config import to_dict
    from halobench.errors import UserError
    from halobench.profiling import ProfileRequest, profile_models
    from halobench.units import parse_lengths

    try:
        batches = tuple(sorted({int(part) for part in batch.split(",")}))
    except ValueError as error:
        raise UserError(f"--batch {batch!r} is not a list of numbers; write --batch 1,4") from error
    chosen = options.device_or_default(device)
    request = ProfileRequest(
        contexts=tuple(parse_lengths(context)), batches=batches, dtype=dtype, new_tokens=new_tokens, repeats=repeats,
        device=chosen, kernels=options.kernels_for(kernels, chosen),
    )  # fmt: skip
    records = profile_models(models, out, request, vs=vs)
    if as_json:
        print(json.dumps([to_dict(record) for record in records]))
        return
    _show(records)


def _show(records: list[RunRecord]) -> None:
    from rich.console import Console

    from halobench.units import format_flops

    width = None if sys.stdout.isatty() else WIDTH
    console = Console(width=width, markup=False, highlight=False, emoji=False)
    for record in records:
        _show_model(record, console)
    for record in records:
        _show_ratios(record, console)
    machine = records[0].details["machine"]
    rates = (
        f"{machine['bytes_per_s'] / 1e9:.1f} GB/s and {format_flops(machine['flops_per_s'])}/s in {machine['dtype']}"
    )
    console.print(f"floors: bytes and operations from the shapes, at {rates}, both measured here")
    console.print(
        "peak: weights and what was added while running; what fits into the processor's cache may beat a floor"
    )


def _show_model(record: RunRecord, console: Console) -> None:
    from rich.box import SIMPLE
    from rich.table import Table

    from halobench.units import format_bytes

    used = ", ".join(f"{name} {value}" for name, value in record.backends.items())
    weights = record.details["rows"][0]["parameter_bytes"]
    table = Table(
        title=f"{record.model.name}: {format_bytes(weights)} of weights; {used}", title_justify="left", box=SIMPLE
    )
    for name in COLUMNS:
        table.add_column(name, justify="right")
    for row in record.details["rows"]:
        table.add_row(*_cells(row))
    console.print(table)
    for row in record.details["rows"]:
        if row["error"]:
            console.print(f"  {row['context']} tokens, batch {row['batch']}: {row['error']}")
    if "random_weights" in record.details:
        console.print(f"  {record.details['random_weights']['note']}")


def _cells(row: dict[str, Any]) -> list[str]:
    from halobench.units import format_bytes, format_length

    theory = row["theory"]
    start = [format_length(row["context"]), str(row["batch"])]
    least = format_bytes(theory["peak_bytes"]) if theory else "-"
    if row["status"] != "ok":
        return [*start, "out of memory", *["-"] * 7, least]
    return [
        *start,
        _with_error(row["prefill_tokens_per_s"], row["prefill_stderr"]),
        _with_error(1000 * row["ttft_s"], None if row["ttft_stderr"] is None else 1000 * row["ttft_stderr"]),
        _times(row["ttft_over_floor"]),
        _with_error(row["tpot_ms"], row["tpot_stderr"]),
        _times(row["tpot_over_floor"]),
        f"{row['decode_tokens_per_s']:.4g}",
        format_bytes(row["cache_bytes"]),
        format_bytes(row["parameter_bytes"] + row["peak_bytes"]),
        least,
    ]


def _with_error(value: float, stderr: float | None) -> str:
    digits = max(0, 3 - len(str(int(value)))) if value >= 1 else 3
    return f"{value:,.{digits}f}" + (f" ±{stderr:,.{digits}f}" if stderr is not None else "")


def _times(factor: float | None) -> str:
    return "-" if factor is None else f"{factor:.1f}"


def _show_ratios(record: RunRecord, console: Console) -> None:
    """How much better than the model it was measured against: above 1 is better."""
    from rich.box import SIMPLE
    from rich.table import Table

    from halobench.units import format_length

    if "ratios" not in record.details:
        return
    title = (
        f"{record.model.name} against {record.details['against']}, above 1 is better (95% interval of paired rounds)"
    )
    table = Table(
        "context", "batch", "TPOT", "prefill", "cache", "memory", title=title, title_justify="left", box=SIMPLE
    )
    for row in record.details["ratios"]:
        sizes = [_times(row[name]) for name in ("cache_ratio", "memory_ratio")]
        times = [_interval(row[name]) for name in ("tpot", "prefill")]
        table.add_row(format_length(row["context"]), str(row["batch"]), *times, *sizes)
    console.print(table)
    console.print("overtakes:")
    for one in record.details["overtakes"]:
        console.print(f"  {one['line']}")


def _interval(ratio: dict[str, float | None] | None) -> str:
    if ratio is None:
        return "-"
    bounds = "" if ratio["low"] is None else f" ({ratio['low']:.2f} to {ratio['high']:.2f})"
    return f"{ratio['value']:.2f}{bounds}"
