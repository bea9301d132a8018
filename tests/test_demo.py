"""The demo: what it converts, and (slow) the whole of it on a small budget."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from halobench.demo import METHODS, plan_variants
from halobench.surgery.selection import Ranking


def ranking(method: str, layers: list[int]) -> Ranking:
    return Ranking(
        method=method, label=method.upper(), layers=layers, ranking=layers, scores=[], stderr=None, membership=None,
        cost_tokens=0,
    )  # fmt: skip


def test_equal_choices_share_one_conversion_and_the_contrast_keeps_rope() -> None:
    answers = [
        ranking("halo", [2, 6]),
        ranking("kl-ls", [0, 6]),
        ranking("jet-nemotron", [2, 6]),
        ranking("even", [4, 9]),
    ]
    variants = plan_variants(answers)
    assert [v.name for v in variants] == ["keep-2-6", "keep-0-6", "keep-4-9", "rope-2-6"]
    assert [r.method for r in variants[0].credit] == ["halo", "jet-nemotron"]
    assert [v.hype for v in variants] == [True, True, True, False]


SMALL = [
    "align.tokens=8192", "selection.haystacks=2", "selection.items=4", "selection.kl_sequences=2",
    "distil.tokens=4096", "finetune.tokens=4096", "scale.lengths=[512]", "scale.candidates=[100, 400]",
]  # fmt: skip


@pytest.mark.slow
def test_the_demo_ends_by_naming_a_leaderboard_and_a_report(tmp_path: Path) -> None:
    sets = [part for value in SMALL for part in ("--set", value)]
    command = [sys.executable, "-m", "halobench", "demo", "-o", str(tmp_path / "demo"), *sets]
    environment = {**os.environ, "HALOBENCH_CACHE": str(tmp_path / "cache")}
    found = subprocess.run(command, capture_output=True, text=True, env=environment, check=False)
    assert found.returncode == 0, found.stderr[-3000:]
    folder = tmp_path / "demo"
    board = (folder / "leaderboard.md").read_text()
    assert "HALO" in board and "even" in board and "RoPE" in board
    assert all((folder / name).stat().st_size > 10_000 for name in ("needles.png", "layers.png", "report.html"))
    named = [line.strip() for line in found.stderr.splitlines()[-2:]]
    assert named == [str(folder / name) for name in ("leaderboard.md", "report.html")]
    selection = json.loads((folder / "selection.record.json").read_text())["details"]["selection"]
    assert set(selection["methods"]) == set(METHODS)
