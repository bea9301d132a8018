"""What a conversion refuses before it writes, and what it notices of a folder that others have touched."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from halobench.errors import HalobenchError, UserError
from halobench.files import drop_halves, read_json, write_json
from halobench.models import CARD, card_of
from halobench.pipeline import Conversion
from halobench.recipe import load_recipe
from halobench.run import RunFolder
from halobench.surgery.checkpoint import load_model
from tests.test_cli import SMALL


def conversion(teacher: Path, out: Path, *values: str, **more: object) -> Conversion:
    recipe = load_recipe("halo-tiny", [*SMALL, "keep=1", "select=even", *values])
    return Conversion(str(teacher), recipe, out, device="cpu", **more)


@pytest.fixture(scope="module")
def teacher(tmp_path_factory, bpe) -> Path:  # type: ignore[no-untyped-def]
    from tests.conftest import make_pico

    folder = tmp_path_factory.mktemp("mistakes") / "llama"
    make_pico("llama", vocab_size=len(bpe)).save_pretrained(folder)
    bpe.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def done(teacher: Path) -> Path:
    conversion(teacher, teacher.parent / "done").convert()
    return teacher.parent / "done"


@pytest.mark.parametrize(
    ("value", "message"),
    [
        ("align.optim.clip=-1", "optim.clip is -1.0; it must be above 0"),
        ("align.optim.clip=0", "above 0"),
        ("align.optim.rate=-1", "optim.rate is -1.0; it must be from 0 on"),
        ("align.optim.rate=.nan", "from 0 on"),
        ("align.optim.decay=5", "above 0 and at most 1"),
        ("align.optim.beta1=1.5", "from 0 to below 1"),
        ("align.optim.warmup_steps=-3", "from 0 on"),
        ("seed=-1", "seed is -1"),
        ("scale.candidates=[0.5]", "above 1"),
        ("scale.candidates=[]", "above 1"),
        ("scale.lengths=[]", "scale needs lengths"),
        ("selection.haystacks=0", "selection.haystacks is 0; it must be at least 1"),
        ("selection.recall_metric=foo", "answer_logprob"),
        ("softmax_options.rope=true", "is set by `hype`"),
        ("align.tokens=[1", "is not valid YAML"),
        ("selector_options={hallo: {eps: 1}}", "did you mean 'halo'"),
        ("select=given", "write --layers 2,7"),
    ],
)
def test_settings_out_of_range_are_refused_before_anything_is_written(teacher, tmp_path, value, message) -> None:  # type: ignore[no-untyped-def]
    with pytest.raises(UserError, match=message):
        conversion(teacher, tmp_path / "run", value)
    assert not (tmp_path / "run").exists()


def test_a_teacher_that_gives_no_numbers_is_named_so(teacher, tmp_path, bpe) -> None:  # type: ignore[no-untyped-def]
    shutil.copytree(teacher, tmp_path / "nan")
    model = load_model(tmp_path / "nan")
    model.model.norm.weight.data.fill_(float("nan"))
    model.save_pretrained(tmp_path / "nan")
    with pytest.raises(UserError, match="are not numbers"):
        conversion(tmp_path / "nan", tmp_path / "run").convert("align")


def test_a_run_finds_its_teacher_from_any_folder(done, teacher) -> None:  # type: ignore[no-untyped-def]
    assert read_json(done / "run.json")["teacher"] == str(teacher.resolve())


def test_lengths_beyond_a_table_of_positions_are_refused(tmp_path, pico, bpe) -> None:  # type: ignore[no-untyped-def]
    pico("gpt2", vocab_size=len(bpe), max_position_embeddings=128).save_pretrained(tmp_path / "gpt2")
    bpe.save_pretrained(tmp_path / "gpt2")
    with pytest.raises(UserError, match="finetune.lengths has 256; gpt2 has a table of 128 positions"):
        conversion(tmp_path / "gpt2", tmp_path / "run", "align.lengths=[64]", "distil.lengths=[64]", "hype=false")


def test_layers_named_and_layers_chosen_are_not_both_asked_for(teacher, tmp_path) -> None:  # type: ignore[no-untyped-def]
    for more in (["--keep", "1"], ["--select", "halo"]):
        command = [sys.executable, "-m", "halobench", "convert", str(teacher), "-o", str(tmp_path / "x")]
        found = subprocess.run([*command, "--layers", "1", *more], capture_output=True, text=True, check=False)
        assert found.returncode == 2 and "leave one of them out" in found.stderr


def test_a_folder_in_which_nothing_was_made_takes_the_corrected_command(teacher, tmp_path) -> None:  # type: ignore[no-untyped-def]
    short = tmp_path / "short.txt"
    short.write_text("One short line of text.\n")
    with pytest.raises(UserError, match="epochs"):
        conversion(teacher, tmp_path / "run", f"data={short}").convert()
    conversion(teacher, tmp_path / "run", "data=sample").convert("align")
    with pytest.raises(UserError, match="holds another run"):
        conversion(teacher, tmp_path / "run", "data=sample", "seed=1")


def test_a_run_with_anothers_alignment_is_not_one_with_its_own(teacher, tmp_path, done) -> None:  # type: ignore[no-untyped-def]
    conversion(teacher, tmp_path / "run", aligned=done).convert("select")
    with pytest.raises(UserError, match="holds another run: aligned"):
        conversion(teacher, tmp_path / "run")


def test_mixers_that_somebody_edited_are_noticed(teacher, done, tmp_path) -> None:  # type: ignore[no-untyped-def]
    for number, edit in enumerate((_without_a_layer, _with_other_weights)):
        run = tmp_path / str(number)
        conversion(teacher, run).convert("align")
        edit(run / "align" / "mixers")
        with pytest.raises(HalobenchError, match=r"is damaged: it has no layer 0|its hash changed"):
            conversion(teacher, run).convert("distil")


def _without_a_layer(folder: Path) -> None:
    found = read_json(folder / "mixers.json")
    del found["layers"]["0"]
    write_json(folder / "mixers.json", found)


def _with_other_weights(folder: Path) -> None:
    path = folder / "mixers.safetensors"
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)


def test_a_finished_hybrid_with_other_weights_is_another_model(done, tmp_path) -> None:  # type: ignore[no-untyped-def]
    shutil.copytree(done / "model", tmp_path / "model")
    same = card_of(str(tmp_path / "model"), None)
    assert same.hash == json.loads((done / "model" / CARD).read_text())["hash"]
    config = read_json(tmp_path / "model" / "config.json")
    write_json(tmp_path / "model" / "config.json", {**config, "note": 1})
    assert card_of(str(tmp_path / "model"), None).hash != same.hash


def test_what_dead_processes_left_half_written_is_dropped(tmp_path) -> None:  # type: ignore[no-untyped-def]
    ended = subprocess.Popen([sys.executable, "-c", ""])
    ended.wait()
    names = {f".model.{ended.pid}.tmp": False, f".model.{os.getpid()}.tmp": True, ".mine.tmp": True}
    (tmp_path / "run" / "distil").mkdir(parents=True)
    for name in names:
        (tmp_path / "run" / "distil" / name).mkdir()
    shutil.move(tmp_path / "run" / "distil", tmp_path / "distil")
    RunFolder(tmp_path / "run", {"recipe": 1}, "tiny")
    shutil.move(tmp_path / "distil", tmp_path / "run" / "distil")
    drop_halves(tmp_path / "run")
    assert {name: (tmp_path / "run" / "distil" / name).exists() for name in names} == names


def test_an_old_folder_whose_successor_never_came_is_kept(tmp_path) -> None:  # type: ignore[no-untyped-def]
    ended = subprocess.Popen([sys.executable, "-c", ""])
    ended.wait()
    for name in ("alone", "replaced"):
        (tmp_path / f".{name}.{ended.pid}.old").mkdir()
    (tmp_path / "replaced").mkdir()
    drop_halves(tmp_path)
    assert {path.name for path in tmp_path.iterdir()} == {f".alone.{ended.pid}.old", "replaced"}


def test_a_damaged_run_is_named(tmp_path) -> None:  # type: ignore[no-untyped-def]
    (tmp_path / "run" / "align").mkdir(parents=True)
    write_json(tmp_path / "run" / "run.json", {})
    with pytest.raises(UserError, match="is damaged: it has no identity"):
        RunFolder(tmp_path / "run", {"recipe": 1}, "tiny")
