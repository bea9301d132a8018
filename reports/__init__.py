"""Reports: records to rows, to comparisons, to a leaderboard, a page and plots. Nothing here runs a model."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from halobench.records import RunRecord

if TYPE_CHECKING:
    from halobench.reports.plots import Plot

BOARD, PAGE = "leaderboard.md", "report.html"


def write_report(
    run_dirs: Sequence[Path],
    out_dir: Path,
    *,
    sort: str | None = None,
    margin: float | None = None,
    check: bool = False,
) -> list[Path]:
    """Writes leaderboard.md, report.html, .csv, .json and the plots (PNG and SVG) for every record of `run_dirs`.

    Records of an oracle go to a page of their own, oracle.md. Returns the files, the leaderboard first, then the page.

    Args:
        run_dirs: folders that hold records, record files, results files of lm-eval. They may overlap: a record counts
            once.
        sort: the title of the column that rows are ordered by, or a part of it.
        margin: how much worse than its teacher a hybrid may be and still count as good as it; standing.MARGIN if None.
        check: write nothing; HalobenchError when a text in `out_dir` (SVG too) is not what the records give now, or a
            picture is not there, or one is left over. PNGs are not compared, since their bytes depend on the version of
            what draws them.
    """
    from halobench.reports.reading import read_runs

    found = read_runs(run_dirs)
    oracles = [record for record in found if record.kind == "oracle"]
    records = [record for record in found if record.kind != "oracle"]
    texts, plots = _contents(records, sort, margin) if records else ({}, [])
    texts |= {"oracle.md": _oracle_text(oracles)} if oracles else {}
    if check:
        drawn = [plot.names[0] for plot in plots] + (["oracle.png"] if _has_picture(oracles) else [])
        _check(Path(out_dir), texts | {plot.names[1]: plot.svg for plot in plots}, drawn)
        return [Path(out_dir) / name for name in texts]
    return _write(texts, plots, oracles, Path(out_dir))


def _contents(
    records: Sequence[RunRecord], sort: str | None, margin: float | None
) -> tuple[dict[str, str], list[Plot]]:
    """Every text by its file's name, the leaderboard first, then the page; and the plots that go with them."""
    from halobench.reports.leaderboard import board_files, make_board
    from halobench.reports.page import page
    from halobench.reports.plots import plots_of
    from halobench.reports.standing import MARGIN

    board = make_board(records, sort=sort, margin=MARGIN if margin is None else margin)
    plots = plots_of(board)
    files = board_files(board, {plot.names[0]: plot.caption for plot in plots})
    return {BOARD: files.pop(BOARD), PAGE: page(board)} | files, plots


def _write(texts: dict[str, str], plots: Sequence[Plot], oracles: Sequence[RunRecord], out_dir: Path) -> list[Path]:
    from halobench.files import write_text

    written = []
    for name, text in texts.items():
        write_text(out_dir / name, text)
        written.append(out_dir / name)
    drawn = [path for plot in plots for path in plot.save(out_dir)]
    return [*written, *drawn, *_oracle_picture(oracles, out_dir)]


def _check(folder: Path, texts: dict[str, str], drawn: Sequence[str]) -> None:
    """HalobenchError when a text differs from its file, when a picture is not there, or is of no plot any more."""
    import re

    from halobench.errors import HalobenchError
    from halobench.reports.plots import STEMS

    stale = [name for name, text in texts.items() if _differs(folder / name, text)]
    stale += [name for name in drawn if not (folder / name).is_file()]
    if stale:
        raise HalobenchError(
            f"{folder / stale[0]} is not what the records give now{_made_with(folder, texts)}; run `halobench report` "
            "without --check"
        )
    ours = re.compile(rf"({'|'.join(STEMS)})(-\d+)?\.(png|svg)")
    found = sorted(path for path in folder.iterdir() if ours.fullmatch(path.name))
    left = [path for path in found if path.name not in (*texts, *drawn)]
    if left:
        raise HalobenchError(f"{left[0]} is left over from other records; delete it")


def _differs(path: Path, text: str) -> bool:
    return not path.is_file() or path.read_bytes() != text.encode()


def _made_with(folder: Path, texts: dict[str, str]) -> str:
    """The options of the report that is there, where they are not those of the one that is wanted."""
    import json

    name = "leaderboard.json"
    if name not in texts or not (folder / name).is_file():
        return ""
    wanted = json.loads(texts[name])
    try:
        there = json.loads((folder / name).read_text(encoding="utf-8"))
        changed = [key for key in ("sort", "margin") if there[key] != wanted[key]]
        made = [f"no --{key}" if there[key] is None else f"--{key} {there[key]}" for key in changed]
    except (ValueError, KeyError, TypeError):
        return ""  # damaged, or older than these options: the message above says all there is to say
    return f" (it was made with {', '.join(made)})" if made else ""


def write_oracle(records: Sequence[RunRecord], out_dir: Path) -> list[Path]:
    """Writes oracle.md, and oracle.png where the studies keep two layers; returns the files."""
    return _write({"oracle.md": _oracle_text(records)}, [], records, Path(out_dir))


def _has_picture(oracles: Sequence[RunRecord]) -> bool:
    return bool(oracles) and all(record.details["oracle"]["keep"] == 2 for record in oracles)


def _oracle_text(oracles: Sequence[RunRecord]) -> str:
    from halobench.errors import UserError
    from halobench.reports.oracle_page import oracle_page

    try:
        page = oracle_page(oracles)
    except (AttributeError, IndexError, KeyError, StopIteration, TypeError, ValueError) as error:
        names = ", ".join(record.model.name for record in oracles)
        raise UserError(
            f"the oracle's record of {names} is damaged ({type(error).__name__}: {error}); run `halobench oracle` again"
        ) from error
    picture = "![Value of every pair of kept layers](oracle.png)\n\n" if _has_picture(oracles) else ""
    return f"# Which layers should stay softmax: the oracle\n\n{picture}{page}"


def _oracle_picture(oracles: Sequence[RunRecord], out_dir: Path) -> list[Path]:
    if not _has_picture(oracles):
        return []
    from halobench.reports.oracle_plot import plot_oracle

    return [plot_oracle(oracles, out_dir / "oracle.png")]
