"""The speed tables of the README, from the records that the benchmark scripts left."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from halobench.reports.footnotes import machine
from halobench.reports.table import MISSING, Markup, escape, render, significant
from halobench.units import format_bytes, format_length

Record = Mapping[str, Any]
# The script of each kind of record and what it measures; records are benchmarks/KIND-DEVICE.json.
KINDS = {
    "operators": "Lightning Attention against softmax attention",
    "prefill": "reading a prompt, teacher against hybrid",
    "decode": "a token behind a long context, teacher against hybrid",
    "training": "tokens a second of stages 1 and 2",
    "loss": "KL of whole vocabularies from hidden states",
}
DEVICES = {"cpu": "a CPU", "cuda": "a GPU"}
_NAMES = {"sdpa": "softmax (SDPA)", "torch": "Lightning, torch", "triton": "Lightning, Triton", "fla": "Lightning, fla"}


def speed(records: Mapping[tuple[str, str], Record]) -> str:
    """A passage for each record, by (kind, device), and what is not measured."""
    passages: dict[str, Callable[[Record], str]] = {
        "operators": _operators, "prefill": _prefill, "decode": _decode, "training": _training, "loss": _loss,
    }  # fmt: skip
    parts = [passages[kind](records[kind, device]) for device in DEVICES for kind in KINDS if (kind, device) in records]
    for device, name in DEVICES.items():
        missing = [f"{what} (`benchmarks/{kind}.py`)" for kind, what in KINDS.items() if (kind, device) not in records]
        if missing:
            parts.append(f"Unmeasured on {name}, for want of a record made on one: {', '.join(missing)}.")
    return "\n\n".join(parts)


def _where(record: Record) -> str:
    """The machine and the versions behind a table."""
    hardware, versions = record["environment"]["hardware"], record["environment"]["versions"]
    used = [f"{name} {versions[name]}" for name in ("torch", "triton", "flash-linear-attention") if name in versions]
    return f"{escape(machine(hardware, record['device']))}; {escape(', '.join(used))}; `{escape(record['command'])}`"


def _milliseconds(timed: Mapping[str, Any] | None) -> Markup:
    if timed is None:
        return Markup(MISSING)
    return escape(timed["error"]) if "error" in timed else significant(1e3 * timed["median"])


def _times(value: float | None) -> Markup:
    return Markup(MISSING) if value is None else Markup(f"{significant(value)}x")


def _pair(record: Record) -> str:
    """Teacher and hybrid by name."""
    made = record["hybrid"] == "made from the teacher"
    return f"{escape(record['teacher'])} against {'a hybrid made from it' if made else escape(record['hybrid'])}"


def _operators(record: Record) -> str:
    rows, ours = record["rows"], record["ours"]
    forms = [name for name in _NAMES if any(name in row["forward"] for row in rows)]
    cells = []
    for row in rows:
        forward = row["forward"]
        seconds = forward[ours].get("median")
        over_floor = None if seconds is None else seconds / row["floor"]
        cells.append(
            [
                format_length(row["length"]), *[_milliseconds(forward.get(name)) for name in forms],
                _times(row["sdpa over ours"]), _times(row["sdpa over ours with gradients"]), _times(over_floor),
            ]
        )  # fmt: skip
    header = [
        "tokens", *[f"{_NAMES[name]}, ms" for name in forms], "softmax over Lightning", "with gradients", "over floor",
    ]  # fmt: skip
    shape = f"{record['heads']} heads x {record['size']}, batch {record['batch']}, {record['dtype']}"
    text = f"One layer's operator, {shape}, forward; `auto` is {ours} here. {_where(record)}."
    linear = record["linear"]
    if linear is not None:
        span = f"{format_length(linear['from'])} to {format_length(linear['to'])}"
        strays = f"{linear['largest deviation']:.0%}"
        text += f" From {span} tokens the time of a token strays from its mean by {strays} at most (fastest rounds)."
    return f"{render(header, cells)}\n\n{text}"


def _prefill(record: Record) -> str:
    names = ("teacher", "teacher, our attention", "hybrid")
    cells = [
        [
            format_length(row["length"]), *[_milliseconds(row["seconds"].get(name)) for name in names],
            _times(row["teacher over hybrid"]),
        ]
        for row in record["rows"]
    ]  # fmt: skip
    text = (
        f"Reading a prompt: {_pair(record)}, {record['keep']} of {record['layers']} layers softmax, batch 1, "
        f"{escape(record['dtype'])}. {_where(record)}."
    )
    return f"{render(['tokens', *(f'{name}, ms' for name in names), 'faster teacher over hybrid'], cells)}\n\n{text}"


def _decode(record: Record) -> str:
    names = ("teacher", "hybrid", "teacher, generate", "hybrid, generate")
    cells = [
        [
            format_length(row["context"]), *[_milliseconds(row["seconds"].get(name)) for name in names],
            *[significant(1e3 * row["floor"][name]) for name in names[:2]], _times(row["teacher over hybrid"]),
            MISSING if row["of the bytes"] is None else significant(row["of the bytes"]),
        ]
        for row in record["rows"]
    ]  # fmt: skip
    header = [
        "context", "teacher, ms", "hybrid, ms", "teacher by generate(), ms", "hybrid by generate(), ms",
        "teacher's floor, ms", "hybrid's floor, ms", "teacher over hybrid", "of what its bytes promise",
    ]  # fmt: skip
    forms = record["rows"][-1]["backends"].get("hybrid", {})
    ran = "; ".join("{}: {}".format(part, form.partition(" (")[0]) for part, form in forms.items())
    text = (
        f"One decode step behind a context of random keys and values: {_pair(record)}, {record['keep']} of "
        f"{record['layers']} layers softmax, batch {record['batch']}, {escape(record['dtype'])}, on the decode engine "
        f"({escape(ran)}). Of what its bytes promise: the speed-up over the ratio of key and value bytes. "
        f"{_where(record)}."
    )
    return f"{render(header, cells)}\n\n{text}"


def _loss(record: Record) -> str:
    cells = []
    for form, timed in record["time"].items():
        memory: Record = next(
            (m for m in record["memory"] if m["form"] == form and m["tokens"] == record["tokens"]), {}
        )
        peak = format_bytes(memory["peak_bytes"]) if "peak_bytes" in memory else memory.get("error", MISSING)
        cells.append([form, _milliseconds(timed), _times(timed["speed"]), peak])
    longer = [m for m in record["memory"] if m["tokens"] != record["tokens"] and "peak_bytes" in m]
    text = (
        f"KL and its gradients from hidden states, {record['tokens']:,} tokens x {record['vocabulary']:,} x "
        f"{record['width']:,}, {escape(record['dtype'])}; `naive` is the definition on whole logits, memory the peak "
        "above the weights."
    )
    for row in longer:
        text += f" With {row['tokens']:,} tokens `{row['form']}` takes {format_bytes(row['peak_bytes'])}."
    header = ["form", "ms", "speed over the definition", "memory"]
    return f"{render(header, cells)}\n\n{text} {_where(record)}."


def _training(record: Record) -> str:
    forms = list(dict.fromkeys(form for row in record["rows"] for form in row["tokens a second"]))
    cells = []
    for row in record["rows"]:
        speeds = [row["tokens a second"].get(form) for form in forms]
        cells.append([row["stage"], f"{row['parameters'] / 1e6:.2f}M", *[significant(speed) for speed in speeds]])
    header = ["stage", "parameters that train", *[f"tokens/s, {form}" for form in forms]]
    text = (
        f"Training on {escape(record['teacher'])}: {record['batch']} sequences of {record['length']} tokens a step, "
        f"{escape(record['mixer'])}, {record['keep']} of {record['layers']} layers softmax in stage 2. "
        f"{_where(record)}."
    )
    return f"{render(header, cells)}\n\n{text}"
