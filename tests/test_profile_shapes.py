"""Presets with random weights, and floors from shapes against sums made by hand."""

import pytest
import torch
from transformers import AutoModelForCausalLM

from halobench.errors import UserError
from halobench.floors import sizes_of, theory_of, with_theory
from halobench.shapes import (
    RELEASED,
    check_room,
    empty_preset,
    fill,
    preset_card,
    preset_config,
    preset_names,
    preset_of,
)
from halobench.surgery.plan import SurgeryPlan
from halobench.surgery.transplant import transplant
from halobench.tasks import machine
from halobench.tasks.machine import Machine
from halobench.tasks.profile import profile_model

CPU = torch.device("cpu")
MACHINE = Machine(
    device="cpu", dtype="float32", buffer_bytes=1, copy_bytes_per_s=1e9, copy_stderr=None, read_bytes_per_s=2e9,
    read_stderr=None, matmul_size=1, flops_per_s=1e10, flops_stderr=None,
)  # fmt: skip
# Of the pico: q, k, v, o and the MLP of four layers, and the output projection.
PROJECTIONS = 4 * (48 * 48 + 2 * 48 * 24 + 48 * 48)
MULTIPLIED = PROJECTIONS + 4 * 3 * 48 * 64 + 101 * 48


def test_the_floor_of_a_decoder_is_its_weights_and_cache_over_the_bandwidth(teacher) -> None:  # type: ignore[no-untyped-def]
    found = theory_of(sizes_of(teacher), MACHINE, context=100, batch=3, chunk=4096)
    keys = 3 * 4 * 2 * 24 * 100 * 4
    assert (found.kv_bytes, found.state_bytes) == (keys, 0)
    assert found.read_bytes == 4 * MULTIPLIED + keys
    assert found.tpot_floor_ms == pytest.approx(1000 * found.read_bytes / 2e9)
    attention = 4 * 4 * 4 * 12 * sum(range(1, 101))  # layers, q . k and weights . v as multiply-adds, heads, size, keys
    whole = 3 * (100 * (2 * MULTIPLIED - 2 * 101 * 48) + 2 * 101 * 48 + attention)
    assert found.prompt_flops == pytest.approx(whole)
    assert found.ttft_floor_s == pytest.approx(whole / 1e10)
    assert found.weight_bytes == sum(p.nbytes for p in teacher.parameters())
    assert found.peak_bytes == found.weight_bytes + keys + found.activation_bytes


def test_the_floor_of_a_hybrid_has_states_that_do_not_grow(teacher) -> None:  # type: ignore[no-untyped-def]
    sizes = sizes_of(transplant(teacher, SurgeryPlan.for_model(teacher, keep=[1])))
    short, long = (theory_of(sizes, MACHINE, context=n, batch=2, chunk=4096) for n in (100, 1000))
    assert short.state_bytes == long.state_bytes == 2 * 3 * 4 * 12 * 12 * 4
    assert 10 * short.kv_bytes == long.kv_bytes == 2 * 2 * 24 * 1000 * 4


def test_caches_of_the_theory_are_those_of_the_measurement(teacher) -> None:  # type: ignore[no-untyped-def]
    hybrid = transplant(teacher, SurgeryPlan.for_model(teacher, keep=[1])).eval()
    for model in (teacher, hybrid):
        (row,) = profile_model(model, [64], batch=2, new_tokens=1, repeats=1)
        row = with_theory(row, theory_of(sizes_of(model), MACHINE, context=64, batch=2, chunk=4096))
        assert (row.theory.kv_bytes, row.theory.state_bytes) == (row.kv_bytes, row.state_bytes)
        assert row.tpot_over_floor == pytest.approx(row.tpot_ms * 2e6 / row.theory.read_bytes)


@pytest.mark.parametrize("kept", [None, [1]])
def test_a_preset_computes_what_the_same_weights_compute_in_a_model_built_plainly(kept, teacher, tmp_path) -> None:  # type: ignore[no-untyped-def]
    model = teacher if kept is None else transplant(teacher, SurgeryPlan.for_model(teacher, keep=kept))
    model.save_pretrained(tmp_path)
    preset = preset_of(f"preset:{tmp_path}")
    filled = fill(empty_preset(preset, torch.float32), CPU)
    plain = AutoModelForCausalLM.from_config(preset_config(preset)).eval()
    plain.load_state_dict(filled.state_dict())
    ids = torch.arange(3, 40)[None]
    with torch.no_grad():
        logits = filled(input_ids=ids).logits
        assert torch.equal(logits, plain(input_ids=ids).logits)
    assert torch.isfinite(logits).all() and logits.std() > 0
    assert all(not p.is_meta for p in [*filled.parameters(), *filled.buffers()])
    card = preset_card(preset, filled)
    assert card.name.endswith("(random weights)") and card.kept == kept


def test_a_preset_ties_what_its_config_ties(pico, tmp_path) -> None:  # type: ignore[no-untyped-def]
    model = pico(tie_word_embeddings=True)
    for place, made in enumerate((model, transplant(model, SurgeryPlan.for_model(model, keep=[1])))):
        made.save_pretrained(tmp_path / str(place))
        filled = fill(empty_preset(str(tmp_path / str(place)), torch.bfloat16), CPU)
        assert filled.get_output_embeddings().weight is filled.get_input_embeddings().weight
        assert filled.dtype == torch.bfloat16


@pytest.mark.parametrize(
    ("name", "billions"), [("qwen3-0.6b", 0.596), ("hypenet-2b", 1.926), ("hypenet-5b", 4.824), ("hypenet-9b", 8.852)]
)
def test_shapes_have_the_published_number_of_parameters(name: str, billions: float) -> None:
    model = empty_preset(name, torch.bfloat16)
    assert sum(p.numel() for p in model.parameters()) / 1e9 == pytest.approx(billions, abs=0.001)
    if name in RELEASED:
        card = preset_card(name, model)
        assert (card.mixer, card.positions, tuple(card.kept)) == ("lightning", "hype", RELEASED[name].kept)
        assert card.teacher == preset_card(RELEASED[name].teacher, empty_preset("qwen3-0.6b", torch.bfloat16)).name


def test_every_name_is_known_with_and_without_its_prefix() -> None:
    assert {"qwen3-0.6b", "qwen3-1.7b", "qwen3-4b", "qwen3-8b", *RELEASED} <= set(preset_names())
    assert preset_of("preset:qwen3-8b") == preset_of("qwen3-8b") == "qwen3-8b"
    assert preset_of("tiny") is None and preset_of("owner/model") is None
    with pytest.raises(UserError, match="did you mean 'hypenet-2b'"):
        preset_of("preset:hypenet-2")


def test_a_preset_that_cannot_fit_is_refused_with_both_numbers(monkeypatch) -> None:  # type: ignore[no-untyped-def]
    monkeypatch.setattr(machine, "available_bytes", lambda _: 10**9)
    models = [empty_preset("qwen3-0.6b", torch.bfloat16)]
    with pytest.raises(UserError, match=r"qwen3-0.6b: the weights need 1.11 GiB, and 954 MiB are free on cpu"):
        check_room(models, ["qwen3-0.6b"], CPU)
    monkeypatch.setattr(machine, "available_bytes", lambda _: 2 * 10**9)
    check_room(models, ["qwen3-0.6b"], CPU)
