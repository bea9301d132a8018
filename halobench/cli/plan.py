"""`halobench plan`: what a conversion would do, without weights and without work."""

from __future__ import annotations

import json
import sys
from itertools import groupby
from typing import TYPE_CHECKING, Annotated

import typer

from halobench.cli import options

if TYPE_CHECKING:
    from rich.console import Console

    from halobench.planning import Drawn

WIDTH = 100  # of the tables where there is no terminal to ask


def plan(
    teacher: Annotated[
        str, typer.Argument(help="A model folder, a config.json, a hub name, `tiny`, or a shape such as qwen3-8b.")
    ] = "tiny",
    recipe: options.Recipe = "halo-tiny",
    mixer: options.Mixer = None,
    keep: options.Keep = None,
    layers: options.Layers = None,
    budget: Annotated[
        str | None, typer.Option(help="Keep as many softmax layers as this cache allows: kv=4GB@128k (batch 1, bf16).")
    ] = None,
    lengths: Annotated[str, typer.Option(help="Context lengths of the memory and FLOPs tables.")] = (
        "4k,32k,128k,512k,1m"
    ),
    set_: options.Sets = None,
    as_json: options.Json = False,
) -> None:
    """Dry run: layers, what is copied and new, parameters, state and KV bytes, FLOPs, tokens and rough hours."""
    from halobench.budget import parse_budget
    from halobench.errors import UserError
    from halobench.mixers import MIXERS
    from halobench.planning import draw_up
    from halobench.recipe import load_recipe
    from halobench.units import parse_lengths

    named = {"--layers": layers, "--keep": keep, "--budget": budget}
    both = [option for option, value in named.items() if value is not None]
    if len(both) > 1:
        raise UserError(f"{' and '.join(both)} each say which layers stay softmax attention; give one of them")
    given, room = options.parse_layers(layers), None if budget is None else parse_budget(budget)
    chosen = load_recipe(recipe, [*(set_ or []), *options.keep_override(keep), *options.mixer_override(mixer)])
    MIXERS.get(chosen.mixer)
    drawn = draw_up(teacher, chosen, given, parse_lengths(lengths), room)
    if as_json:
        print(json.dumps(drawn.to_json()))
        return
    _show(drawn)


def _show(drawn: Drawn) -> None:
    from rich.console import Console

    width = None if sys.stdout.isatty() else WIDTH
    console = Console(width=width, markup=False, highlight=False, emoji=False)
    _show_layers(drawn, console)
    _show_parts(drawn, console)
    _show_lengths(drawn, console)
    _show_stages(drawn, console)


def _show_layers(drawn: Drawn, console: Console) -> None:
    """Neighbours that are alike share a line, with the numbers of one of them."""
    from rich.table import Table

    from halobench.units import format_count

    kept = f"{len(drawn.kept)} of {len(drawn.layers)} layers stay attention, the others become {drawn.mixer}"
    console.print(f"{drawn.teacher} by recipe {drawn.recipe}: {kept}")
    table = Table("layers", "the teacher's attention", "becomes")
    for name in ("parameters each", "copied", "new"):
        table.add_column(name, justify="right")
    for alike, rows in groupby(drawn.layers, key=lambda r: (r.attention, r.becomes, r.parameters, r.copied, r.new)):
        run = [row.layer for row in rows]
        attention, becomes, *numbers = alike
        where = str(run[0]) if len(run) == 1 else f"{run[0]}-{run[-1]}"
        table.add_row(where, attention, becomes, *map(format_count, numbers))
    console.print(table)
    if not drawn.chosen:
        console.print("kept layers are shown evenly spaced: the recipe's selector decides after alignment")


def _show_parts(drawn: Drawn, console: Console) -> None:
    from halobench.units import format_count

    for kind in drawn.mixers:
        console.print(f"{kind.mixer}: {kind.label}, {len(kind.layers)} layers")
        console.print(f"  copied: {', '.join(kind.copied) or 'nothing'}")
        console.print(f"     new: {', '.join(kind.new) or 'nothing'}")
    console.print("everything else (embeddings, MLPs, norms) is the teacher's, unchanged")
    for name, whole, active in (
        ("teacher", drawn.teacher_parameters, drawn.teacher_active),
        ("hybrid", drawn.hybrid_parameters, drawn.hybrid_active),
    ):
        console.print(f"{name:>8}: {format_count(whole)} parameters, {format_count(active)} multiply each token")


def _show_lengths(drawn: Drawn, console: Console) -> None:
    from rich.table import Table

    from halobench.units import format_bytes, format_flops, format_length

    memory = Table(title="cache bytes, batch 1, bf16", title_justify="left")
    flops = Table(title="floating-point operations", title_justify="left")
    for table, columns in (
        (memory, ("context", "teacher KV", "hybrid KV", "hybrid state", "hybrid in all", "ratio")),
        (flops, ("context", "teacher, next token", "hybrid", "ratio", "teacher, whole prompt", "hybrid", "ratio")),
    ):
        for name in columns:
            table.add_column(name, justify="right")
    for m in drawn.memory:
        whole = m.kv + m.state
        sizes = [format_bytes(size) for size in (m.teacher, m.kv, m.state, whole)]
        memory.add_row(format_length(m.length), *sizes, f"{m.teacher / max(whole, 1):.1f}x")
    for f in drawn.flops:
        cells = []
        for teacher, hybrid in ((f.teacher_token, f.hybrid_token), (f.teacher_prompt, f.hybrid_prompt)):
            cells += [format_flops(teacher), format_flops(hybrid), f"{teacher / hybrid:.1f}x"]
        flops.add_row(format_length(f.length), *cells)
    console.print(memory)
    if drawn.budget is not None:
        for line in drawn.budget.lines():
            console.print(line)
    console.print(flops)


def _time(hours: float) -> str:
    from halobench.units import format_seconds

    return f"{hours:.2g} h" if hours >= 1 else f"{3600 * hours:.2g} s" if hours < 0.01 else format_seconds(3600 * hours)


def _show_stages(drawn: Drawn, console: Console) -> None:
    from halobench.units import format_count

    for row in drawn.stages:
        console.print(f"{row.stage:>9}: {format_count(row.tokens)} tokens, about {_time(row.hours)}")
    console.print(f"   tokens: {drawn.tokens}")
    console.print(f"hours: {drawn.assumption}")
