"""`--kernels`: what is asked for is what runs, in every record, or an error."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from typer.testing import CliRunner

from halobench.cli import app, options
from halobench.errors import UserError
from halobench.evaluation import EvalRequest, Evaluation
from halobench.mixers.forms import ask_for, used
from halobench.pipeline import Conversion
from halobench.recipe import load_recipe
from halobench.surgery import SurgeryPlan, transplant
from tests.conftest import make_pico


@pytest.fixture(scope="module")
def teacher_folder(tmp_path_factory, bpe) -> Path:  # type: ignore[no-untyped-def]
    folder = tmp_path_factory.mktemp("kernels") / "teacher"
    make_pico("llama", vocab_size=len(bpe), bos_token_id=0, eos_token_id=0, pad_token_id=0).save_pretrained(folder)
    bpe.save_pretrained(folder)
    return folder


@pytest.mark.parametrize("command", ["convert", "eval", "profile"])
def test_a_form_that_cannot_run_here_is_refused_before_anything_is_written(
    command: str, teacher_folder: Path, tmp_path: Path
) -> None:
    out = tmp_path / "out"
    found = CliRunner().invoke(
        app, [command, str(teacher_folder), "--kernels", "fla", "--device", "cpu", "-o", str(out)]
    )
    assert isinstance(found.exception, UserError)
    assert "cannot run scalar_decay here" in str(found.exception) and "NVIDIA GPU" in str(found.exception)
    assert "\n" not in str(found.exception)
    assert not out.exists()


def test_a_misspelt_form_is_told_what_there_is() -> None:
    with pytest.raises(UserError, match="did you mean 'torch'"):
        options.kernels_for("torhc", "cpu")
    with pytest.raises(UserError, match="unknown kernels 'naive'"):
        options.kernels_for("naive", "cpu")
    assert options.kernels_for("auto", "cpu") == "auto"


def test_a_forced_form_reaches_every_recurrence_of_a_model(tokens: torch.Tensor) -> None:
    teacher = make_pico()
    student = transplant(teacher, SurgeryPlan.for_model(teacher, mixer="gated_deltanet", keep=[1])).eval()
    ask_for(student, "naive")
    with torch.no_grad():
        naive = student(tokens).logits
        assert used(student) == {"gated_deltanet": "naive", "softmax": "sdpa"}
        ask_for(student, "torch")
        chunked = student(tokens).logits
    assert used(student)["gated_deltanet"] == "torch"
    torch.testing.assert_close(chunked, naive, rtol=1e-3, atol=1e-3)
    ask_for(student, "fla")
    with pytest.raises(UserError, match="backend 'fla' cannot run delta_rule here"), torch.no_grad():
        student(tokens)


def test_the_record_of_a_conversion_names_the_forms_that_trained_it(teacher_folder: Path, tmp_path: Path) -> None:
    small = [
        "align.tokens=512", "align.batch_tokens=256", "align.lengths=[64]", "distil.tokens=512", "select=given",
        "distil.batch_tokens=256", "distil.lengths=[64]", "finetune.tokens=0", "scale=null", "align.planted=0",
        "distil.planted=0", "mixer=retnet",
    ]  # fmt: skip
    recipe = load_recipe("halo-tiny", small)
    run = Conversion(str(teacher_folder), recipe, tmp_path / "run", device="cpu", given=(1,), kernels="naive")
    run.convert()
    record = json.loads((tmp_path / "run" / "convert.record.json").read_text())
    assert record["backends"] == {"device": "cpu", "retnet": "naive", "softmax": "sdpa"}


def test_numbers_of_a_forced_form_are_not_mixed_with_others(teacher_folder: Path, tmp_path: Path, bpe) -> None:  # type: ignore[no-untyped-def]
    teacher = make_pico("llama", vocab_size=len(bpe))
    student = transplant(teacher, SurgeryPlan.for_model(teacher, keep=[0]))
    student.save_pretrained(tmp_path / "student")
    for file in teacher_folder.glob("*token*"):
        (tmp_path / "student" / file.name).write_bytes(file.read_bytes())
    request = EvalRequest(suites=("ppl",), lengths=(64,))
    plain = Evaluation(str(tmp_path / "student"), tmp_path, request, "cpu")
    forced = EvalRequest(suites=("ppl",), lengths=(64,), kernels="torch")
    other = Evaluation(str(tmp_path / "student"), tmp_path, forced, "cpu")
    assert plain.identity != other.identity
    assert {mixer.backend for mixer in other.model.mixer_modules().values()} == {"torch"}
    assert {mixer.backend for mixer in plain.model.mixer_modules().values()} == {"auto"}
