"""`halobench teacher`: how the embedded teacher was made, and how to make its sisters."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Annotated

import typer

from halobench.cli import options

app = typer.Typer(help="Train the embedded teacher, or a sister of it.", no_args_is_help=True, rich_markup_mode=None)


@app.callback()
def _group() -> None:
    """Train the embedded teacher, or a sister of it."""


@app.command()
def train(
    data: Annotated[
        str, typer.Option(help="Text: a file, a folder, or a pattern such as text/*.train.jsonl.gz.")
    ] = "sample",
    out: options.Out = Path("runs/teacher"),
    recipe: Annotated[
        Path | None, typer.Option(help="A YAML file; by default the one the shipped teacher used.")
    ] = None,
    seed: Annotated[int | None, typer.Option(help="Another seed: a sister of the shipped teacher.")] = None,
    processes: Annotated[int, typer.Option(help="Processes that share each batch, one thread each.")] = 1,
) -> None:
    """Train a small decoder that models English and retrieves. Resumes what it began."""
    if processes > 1 and "WORLD_SIZE" not in os.environ:
        raise typer.Exit(_spread(processes))
    from dataclasses import replace
    from importlib.resources import files

    from halobench.teacher import load_recipe, train

    path = recipe or Path(str(files("halobench").joinpath("recipes", "teacher-tiny.yaml")))
    chosen = load_recipe(path)
    train(chosen if seed is None else replace(chosen, seed=seed), data, out)


def _spread(processes: int) -> int:
    """Starts this same command in several processes."""
    environment = {
        **os.environ,
        "OMP_NUM_THREADS": "1",
        "OMP_WAIT_POLICY": "passive",
        "TOKENIZERS_PARALLELISM": "false",
    }
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(processes)]
    return subprocess.run([*launcher, "-m", "halobench", *sys.argv[1:]], env=environment, check=False).returncode
