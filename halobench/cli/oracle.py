"""`halobench oracle`: converts every set of kept layers, so that selectors can be judged against the best there is."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from halobench.cli import options

# All that shipped recipes can run; `given` needs layers.
METHODS = (
    "halo", "jet-nemotron", "nll", "kl-drop", "kl-ls", "smart", "lighttransfer", "flashmorph", "postnas", "joint",
    "even", "latter-half", "first-last",
)  # fmt: skip


def oracle(
    teacher: Annotated[str, typer.Argument(help="A model folder, a hub name, or `tiny` (embedded).")] = "tiny",
    out: options.Out = Path("runs/oracle"),
    recipe: options.Recipe = "oracle-tiny",
    keep: Annotated[int, typer.Option(help="Softmax layers of every set.")] = 2,
    method: Annotated[list[str] | None, typer.Option(help="Selector to judge; repeatable. All by default.")] = None,
    judges: Annotated[int, typer.Option(help="More seeds for chosen and leading sets.")] = 3,
    leaders: Annotated[int, typer.Option(help="Best sets of seed 0 that are judged beside the chosen ones.")] = 4,
    haystacks: Annotated[int, typer.Option(help="Needle haystacks at each length.")] = 12,
    most: Annotated[int, typer.Option(help="Refuse a study of more sets than this.")] = 500,
    workers: Annotated[int | None, typer.Option(help="Conversions side by side; one per core by default.")] = None,
    set_: options.Sets = None,
) -> None:
    """Convert every set of kept layers, judge selectors by what they lost. Takes hours on a CPU; resumes."""
    from halobench.errors import UserError
    from halobench.oracle import OracleSettings, run_oracle
    from halobench.progress import say
    from halobench.recipe import load_recipe
    from halobench.reports import write_oracle
    from halobench.reports.reading import read_runs
    from halobench.surgery.selection import SELECTORS

    for name in method or []:
        SELECTORS.get(name)
        if name == "given":
            raise UserError("--method given keeps layers that somebody names; the oracle judges those that choose")
    settings = OracleSettings(keep=keep, judges=judges, leaders=leaders, haystacks=haystacks, most=most)
    chosen = load_recipe(recipe, set_ or [])
    record = run_oracle(teacher, chosen, method or list(METHODS), settings, out, workers)
    for path in write_oracle(read_runs([record]), out):
        say(f"  {path}")
