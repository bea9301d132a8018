"""Released HypeNets: read exactly, written exactly, and refused in one line where that cannot be.

Every switch of the layout is held against `released_logits`, which computes the released model in float64 from its
config and tensors, one formula after the other and without any code of the package.
"""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoModelForCausalLM

import halobench
from halobench.errors import UserError
from halobench.surgery import HybridConfig, HybridForCausalLM, SurgeryPlan, transplant
from halobench.surgery.checkpoint import load_model, save_model
from halobench.surgery.hypenet import export_hypenet, import_hypenet, read_hypenet
from tests.conftest import make_pico
from tests.released_hypenet import (
    ABSENT,
    ATTENTION,
    BASE,
    IDS,
    LIGHTNING,
    config_of,
    kinds_of,
    released_logits,
    shapes_of,
    tensors_of,
    write_released,
)
from tests.test_cli import in_a_shell, run

PARITY = Path(__file__).resolve().parents[2] / "shared" / "parity" / "hypenet-tiny-a"
needs_parity = pytest.mark.skipif(not PARITY.is_dir(), reason="the parity fixture is not beside the repository")

# Every switch


SWITCHES: dict[str, dict[str, object]] = {
    "no gate in softmax layers": {"attn_use_output_gate": False},
    "softmax gate by default": {"attn_use_output_gate": ABSENT},
    "RoPE in softmax layers": {"attn_use_rope": True},
    "RoPE in softmax layers by default": {"attn_use_rope": ABSENT},
    "no logits scale": {"attn_logits_scaling": None},
    "another logits scale": {"attn_logits_scaling": "hype 5"},
    "a logits scale without a number": {"attn_logits_scaling": "hype"},
    "no gate in lightning layers": {"lightning_use_output_gate": False},
    "no output norm": {"lightning_use_output_norm": False},
    "no output norm by default": {"lightning_use_output_norm": ABSENT},
    "no norm of queries and keys": {"lightning_use_qk_norm": False},
    "no RoPE in lightning layers": {"lightning_use_rope": False},
    "shared keys and values": {"lightning_nkv": 2, "expand_kv_proj": False},
    "shared keys and values by default": {"lightning_nkv": ABSENT},
    "lightning scaled by the head size": {"lightning_scale": "1/d", "lightning_use_output_norm": False},
    "lightning not scaled": {"lightning_scale": "1", "lightning_use_output_norm": False},
    "an untied head": {"tie_word_embeddings": False},
    "an untied head by default": {"tie_word_embeddings": ABSENT},
    "another theta": {"rope_theta": 50},
    "another theta, newer spelling": {
        "rope_theta": ABSENT, "rope_parameters": {"rope_theta": 50.0, "rope_type": "default"},
    },
    "stretched positions": {"rope_scaling": {"type": "linear", "factor": 4.0}},
    "stretched positions, newer spelling": {
        "rope_scaling": ABSENT, "rope_theta": ABSENT,
        "rope_parameters": {"rope_type": "linear", "factor": 4.0, "rope_theta": 10000.0},
    },
    "biases": {"attention_bias": True, "lightning_use_output_gate": False},
    "another epsilon": {"rms_norm_eps": 0.1},
    "another activation": {"hidden_act": "gelu"},
    "other layers": {"mixer_types": [ATTENTION, "lightning_attn", ATTENTION, "lightning_attn"]},
    "softmax everywhere by default": {"mixer_types": ABSENT},
}  # fmt: skip


@pytest.mark.parametrize("switch", SWITCHES)
@torch.no_grad()
def test_every_switch_is_honoured_and_changes_the_logits(tmp_path, switch) -> None:
    folder = write_released(tmp_path / "released", **SWITCHES[switch])
    config = config_of(**SWITCHES[switch])
    got = import_hypenet(folder)(IDS).logits[0]
    torch.testing.assert_close(got, released_logits(config, tensors_of(config)), rtol=1e-4, atol=1e-4)
    usual = released_logits(config_of(), tensors_of(config_of()))
    assert (got - usual).norm() > 1e-3 * usual.norm()


@pytest.mark.parametrize("names", [("HypeNetForCausalLM", "hypenet"), ("HybridForCausalLM", "hybrid")])
@torch.no_grad()
def test_both_class_names_are_read_with_the_fields_of_their_time(tmp_path, names) -> None:
    early = {
        "max_window_layers": 28,
        "sliding_window": 4096,
        "use_sliding_window": False,
        "max_position_embeddings": 960,
    }
    changes = {"architectures": [names[0]], "model_type": names[1], **(early if names[1] == "hybrid" else {})}
    model = import_hypenet(write_released(tmp_path / "released", **changes))
    expected = released_logits(config_of(), tensors_of(config_of()))
    torch.testing.assert_close(model(IDS).logits[0], expected, rtol=1e-4, atol=1e-4)


def test_fields_that_change_nothing_here_are_passed_over(tmp_path) -> None:
    noise = {"fused_ce_loss": True, "loss_fn": "kl_div", "gdn_nh": 7, "kda_use_conv": True, "id2label": {"0": "x"},
             "auto_map": {"AutoConfig": "configuration_hypenet.HypeNetConfig"}, "mlp_hidden_act": "silu"}  # fmt: skip
    assert read_hypenet(config_of(**noise))[1] == read_hypenet(config_of())[1]


def test_the_released_2b_has_the_published_size_and_layers() -> None:
    shape = json.loads((Path(halobench.__file__).parent / "assets" / "shapes" / "qwen3-1.7b.json").read_text())
    sizes = {name: shape[name] for name in BASE.keys() & shape.keys() - {"architectures", "model_type"}}
    kept = [2, 3, 6, 8, 9, 21, 25]
    kinds = [ATTENTION if index in kept else LIGHTNING for index in range(28)]
    heads = {"lightning_nh": 16, "lightning_nkv": 16, "lightning_head_dim": 128}
    source, plan = read_hypenet(config_of(**sizes, **heads, mixer_types=kinds))
    with torch.device("meta"):
        model = HybridForCausalLM(HybridConfig.of(source, plan))
    assert plan.kept == tuple(kept)
    assert round(sum(x.numel() for x in model.parameters()) / 1e9, 3) == 1.926


# Parity


@needs_parity
@torch.no_grad()
def test_the_released_model_code_and_ours_agree_on_a_checkpoint_from_disk(tmp_path) -> None:
    run(tmp_path, "import", PARITY, "-o", tmp_path / "ours")
    student = load_model(tmp_path / "ours")
    expected = load_file(PARITY / "expected.safetensors")
    ids, prefill = expected["input_ids"], json.loads((PARITY / "expected.json").read_text())["prefill"]
    torch.testing.assert_close(student(ids).logits[0], expected["logits"], rtol=1e-4, atol=1e-4)
    cache = student.new_cache()
    decoded = [student(ids[:, :prefill], past_key_values=cache).logits[0, -1]]
    decoded += [student(ids[:, t : t + 1], past_key_values=cache).logits[0, -1] for t in range(prefill, ids.shape[1])]
    torch.testing.assert_close(torch.stack(decoded), expected["decode_logits"], rtol=1e-4, atol=1e-4)


@needs_parity
def test_the_plain_computation_of_these_tests_agrees_with_the_released_model_code() -> None:
    config = json.loads((PARITY / "config.json").read_text())
    expected = load_file(PARITY / "expected.safetensors")
    got = released_logits(config, load_file(PARITY / "model.safetensors"), expected["input_ids"])
    torch.testing.assert_close(got, expected["logits"], rtol=1e-4, atol=1e-4)


# There and back


@pytest.mark.parametrize("switch", [None, *SWITCHES])
def test_import_then_export_gives_the_same_tensors_and_a_config_of_the_same_meaning(tmp_path, switch) -> None:
    changes = SWITCHES[switch] if switch else {}
    folder = write_released(tmp_path / "released", torch.bfloat16, **changes)
    export_hypenet(import_hypenet(folder), tmp_path / "back")
    before, after = (load_file(place / "model.safetensors") for place in (folder, tmp_path / "back"))
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) and after[name].dtype == torch.bfloat16 for name in before)
    told = json.loads((tmp_path / "back" / "config.json").read_text())
    assert (told["architectures"], told["model_type"]) == (["HypeNetForCausalLM"], "hypenet")
    assert told["torch_dtype"] == "bfloat16"
    source, plan = read_hypenet(config_of(**changes))
    source_again, plan_again = read_hypenet(told)
    assert plan_again == plan and source_again.to_dict() == source.to_dict()
    meant = BASE.keys() - changes.keys() - {"torch_dtype", "expand_kv_proj"}
    if LIGHTNING not in kinds_of(config_of(**changes)):
        meant = {name for name in meant if not name.startswith("lightning_")}
    assert {name: told[name] for name in meant} == {name: BASE[name] for name in meant}


@torch.no_grad()
def test_export_then_import_gives_the_same_logits_bit_for_bit(teacher, tokens, tmp_path) -> None:
    torch.manual_seed(2)
    student = transplant(teacher, SurgeryPlan.for_model(teacher, keep=2)).eval()
    student.set_logits_scale(25.0)
    student.generation_config.max_new_tokens = 7
    export_hypenet(student, tmp_path / "released")
    back = import_hypenet(tmp_path / "released")
    assert torch.equal(back(tokens).logits, student(tokens).logits)
    assert torch.equal(back.generate(tokens, do_sample=False), student.generate(tokens, do_sample=False))
    assert back.config.eos_token_id == 1 and back.generation_config.max_new_tokens == 7
    config = json.loads((tmp_path / "released" / "config.json").read_text())
    torch.testing.assert_close(
        back(tokens).logits[0],
        released_logits(config, load_file(tmp_path / "released" / "model.safetensors"), tokens[:1]),
        rtol=1e-4,
        atol=1e-4,
    )


@torch.no_grad()
def test_layers_kept_untouched_are_written_as_softmax_with_rope(teacher, tokens, tmp_path) -> None:
    student = transplant(teacher, SurgeryPlan.for_model(teacher, keep=[1, 2], hype=False)).eval()
    export_hypenet(student, tmp_path / "released")
    told = json.loads((tmp_path / "released" / "config.json").read_text())
    assert told["attn_use_rope"] and not told["attn_use_output_gate"]
    torch.testing.assert_close(import_hypenet(tmp_path / "released")(tokens).logits, student(tokens).logits)


@torch.no_grad()
def test_weights_over_several_files_are_written_and_read(tmp_path) -> None:
    model = import_hypenet(write_released(tmp_path / "released"))
    export_hypenet(model, tmp_path / "shards", shard_bytes=20_000)
    index = json.loads((tmp_path / "shards" / "model.safetensors.index.json").read_text())
    files = sorted({*index["weight_map"].values()})
    assert len(files) > 3 and files == sorted(path.name for path in (tmp_path / "shards").glob("*.safetensors"))
    assert all(name in load_file(tmp_path / "shards" / file) for name, file in index["weight_map"].items())
    assert index["weight_map"].keys() == shapes_of(config_of()).keys()
    assert torch.equal(import_hypenet(tmp_path / "shards")(IDS).logits, model(IDS).logits)


@torch.no_grad()
def test_a_copy_of_the_tied_head_is_accepted_only_when_it_is_the_embedding(tmp_path) -> None:
    folder = write_released(tmp_path / "released")
    usual = import_hypenet(folder)(IDS).logits
    tensors = load_file(folder / "model.safetensors")
    save_file({**tensors, "lm_head.weight": tensors["model.embed_tokens.weight"].clone()}, folder / "model.safetensors")
    assert torch.equal(import_hypenet(folder)(IDS).logits, usual)
    save_file({**tensors, "lm_head.weight": tensors["model.embed_tokens.weight"] + 1}, folder / "model.safetensors")
    with pytest.raises(UserError, match="tie_word_embeddings"):
        import_hypenet(folder)


# What the layout cannot say


def hybrid(
    family: str = "qwen3", keep: Any = (1,), *, softmax: Any = None, lightning: Any = None, **config: Any
) -> Any:
    teacher = make_pico(family, **config)
    plan = SurgeryPlan.for_model(teacher, keep=list(keep), softmax_options=softmax, mixer_options=lightning)
    return transplant(teacher, plan)


def uneven() -> Any:
    teacher = make_pico()
    plan = SurgeryPlan.for_model(teacher, keep=[1, 2]).to_dict()
    plan["layers"][2]["options"]["output_gate"] = False
    return transplant(teacher, SurgeryPlan.from_dict(plan))


INEXPRESSIBLE = {
    "no hybrid": (make_pico, "only hybrids of halobench"),
    "another family": (lambda: hybrid("llama"), "made from llama.*qwen3 alone"),
    "a norm a head": (lambda: hybrid(lightning={"norm_scope": "head"}), "norm_scope is 'head'"),
    "convolutions": (lambda: hybrid(lightning={"short_conv": 3}), "short_conv = 3"),
    "a broken base": (lambda: hybrid(softmax={"logits_scale_base": 40.5}), "logits_scale_base is 40.5"),
    "another mixer": (lambda: transplant(make_pico(), SurgeryPlan.for_model(make_pico(), mixer="simple_gla", keep=1)),
                      "has 'simple_gla' layers"),
    "layers of a kind that differ": (uneven, "attn_use_output_gate would be true in layer 1 and false in layer 2"),
    "a window": (lambda: hybrid(use_sliding_window=True, sliding_window=8, max_window_layers=0), "source has"),
    "a biased gate": (lambda: hybrid(attention_bias=True), "attention_bias is true"),
    "another RoPE": (
        lambda: hybrid(rope_parameters={"rope_type": "dynamic", "rope_theta": 1e4, "factor": 2.0}),
        "rope_type is .dynamic",
    ),
    "weights of two types": (lambda: (model := hybrid(), model.backbone.model.norm.bfloat16())[0], "several types"),
}  # fmt: skip


@pytest.mark.parametrize("case", INEXPRESSIBLE)
def test_a_hybrid_that_the_layout_cannot_express_is_refused_with_the_reason(tmp_path, case) -> None:
    build, message = INEXPRESSIBLE[case]
    with pytest.raises(UserError, match=message) as caught:
        export_hypenet(build(), tmp_path / "out")
    assert "\n" not in str(caught.value) and not list(tmp_path.iterdir())


# The commands


@pytest.fixture
def checkpoint(tmp_path, bpe) -> Path:
    folder = write_released(tmp_path / "hypenet-pico", vocab_size=len(bpe))
    bpe.save_pretrained(folder)
    return folder


def test_a_user_imports_evaluates_and_exports(tmp_path, checkpoint, bpe) -> None:
    told = in_a_shell(tmp_path, "import", checkpoint, "-o", "ours", "--teacher", "pico").stdout
    assert "4 layers: 3 lightning (0 2-3), 1 softmax (1)" in told and "float32" in told
    card = json.loads((tmp_path / "ours" / "halobench.json").read_text())
    assert (card["name"], card["kept"], card["mixer"], card["positions"]) == ("hypenet-pico", [1], "lightning", "hype")
    assert card["teacher"] == "pico" and card["parameters"] == sum(x.numel() for x in load_tensors(checkpoint).values())
    records = json.loads(
        run(tmp_path, "eval", "ours", "--suite", "niah", "--lengths", "256", "--limit", "1", "-o", "e", "--json").stdout
    )
    assert records[0]["model"]["hash"] == card["hash"] and records[0]["metrics"]
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "ours")
    expected = released_logits(json.loads((checkpoint / "config.json").read_text()), load_tensors(checkpoint))
    torch.testing.assert_close(loaded(IDS).logits[0].detach(), expected, rtol=1e-4, atol=1e-4)
    in_a_shell(tmp_path, "export", "ours", "--format", "hypenet", "-o", "back")
    before, after = load_tensors(checkpoint), load_tensors(tmp_path / "back")
    assert before.keys() == after.keys() and all(torch.equal(before[name], after[name]) for name in before)
    ours = json.loads((tmp_path / "back" / "tokenizer.json").read_text())
    assert ours == json.loads((checkpoint / "tokenizer.json").read_text())


def load_tensors(folder: Path) -> dict[str, Tensor]:
    return load_file(folder / "model.safetensors")


def test_a_checkpoint_without_a_tokenizer_is_imported_and_that_is_said(tmp_path) -> None:
    told = run(tmp_path, "import", write_released(tmp_path / "released"), "-o", tmp_path / "ours").stdout
    assert "has no tokenizer" in told and (tmp_path / "ours" / "config.json").exists()


def edit(folder: Path, **changes: object) -> None:
    config = {**json.loads((folder / "config.json").read_text()), **changes}
    (folder / "config.json").write_text(json.dumps(config))


def edit_tensors(folder: Path, **changes: Tensor | None) -> None:
    tensors: dict[str, Any] = {**load_tensors(folder)}
    for name, tensor in changes.items():
        tensors[f"model.layers.{name.replace('__', '.')}"] = tensor
    save_file({name: x for name, x in tensors.items() if x is not None}, folder / "model.safetensors")


def pickled(folder: Path) -> None:
    torch.save(load_tensors(folder), folder / "pytorch_model.bin")
    (folder / "model.safetensors").unlink()


def doubled(folder: Path) -> None:
    for name in ("a.safetensors", "b.safetensors"):
        shutil.copy(folder / "model.safetensors", folder / name)
    index = {"weight_map": {"x": "a.safetensors", "y": "b.safetensors"}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))


GATE = "1__self_attn__o_gate__weight"
REFUSED: dict[str, tuple[Any, str]] = {
    "unknown field": (lambda f: edit(f, attn_use_rop=True), "'attn_use_rop'; did you mean 'attn_use_rope'"),
    "field of the wrong type": (lambda f: edit(f, hidden_size="32"), "hidden_size must be int, got str '32'"),
    "unknown class": (lambda f: edit(f, architectures=["LlamaForCausalLM"]), "architectures is .*HypeNetForCausalLM"),
    "another model": (lambda f: edit(f, model_type="qwen3"), 'model_type is "qwen3"; allowed: "hypenet"'),
    "ours already": (lambda f: edit(f, model_type="halobench_hybrid"), "is a hybrid of halobench already"),
    "gdn layers": (lambda f: edit(f, mixer_types=["gdn"] * 4), 'mixer_types is "gdn"; allowed: attn, lightning-attn'),
    "kda layers": (lambda f: edit(f, mixer_types=["attn", "kda", "attn", "attn"]), 'mixer_types is "kda"'),
    "too few mixers": (lambda f: edit(f, mixer_types=["attn"]), "number of mixer_types is 1; allowed: .* 4"),
    "a constant logits scale": (lambda f: edit(f, attn_logits_scaling=1.5), 'scaling is 1.5; allowed: null, "hype"'),
    "a word for no scale": (lambda f: edit(f, attn_logits_scaling="none"), 'scaling is "none"; allowed: null'),
    "a broken base": (lambda f: edit(f, attn_logits_scaling="hype 2.5"), "whole number above 1"),
    "a base that is no number": (lambda f: edit(f, attn_logits_scaling="hype x"), "whole number above 1"),
    "another scale": (lambda f: edit(f, lightning_scale="d"), r'lightning_scale is "d"; allowed: 1/sqrt\(d\), 1/d, 1'),
    "other heads": (lambda f: edit(f, lightning_nh=2), "lightning_nh is 2; allowed: num_attention_heads, 4"),
    "other kv heads": (lambda f: edit(f, lightning_nkv=1), "lightning_nkv is 1; allowed: .*4 or 2"),
    "another head size": (lambda f: edit(f, lightning_head_dim=16), "lightning_head_dim is 16; allowed: head_dim, 8"),
    "short convolutions": (lambda f: edit(f, lightning_use_short_conv=True), "short_conv is true; allowed: false"),
    "rope of its own": (lambda f: edit(f, lightning_rope_scaling=True), "lightning_rope_scaling is true"),
    "a window": (lambda f: edit(f, use_sliding_window=True), "use_sliding_window is true"),
    "biased gates": (lambda f: edit(f, attention_bias=True), "attention_bias is true; .*the gate has a bias"),
    "YaRN": (lambda f: edit(f, rope_scaling={"rope_type": "yarn", "factor": 4.0}), 'rope_type is "yarn"; allowed'),
    "rope without its factor": (lambda f: edit(f, rope_scaling={"rope_type": "linear"}), "rope_scaling is .*factor"),
    "two thetas": (lambda f: edit(f, rope_parameters={"rope_theta": 5.0}), "rope_theta is 10000.0; allowed: .*5.0"),
    "two activations": (lambda f: edit(f, mlp_hidden_act="gelu"), 'mlp_hidden_act is "gelu"; allowed'),
    "uneven groups": (lambda f: edit(f, num_key_value_heads=3), "num_key_value_heads is 3; allowed: a divisor"),
    "no heads": (lambda f: edit(f, num_attention_heads=0), "num_attention_heads is 0; allowed: 1 or more"),
    "no config": (lambda f: (f / "config.json").unlink(), "has no config.json"),
    "damaged config": (lambda f: (f / "config.json").write_text("{"), "not valid JSON"),
    "a list for a config": (lambda f: (f / "config.json").write_text("[]"), "holds a list"),
    "missing tensor": (lambda f: edit_tensors(f, **{GATE: None}), "lacks 1 tensors: model.layers.1.self_attn.o_gate"),
    "extra tensor": (lambda f: edit_tensors(f, **{"0__self_attn__o_gate__weight": torch.zeros(32, 32)}), "has beyond"),
    "misshapen tensor": (lambda f: edit_tensors(f, **{GATE: torch.zeros(3, 32)}), r"is \(3, 32\), expected \(32, 32\)"),
    "mixed types": (lambda f: edit_tensors(f, **{GATE: torch.zeros(32, 32).half()}), "weights of type F16, F32"),
    "pickles": (pickled, "pickle only"),
    "empty file": (lambda f: (f / "model.safetensors").write_bytes(b""), "damaged or cut short"),
    "no weights": (lambda f: (f / "model.safetensors").unlink(), "holds no weights"),
    "a tensor in two files": (doubled, "in both a.safetensors and b.safetensors"),
    "damaged index": (lambda f: (f / "model.safetensors.index.json").write_text("{"), "index.json is damaged"),
    "damaged tokenizer": (lambda f: (f / "tokenizer.json").write_text("{"), "no tokenizer that can be loaded"),
}  # fmt: skip


@pytest.mark.parametrize("kind", REFUSED)
def test_what_cannot_be_imported_is_told_in_one_line_and_nothing_is_written(tmp_path, kind) -> None:
    breakage, message = REFUSED[kind]
    folder = write_released(tmp_path / "released")
    breakage(folder)
    before = sorted(path.name for path in folder.iterdir())
    found = run(tmp_path, "import", folder, "-o", tmp_path / "ours", check=False)
    assert found.returncode == 2 and found.stderr.count("\n") == 1
    assert re.search(message, found.stderr), found.stderr
    assert [path.name for path in tmp_path.iterdir()] == ["released"]
    assert sorted(path.name for path in folder.iterdir()) == before


def test_places_and_names_that_do_not_fit_are_refused(tmp_path, teacher) -> None:
    released = write_released(tmp_path / "released")
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "diary.txt").write_text("dear")
    save_model(tmp_path / "plain", teacher)
    run(tmp_path, "import", released, "-o", tmp_path / "ours")
    refused = {
        "not an empty folder": ("import", released, "-o", tmp_path / "full"),
        "does not exist": ("import", tmp_path / "nowhere", "-o", tmp_path / "new"),
        "exists and is not": ("export", tmp_path / "ours", "-o", tmp_path / "full"),
        "unknown format 'hypenets'; did you mean 'hypenet'": (
            "export", tmp_path / "ours", "--format", "hypenets", "-o", tmp_path / "new",
        ),
        "only hybrids of halobench": ("export", tmp_path / "plain", "-o", tmp_path / "new"),
        "halobench import": ("export", released, "-o", tmp_path / "new"),
        "Missing option": ("import", released),
    }  # fmt: skip
    for message, arguments in refused.items():
        found = run(tmp_path, *arguments, check=False)
        assert found.returncode == 2 and found.stderr.count("\n") == 1 and message in found.stderr, found.stderr
    assert (tmp_path / "full" / "diary.txt").read_text() == "dear" and not (tmp_path / "new").exists()


def test_an_empty_folder_may_be_written_into(tmp_path) -> None:
    (tmp_path / "ours").mkdir()
    run(tmp_path, "import", write_released(tmp_path / "released"), "-o", tmp_path / "ours")
    assert load_model(tmp_path / "ours").config.num_hidden_layers == 4
