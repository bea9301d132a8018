"""`halobench report`: records in, leaderboard and pictures out."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from halobench.cli import options


def report(
    runs: Annotated[list[Path], typer.Argument(help="Folders that hold records (*.record.json).")],
    out: options.Out = Path("runs/report"),
) -> None:
    """Write leaderboard.md and the plots from the records of one or more runs."""
    from halobench.progress import say
    from halobench.reports import write_report

    for path in write_report(runs, out):
        say(f"wrote {path}")
