"""`halobench report`: records in, leaderboard, page and pictures out."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from halobench.cli import options


def report(
    runs: Annotated[
        list[Path],
        typer.Argument(help="Folders that hold records (*.record.json), single records, or lm-eval's results_*.json."),
    ],
    out: options.Out = Path("runs/report"),
    sort: Annotated[
        str | None, typer.Option(help="Order rows by this column's title, or a part of it; best first.")
    ] = None,
    margin: Annotated[
        float | None,
        typer.Option(help="How much worse than its teacher counts as as good: a share of answers; default 0.02."),
    ] = None,
    check: Annotated[
        bool, typer.Option("--check", help="Write nothing; fail when the files are not what the records give now.")
    ] = False,
) -> None:
    """Write leaderboard.md, report.html and the plots from the records of one or more runs."""
    from halobench.progress import say
    from halobench.reports import write_report

    for path in write_report(runs, out, sort=sort, margin=margin, check=check):
        say(f"{path} is up to date" if check else f"wrote {path}")
