"""The oracle end to end on a pico teacher: every set converted, selectors judged, work resumed and bounded."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from halobench.errors import UserError
from halobench.oracle import Cell, OracleSettings, read_cells
from halobench.records import read_record
from tests.conftest import make_pico
from tests.test_cli import SMALL, sets

ROOT = Path(__file__).resolve().parents[1]
QUICK = ["--method=joint", "--method=even", "--judges=2", "--leaders=1", "--haystacks=1", "--workers=2"]
SETTINGS = OracleSettings(keep=1, judges=2, leaders=1, haystacks=1)
BUDGET = sets([*SMALL, "distil.lengths=[256]"])


def readme_command() -> list[str]:
    """The words of README.md's command."""
    (command,) = re.findall(r"^    (halobench oracle .*)$", (ROOT / "README.md").read_text(), flags=re.MULTILINE)
    return command.split()


def start(place: Path) -> subprocess.CompletedProcess[str]:
    words = readme_command()
    words[words.index("tiny")] = "teacher"
    words[words.index("--keep") + 1] = "1"
    environment = {**os.environ, "HALOBENCH_CACHE": str(place / "cache"), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", *words, *QUICK, *BUDGET]
    return subprocess.run(command, cwd=place, env=environment, capture_output=True, text=True, check=False)


@pytest.fixture(scope="module")
def place(tmp_path_factory, bpe) -> Path:  # type: ignore[no-untyped-def]
    """A folder in which the oracle has judged a teacher of three layers."""
    folder = tmp_path_factory.mktemp("oracle")
    shape = {"num_hidden_layers": 3, "vocab_size": len(bpe), "bos_token_id": 0, "eos_token_id": 0, "pad_token_id": 0}
    make_pico("llama", **shape).save_pretrained(folder / "teacher")
    bpe.save_pretrained(folder / "teacher")
    found = start(folder)
    assert found.returncode == 0, found.stderr
    return folder


def test_every_set_is_converted_and_the_chosen_ones_with_more_seeds(place: Path) -> None:
    cells = read_cells(place / "runs" / "oracle", SETTINGS)
    assert [c["kept"] for c in cells if c["seed"] == 0] == [[0], [1], [2]]
    record = read_record(place / "runs" / "oracle" / "oracle.record.json")
    methods = record.details["oracle"]["methods"]
    assert list(methods) == ["joint", "even"]
    judged = [c["kept"] for c in cells if c["seed"] == 1]
    assert all(entry["layers"] in judged for entry in methods.values())
    assert record.details["oracle"]["cells"] == cells
    assert not list((place / "runs" / "oracle").rglob("running/*"))  # no weights are left


def test_conversions_with_one_seed_differ_in_their_layers_alone(place: Path) -> None:
    cells = [c for c in read_cells(place / "runs" / "oracle", SETTINGS) if c["seed"] == 0]
    assert len({json.dumps(c["metrics"]) for c in cells}) == 3
    assert len({json.dumps([(row["what"], row["tokens"]) for row in c["ledger"]]) for c in cells}) == 1


def test_the_page_names_both_selectors(place: Path) -> None:
    page = (place / "runs" / "oracle" / "oracle.md").read_text()
    assert "| joint |" in page and "| even |" in page


def test_a_second_start_converts_nothing_again(place: Path) -> None:
    before = {p: p.stat().st_mtime_ns for p in (place / "runs" / "oracle").glob("cells-*/*.json")}
    assert len(before) > 5
    assert start(place).returncode == 0
    assert {p: p.stat().st_mtime_ns for p in before} == before


def test_conversions_measured_in_another_way_are_not_taken_for_these(place: Path) -> None:
    other = OracleSettings(keep=1, judges=2, leaders=1, haystacks=2)
    assert read_cells(place / "runs" / "oracle", other) == []


@pytest.mark.parametrize("wrong", [{"judges": 1}, {"leaders": -1}, {"haystacks": 0}, {"most": 0}])
def test_settings_that_cannot_judge_are_refused(wrong: dict) -> None:
    with pytest.raises(UserError, match="judges must be 2 or more"):
        OracleSettings(**{"keep": 1, **wrong})


def test_too_many_sets_and_no_choice_are_refused() -> None:
    with pytest.raises(UserError, match="can be done in 1,184,040 ways"):
        OracleSettings(keep=7).sets(28)
    with pytest.raises(UserError, match="leaves no choice among 4 layers"):
        OracleSettings(keep=4).sets(4)
    assert len(OracleSettings(keep=2).sets(10)) == 45


def test_a_cell_is_named_by_its_set_and_seed() -> None:
    assert Cell((2, 7), 0).name == "2-7-s0"
