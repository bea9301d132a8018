"""Saving and loading: the same numbers come back, and a bad checkpoint is told in one clear line."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from halobench.errors import UserError
from halobench.surgery import SurgeryPlan, transplant
from halobench.surgery.checkpoint import load_mixers, load_model, save_mixers, save_model
from halobench.surgery.transplant import build_mixers


@pytest.fixture
def student(teacher):
    torch.manual_seed(3)
    return transplant(teacher, SurgeryPlan.for_model(teacher, keep=2)).eval()


@pytest.fixture
def saved(student, tmp_path) -> Path:
    save_model(tmp_path / "model", student)
    return tmp_path / "model"


@torch.no_grad()
def test_a_saved_student_gives_the_same_logits(student, saved, tokens) -> None:
    loaded = load_model(saved)
    assert not loaded.training
    assert torch.equal(loaded(tokens).logits, student(tokens).logits)


@torch.no_grad()
def test_it_loads_in_bfloat16_with_the_same_logits_as_a_cast_model(student, saved, tokens) -> None:
    loaded = load_model(saved, dtype=torch.bfloat16)
    assert {p.dtype for p in loaded.parameters()} == {torch.bfloat16}
    # the rotary tables stay in fp32 when loaded, as they do for any model of transformers
    cast = student
    for parameter in cast.parameters():
        parameter.data = parameter.data.bfloat16()
    assert torch.equal(loaded(tokens).logits, cast(tokens).logits)


@torch.no_grad()
def test_a_student_saved_in_bfloat16_comes_back_in_bfloat16(student, tokens, tmp_path) -> None:
    for parameter in student.parameters():
        parameter.data = parameter.data.bfloat16()
    save_model(tmp_path / "low", student)
    loaded = load_model(tmp_path / "low")
    assert loaded.dtype == torch.bfloat16 and torch.equal(loaded(tokens).logits, student(tokens).logits)


@pytest.mark.parametrize("family", ["llama", "qwen2", "qwen3", "mistral"])
@pytest.mark.parametrize("tied", [False, True])
@torch.no_grad()
def test_every_family_comes_back_through_the_auto_class(pico, tokens, family, tied, tmp_path) -> None:
    teacher = pico(family, tie_word_embeddings=tied)
    for keep in ("all", 1):
        model = transplant(teacher, SurgeryPlan.for_model(teacher, keep=keep)).eval()
        save_model(tmp_path / "m", model)
        loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "m")
        assert torch.equal(loaded(tokens).logits, model(tokens).logits)
        shared = loaded.get_input_embeddings().weight is loaded.get_output_embeddings().weight
        assert shared == tied
        assert loaded.config.eos_token_id == 1 and loaded.config.pad_token_id == 2


@torch.no_grad()
def test_the_logits_scale_is_saved_with_the_model(student, tokens, tmp_path) -> None:
    student.set_logits_scale(25.0)
    save_model(tmp_path / "m", student)
    assert torch.equal(load_model(tmp_path / "m")(tokens).logits, student(tokens).logits)


@torch.no_grad()
def test_a_plain_decoder_is_loaded_too(teacher, tokens, tmp_path) -> None:
    save_model(tmp_path / "plain", teacher)
    assert torch.equal(load_model(tmp_path / "plain")(tokens).logits, teacher(tokens).logits)


def test_saving_replaces_a_model_but_no_other_folder(student, saved, tmp_path) -> None:
    (saved / "stale.txt").write_text("old")
    save_model(saved, student)
    assert not (saved / "stale.txt").exists() and (saved / "config.json").exists()
    other = tmp_path / "notes"
    other.mkdir()
    (other / "diary.txt").write_text("dear")
    with pytest.raises(UserError, match="holds files but no config"):
        save_model(other, student)
    assert (other / "diary.txt").exists()


def test_a_save_that_fails_leaves_the_old_model(student, saved, monkeypatch) -> None:
    before = (saved / "model.safetensors").read_bytes()

    def half(directory, *args, **kwargs):
        Path(directory).mkdir()
        (Path(directory) / "config.json").write_text("{")
        raise RuntimeError("power cut")

    monkeypatch.setattr(student, "save_pretrained", half)
    with pytest.raises(RuntimeError, match="power cut"):
        save_model(saved, student)
    assert (saved / "model.safetensors").read_bytes() == before
    assert [path.name for path in saved.parent.iterdir()] == ["model"]


# Bad checkpoints


def edit_config(folder: Path, **changes: object) -> None:
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, **changes}))


def edit_weights(folder: Path, change) -> None:
    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})


def lose(tensors) -> None:
    del tensors["backbone.model.layers.1.self_attn.mixer.o_gate.weight"]


def add(tensors) -> None:
    tensors["backbone.model.layers.1.self_attn.mixer.surprise.weight"] = torch.zeros(2)


def reshape(tensors) -> None:
    tensors["backbone.model.layers.0.self_attn.mixer.z_proj.weight"] = torch.zeros(3, 3)


def cut_short(folder: Path) -> None:
    data = (folder / "model.safetensors").read_bytes()
    (folder / "model.safetensors").write_bytes(data[: len(data) // 2])


BREAKAGES = {
    "no config": (lambda f: (f / "config.json").unlink(), "has no config.json"),
    "damaged config": (lambda f: (f / "config.json").write_text("{"), "not valid JSON"),
    "damaged weights": (cut_short, "damaged or cut short"),
    "no weights": (lambda f: (f / "model.safetensors").unlink(), "holds no weights"),
    "pickle only": (lambda f: (f / "model.safetensors").rename(f / "pytorch_model.bin"), "pickle only"),
    "missing tensor": (lambda f: edit_weights(f, lose), "lacks 1 tensors.*o_gate"),
    "extra tensor": (lambda f: edit_weights(f, add), "beyond the model 1 tensors.*surprise"),
    "misshapen tensor": (lambda f: edit_weights(f, reshape), r"z_proj.*is \(3, 3\), expected \(48, 48\)"),
    "remote code": (lambda f: edit_config(f, model_type="own", auto_map={"AutoConfig": "x.Y"}), "code of its own"),
    "unknown type": (lambda f: edit_config(f, model_type="llamma"), "'llamma', which this transformers"),
    "no plan": (lambda f: edit_config(f, plan=None), "needs 'source' and 'plan'"),
    "bad plan": (lambda f: edit_config(f, plan={"layers": [{"mixer": "lightnin"}]}), "did you mean 'lightning'"),
    "lost shard": (
        lambda f: (f / "model.safetensors.index.json").write_text('{"weight_map": {"a": "model-2.safetensors"}}'),
        "lacks the weight files model-2",
    ),
}


@pytest.mark.parametrize("kind", BREAKAGES)
def test_a_bad_checkpoint_is_told_in_one_line(saved, kind) -> None:
    breakage, message = BREAKAGES[kind]
    breakage(saved)
    with pytest.raises(UserError, match=message) as caught:
        load_model(saved)
    assert "\n" not in str(caught.value)


def test_a_path_that_is_missing_or_a_file_is_told(tmp_path) -> None:
    with pytest.raises(UserError, match="does not exist"):
        load_model(tmp_path / "nowhere")
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="is a file"):
        load_model(tmp_path / "file")


# Mixers apart


def test_mixers_come_back_for_their_teacher(teacher, tmp_path) -> None:
    mixers = build_mixers(teacher, "lightning", {"norm_scope": "head"})
    save_mixers(tmp_path / "aligned", mixers)
    loaded = load_mixers(tmp_path / "aligned", teacher)
    assert loaded.keys() == mixers.keys() and loaded[2].options == mixers[2].options
    for index, mixer in mixers.items():
        for name, tensor in mixer.state_dict().items():
            assert torch.equal(loaded[index].state_dict()[name], tensor)


def test_mixers_for_another_teacher_or_damaged_ones_are_refused(teacher, pico, tmp_path) -> None:
    save_mixers(tmp_path / "aligned", build_mixers(teacher, "lightning"))
    with pytest.raises(UserError, match=r"layer 0 does not fit.*is \(48, 48\), expected \(64, 64\)"):
        load_mixers(tmp_path / "aligned", pico("qwen3", hidden_size=64, head_dim=16))
    with pytest.raises(UserError, match="the teacher has 2 layers"):
        load_mixers(tmp_path / "aligned", pico("qwen3", num_hidden_layers=2))
    with pytest.raises(UserError, match="no mixers.json"):
        load_mixers(tmp_path, teacher)
    cut_short_file = tmp_path / "aligned" / "mixers.safetensors"
    cut_short_file.write_bytes(cut_short_file.read_bytes()[:100])
    with pytest.raises(UserError, match="missing or damaged"):
        load_mixers(tmp_path / "aligned", teacher)


def test_mixers_are_not_saved_over_other_files(teacher, tmp_path) -> None:
    mixers = build_mixers(teacher, "lightning")
    (tmp_path / "thesis.txt").write_text("mine")
    with pytest.raises(UserError, match=r"holds files but no mixers\.json"):
        save_mixers(tmp_path, mixers)
    assert (tmp_path / "thesis.txt").read_text() == "mine"
