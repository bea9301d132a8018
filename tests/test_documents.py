"""What the documents say is what the records and the modules say."""

import json
import re
import shlex
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest
import typer

from halobench import documents
from halobench.cli import app
from halobench.mixers import MIXERS
from halobench.records import find_records
from tests.conftest import make_pico
from tests.families import FAMILIES

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


def test_the_committed_report_is_made_of_the_committed_records() -> None:
    from halobench.reports import write_report

    write_report([documents.RECORDS], ROOT / "docs" / "demo", check=True)


def test_records_hold_no_place_of_a_machine() -> None:
    places = (str(ROOT), str(Path.home()), tempfile.gettempdir())
    for path in (ROOT / "benchmarks").rglob("*.json"):
        assert not any(place in path.read_text() for place in places), path


def commands(page: Path) -> list[list[str]]:
    """The words behind `halobench` in every command of a page."""
    text = page.read_text(encoding="utf-8").replace("\\\n", " ")
    lines = re.findall(r"^    (?:\S.* -m )?halobench (.*)$", text, flags=re.MULTILINE)
    return [shlex.split(line, comments=True) for line in lines]


@pytest.mark.parametrize("page", sorted((ROOT / "docs").glob("*.md")), ids=lambda page: page.name)
def test_the_commands_of_the_pages_are_the_programs(page: Path) -> None:
    for words in commands(page):
        group = typer.main.get_command(app)
        with group.make_context("halobench", words, resilient_parsing=True) as context:
            name, command, rest = group.resolve_command(context, words)  # type: ignore[attr-defined]
            command.make_context(name, rest, parent=context)  # takes every word, or fails; runs nothing


def test_a_command_that_the_program_has_not_is_noticed(tmp_path: Path) -> None:
    page = tmp_path / "page.md"
    page.write_text("    accelerate launch --x 1 \\\n        -m halobench convert tiny --mixture gla  # so\n")
    assert commands(page) == [["convert", "tiny", "--mixture", "gla"]]
    with pytest.raises(Exception, match="--mixture"):
        test_the_commands_of_the_pages_are_the_programs(page)


def python_blocks() -> list[str]:
    return re.findall(r"```python\n(.*?)```", (ROOT / "docs" / "extending.md").read_text(), flags=re.DOTALL)


def test_the_examples_of_the_page_do_what_they_say() -> None:
    """The selector and the suite; the mixer is installed and used below."""
    from halobench.surgery.selection import Question

    blocks = python_blocks()
    assert len(blocks) == 4
    space: dict = {}
    for block in blocks[2:]:
        exec(compile(block, "extending.md", "exec"), space)
    assert space["LastLayers"]().rank(Question(layers=6, keep=2)).layers == [4, 5]
    assert space["run_vocabulary"](type("R", (), {"tokenizer": "abc"})())[0].value == 3.0


def test_the_readmes_surgery_from_python_runs() -> None:
    blocks = re.findall(r"```python\n(.*?)```", (ROOT / "README.md").read_text(), flags=re.DOTALL)
    (surgery,) = (block for block in blocks if "SurgeryPlan" in block)
    space: dict = {"teacher": make_pico(num_hidden_layers=6)}
    exec(compile(surgery, "README.md", "exec"), space)
    kinds = [layer.mixer for layer in space["student"].config.surgery_plan().layers]
    assert kinds == ["lightning", "softmax", "lightning", "gated_deltanet", "lightning", "softmax"]


@pytest.fixture(scope="module")
def installed(tmp_path_factory) -> Path:  # type: ignore[no-untyped-def]
    """The page's mixer as a package of its own, built and installed by pip; the folder it was installed to."""
    source, site = tmp_path_factory.mktemp("source"), tmp_path_factory.mktemp("site")
    mixer, test = python_blocks()[:2]
    entry = re.findall(r"```toml\n(.*?)```", (ROOT / "docs" / "extending.md").read_text(), flags=re.DOTALL)[0]
    (source / "my_package").mkdir()
    (source / "my_package" / "__init__.py").write_text("")
    (source / "my_package" / "learned.py").write_text(mixer)
    (source / "test_learned.py").write_text(test)
    (source / "pyproject.toml").write_text(
        '[build-system]\nrequires = ["setuptools"]\nbuild-backend = "setuptools.build_meta"\n\n'
        '[project]\nname = "my-package"\nversion = "1.0"\n\n[tool.setuptools]\npackages = ["my_package"]\n\n' + entry
    )
    pip = [sys.executable, "-m", "pip", "install", "-q", "--disable-pip-version-check", "--no-deps"]
    subprocess.run([*pip, "--no-build-isolation", "--target", site, source], check=True, capture_output=True)
    (site / "test_learned.py").write_text(test)
    return site


def with_package(site: Path, *arguments: object) -> subprocess.CompletedProcess[str]:
    environment = {"PYTHONPATH": str(site), "PATH": "/usr/bin:/bin", "OMP_NUM_THREADS": "1", "HOME": str(site)}
    command = [sys.executable, "-m", *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, check=False, env=environment, cwd=site)


def test_an_installed_package_proves_its_mixer_with_the_laws(installed: Path) -> None:
    found = with_package(installed, "pytest", "-q", "-p", "no:cacheprovider", installed / "test_learned.py")
    assert "12 passed" in found.stdout, found.stdout


def test_an_installed_package_is_known_to_the_command_line_and_converts(installed: Path, bpe) -> None:  # type: ignore[no-untyped-def]
    listed = with_package(installed, "halobench", "mixers")
    assert "learned_decay   Learned decay        https://arxiv.org/abs/2401.04658" in listed.stdout
    teacher = installed / "teacher"
    make_pico("llama", vocab_size=len(bpe), bos_token_id=0, eos_token_id=0, pad_token_id=0).save_pretrained(teacher)
    bpe.save_pretrained(teacher)
    small = ["align.tokens=1024", "align.batch_tokens=512", "align.lengths=[128]"]
    sets = [part for value in small for part in ("--set", value)]
    found = with_package(
        installed, "halobench", "convert", teacher, "--mixer", "learned_decay", "--data", "sample", "--until", "align",
        "-o", installed / "run", *sets,
    )  # fmt: skip
    assert found.returncode == 0, found.stderr
    described = json.loads((installed / "run" / "align" / "mixers" / "mixers.json").read_text())
    assert {layer["mixer"] for layer in described["layers"].values()} == {"learned_decay"}


def test_every_family_and_every_mixer_stands_in_the_table_and_passed() -> None:
    record = json.loads(documents.FAMILIES_RECORD.read_text())
    assert list(record["families"]) == list(FAMILIES), "run `make families`"
    assert record["columns"] == ["identity", "views", "gradients", *MIXERS.built_in()], "run `make families`"
    for family, found in record["families"].items():
        assert found["particular"] == FAMILIES[family][0], "run `make families`"
        assert found["outcomes"] == dict.fromkeys(record["columns"], "passed"), family


def test_the_records_of_the_demo_cover_its_models() -> None:
    records = find_records(documents.RECORDS)
    evaluated = {r.model.hash for r in records if r.kind == "eval"}
    profiled = {r.model.hash for r in records if r.kind == "profile"}
    assert evaluated == profiled
    assert sum(r.kind == "select" for r in records) == 1
    assert all(r.environment["versions"]["torch"] and r.status == "ok" for r in records)
