"""`halobench plan`: what a conversion would do, without weights and without work."""

from __future__ import annotations

import json
from typing import Annotated

import typer

from halobench.cli import options


def plan(
    teacher: Annotated[
        str, typer.Argument(help="A model folder, a hub name, `tiny`, or a shape such as qwen3-1.7b.")
    ] = "tiny",
    recipe: options.Recipe = "halo-tiny",
    keep: options.Keep = None,
    layers: options.Layers = None,
    lengths: Annotated[str, typer.Option(help="Context lengths for the memory table.")] = "4k,32k,128k,512k,1m",
    set_: options.Sets = None,
    as_json: options.Json = False,
) -> None:
    """Dry run: the layer table, parameters, state and KV bytes by length, tokens and rough hours."""
    from halobench.planning import draw_up
    from halobench.recipe import load_recipe
    from halobench.units import format_bytes, format_count, format_length, parse_lengths

    chosen = load_recipe(recipe, [*(set_ or []), *options.keep_override(keep)])
    drawn = draw_up(teacher, chosen, options.parse_layers(layers), parse_lengths(lengths))
    if as_json:
        print(json.dumps(drawn.to_json()))
        return
    from rich.console import Console
    from rich.table import Table

    console = Console()
    table = Table("layer", "becomes", "parameters", "copied", "new", title=f"{teacher}, recipe {chosen.name}")
    for row in drawn.layers:
        table.add_row(
            str(row.layer), row.becomes, format_count(row.parameters), format_count(row.copied), format_count(row.new)
        )
    console.print(table)
    memory = Table("context", "teacher KV", "hybrid KV", "hybrid state", "ratio", title="cache bytes, batch 1, bf16")
    for m in drawn.memory:
        ratio = m.teacher / max(m.kv + m.state, 1)
        memory.add_row(
            format_length(m.length), format_bytes(m.teacher), format_bytes(m.kv), format_bytes(m.state), f"{ratio:.1f}x"
        )
    console.print(memory)
    if not drawn.chosen:
        print("kept layers shown are evenly spaced: the selector of the recipe decides after alignment")
    print(
        f"parameters: teacher {format_count(drawn.teacher_parameters)}, hybrid {format_count(drawn.hybrid_parameters)}"
    )
    for stage, tokens, hours in drawn.stages:
        print(
            f"{stage:>9}: {format_count(tokens)} tokens, about {hours:.2g} h on one H200 at 300 TFLOP/s (an estimate)"
        )
