"""A Llama, a GPT-NeoX and a Mixtral go through the command line, each with another mixer, onto one leaderboard."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tests.families import make_family
from tests.test_cli import SMALL, in_a_shell, run, sets

CASES = {"llama": "gla", "gpt_neox": "gated_deltanet", "mixtral": "mamba2"}


@pytest.fixture(scope="module")
def place(tmp_path_factory, bpe) -> Path:  # type: ignore[no-untyped-def]
    """A folder with the three teachers, as one would download them, and their hybrids."""
    place = tmp_path_factory.mktemp("families")
    for family, mixer in CASES.items():
        model = make_family(family, vocab_size=len(bpe), bos_token_id=0, eos_token_id=0, pad_token_id=0)
        model.save_pretrained(place / family)
        bpe.save_pretrained(place / family)
        run(place, "convert", family, "-o", f"{family}-run", "--mixer", mixer, "--keep", 2, *sets(SMALL))
    return place


def test_each_family_is_converted_with_its_mixer(place: Path) -> None:
    for family, mixer in CASES.items():
        card = json.loads((place / f"{family}-run" / "model" / "halobench.json").read_text())
        assert card["mixer"] == mixer and card["teacher"] == family and len(card["kept"]) == 2
        config = json.loads((place / f"{family}-run" / "model" / "config.json").read_text())
        assert config["source"]["model_type"] == family
        assert sorted(layer["mixer"] for layer in config["plan"]["layers"]) == sorted([mixer] * 2 + ["softmax"] * 2)


def test_all_stand_on_one_leaderboard_with_what_ran(place: Path) -> None:
    runs = [f"{family}-run" for family in CASES]
    in_a_shell(place, "eval", *CASES, *runs, "-o", "eval", "--suite", "ppl,niah", "--lengths", "300", "--limit", 2)
    run(place, "report", "eval", "-o", "report")
    board = (place / "report" / "leaderboard.md").read_text()
    for family in CASES:
        assert f"**{family.replace('_', chr(92) + '_')}** (teacher)" in board
    records = [json.loads(path.read_text()) for path in (place / "eval").glob("*.eval.record.json")]
    assert len(records) == 6
    forms = {record["model"]["mixer"]: record["backends"] for record in records}
    for mixer in CASES.values():
        assert forms[mixer][f"mixer {mixer}"] == "torch" and forms[mixer]["mixer softmax"] == "sdpa"


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (["--keep", "4"], "leaves nothing to convert"),
        (["--keep", "0.1"], "keep=0.1 of 4 layers is less than one"),
        (["--layers", "1,4"], "keep names layer 4; the model's layers are 0 to 3"),
        (["--layers", "1,1"], "more than once"),
        (["--set", "mixer_options.short_cnv=4"], "did you mean 'short_conv'"),
        (["--set", "mixer_options.short_conv=1"], "short_conv=1 spans nothing"),
        (["--mixer", "rwkv8"], "did you mean 'rwkv7'"),
    ],
)
def test_a_plan_that_cannot_be_is_one_line_and_nothing_is_written(place: Path, arguments, expected) -> None:
    found = run(place, "convert", "gpt_neox", "-o", "wrong", *arguments, *sets(SMALL), check=False)
    assert found.returncode == 2 and expected in found.stderr
    assert found.stderr.strip().splitlines()[-1].startswith("error: ") and not (place / "wrong").exists()


@pytest.mark.parametrize(
    ("family", "expected"),
    [("t5", "encoder-decoder"), ("deepseek_v3", "latent attention"), ("mamba2", "state-space model already")],
)
def test_what_cannot_be_operated_on_is_refused_by_its_config(place: Path, family: str, expected: str) -> None:
    from transformers import AutoConfig

    config = AutoConfig.for_model(family)
    config.save_pretrained(place / f"odd-{family}")
    found = run(place, "plan", f"odd-{family}", check=False)
    assert found.returncode == 2 and expected in found.stderr and found.stderr.count("\n") == 1
