"""`halobench demo`: the whole story on the embedded teacher."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from halobench.cli import options


def demo(
    out: options.Out = Path("runs/demo"),
    recipe: options.Recipe = "halo-tiny",
    workers: Annotated[int | None, typer.Option(help="Conversions side by side; one per core by default.")] = None,
    set_: options.Sets = None,
) -> None:
    """Convert `tiny` with four ways to choose layers, evaluate all beside the teacher, profile, and report."""
    from halobench.demo import run_demo
    from halobench.recipe import load_recipe

    run_demo(out, load_recipe(recipe, set_ or []), workers)
