"""Reports: records to rows, to comparisons, to a leaderboard and plots. Nothing here runs a model."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

from halobench.config import to_dict
from halobench.records import RunRecord, find_records


def write_report(run_dirs: Sequence[Path], out_dir: Path) -> list[Path]:
    """Writes leaderboard.md (with .csv and .json beside it) and the plots for every record below `run_dirs`.

    Records of an oracle go to a page of their own, oracle.md. Returns the files written, the leaderboard first. Folders
    may overlap: a record counts once.
    """
    from halobench.reports.columns import needle_lengths
    from halobench.reports.leaderboard import leaderboard_groups, write_leaderboard
    from halobench.reports.plots import plot_layer_scores, plot_needles
    from halobench.reports.rows import methods

    found = _distinct([record for folder in run_dirs for record in find_records(Path(folder))])
    oracles = [record for record in found if record.kind == "oracle"]
    records = [record for record in found if record.kind != "oracle"]
    pages = write_oracle(oracles, out_dir) if oracles else []
    if not records:
        return pages
    plots: dict[str, str] = {}
    groups = leaderboard_groups(records)
    for group in groups:
        if needle_lengths(group.rows):
            name = _numbered("needles", plots)
            plot_needles(group.rows, out_dir / name)
            plots[name] = f"Needles found by context length, {group.name}"
    for record in records:
        if methods(record):
            name = _numbered("layers", plots)
            plot_layer_scores(record, out_dir / name)
            plots[name] = f"Layer scores by selector, {record.model.name}"
    board = write_leaderboard(records, out_dir / "leaderboard.md", plots=plots)
    return [board, board.with_suffix(".csv"), board.with_suffix(".json"), *(out_dir / name for name in plots), *pages]


def write_oracle(records: Sequence[RunRecord], out_dir: Path) -> list[Path]:
    """Writes oracle.md, and oracle.png where the studies keep two layers; returns the files."""
    from halobench.files import write_text
    from halobench.reports.oracle_page import oracle_page
    from halobench.reports.oracle_plot import plot_oracle

    page, plot = out_dir / "oracle.md", out_dir / "oracle.png"
    pairs = all(record.details["oracle"]["keep"] == 2 for record in records)
    picture = "![Value of every pair of kept layers](oracle.png)\n\n" if pairs else ""
    write_text(page, f"# Which layers should stay softmax: the oracle\n\n{picture}{oracle_page(records)}")
    return [page, plot_oracle(records, plot)] if pairs else [page]


def _distinct(records: Sequence[RunRecord]) -> list[RunRecord]:
    return list({json.dumps(to_dict(record), sort_keys=True): record for record in records}.values())


def _numbered(stem: str, taken: dict[str, str]) -> str:
    """needles.png, then needles-2.png and so on."""
    count = sum(name.startswith(stem) for name in taken) + 1
    return f"{stem}.png" if count == 1 else f"{stem}-{count}.png"
