"""What the documents say is what the records and the modules say."""

import re
import subprocess
import sys
import tempfile
from pathlib import Path

from halobench import documents
from halobench.records import find_records

ROOT = Path(__file__).resolve().parents[1]


def test_generated_sections_are_fresh() -> None:
    assert documents.stale() == [], "run `make docs`"


def test_a_stale_section_would_be_noticed(tmp_path: Path) -> None:
    from halobench.reports.readme import section_is_stale

    copy = tmp_path / "README.md"
    text = (ROOT / "README.md").read_text()
    copy.write_text(text.replace("HALO", "OLAH"))
    assert section_is_stale(copy, "leaderboard", documents.leaderboard())


def test_the_tree_names_every_module() -> None:
    tree = documents.tree()
    for room in documents.ROOMS:
        for path in (ROOT / room).glob("*.py"):
            assert path.name == "__init__.py" or f"  {path.name} " in tree, path


def test_the_committed_leaderboard_is_made_of_the_committed_records(tmp_path: Path) -> None:
    from halobench.reports import write_report

    write_report([documents.RECORDS], tmp_path)
    assert (tmp_path / "leaderboard.md").read_text() == (ROOT / "docs" / "demo" / "leaderboard.md").read_text()


def test_records_hold_no_place_of_a_machine() -> None:
    places = (str(ROOT), str(Path.home()), tempfile.gettempdir())
    for path in (ROOT / "benchmarks").rglob("*.json"):
        assert not any(place in path.read_text() for place in places), path


def test_the_example_mixer_of_the_page_converts_a_model(tmp_path: Path, teacher, monkeypatch) -> None:  # type: ignore[no-untyped-def]
    """Runs the page's Python blocks, registers what they define, and operates with them."""
    import torch

    from halobench.mixers import MIXERS
    from halobench.surgery import SurgeryPlan, transplant
    from halobench.surgery.selection import Question

    page = (ROOT / "docs" / "extending.md").read_text()
    blocks = re.findall(r"```python\n(.*?)```", page, flags=re.DOTALL)
    assert len(blocks) == 3
    space: dict = {}
    for block in blocks:
        exec(compile(block, "extending.md", "exec"), space)
    monkeypatch.setitem(MIXERS._entries, "average", space["AverageMixer"])
    student = transplant(teacher, SurgeryPlan.for_model(teacher, mixer="average", keep=[1])).eval()
    ids = torch.randint(3, 101, (2, 12), generator=torch.Generator().manual_seed(0))
    whole = student(input_ids=ids).logits
    first = student(input_ids=ids[:, :7], use_cache=True)
    rest = student(input_ids=ids[:, 7:], past_key_values=first.past_key_values, use_cache=True).logits
    torch.testing.assert_close(rest, whole[:, 7:], rtol=1e-4, atol=1e-4)
    assert space["LastLayers"]().rank(Question(layers=6, keep=2)).layers == [4, 5]
    assert space["run_vocabulary"](type("R", (), {"tokenizer": "abc"})())[0].value == 3.0


def test_a_package_with_an_entry_point_is_known_to_the_command_line(tmp_path: Path) -> None:
    """A mixer of another installed package, found by its entry point."""
    page = (ROOT / "docs" / "extending.md").read_text()
    package = tmp_path / "site" / "my_package"
    package.mkdir(parents=True)
    (package / "__init__.py").write_text("")
    (package / "averages.py").write_text(re.findall(r"```python\n(.*?)```", page, flags=re.DOTALL)[0])
    information = tmp_path / "site" / "my_package-1.0.dist-info"
    information.mkdir()
    (information / "METADATA").write_text("Metadata-Version: 2.1\nName: my-package\nVersion: 1.0\n")
    (information / "entry_points.txt").write_text("[halobench.mixers]\naverage = my_package.averages:AverageMixer\n")
    found = subprocess.run(
        [sys.executable, "-m", "halobench", "mixers"],
        capture_output=True, text=True, check=True, env={"PYTHONPATH": str(tmp_path / "site"), "PATH": "/usr/bin"},
    )  # fmt: skip
    assert "average        Running mean  https://example.org/average" in found.stdout


def test_the_records_of_the_demo_cover_its_models() -> None:
    records = find_records(documents.RECORDS)
    evaluated = {r.model.hash for r in records if r.kind == "eval"}
    profiled = {r.model.hash for r in records if r.kind == "profile"}
    assert evaluated == profiled
    assert sum(r.kind == "select" for r in records) == 1
    assert all(r.environment["versions"]["torch"] and r.status == "ok" for r in records)
