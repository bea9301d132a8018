"""The hybrid model: identity, transformers' own interface, and parity with a released architecture."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForSequenceClassification, DynamicCache

from halobench.errors import UserError
from halobench.surgery import HybridForCausalLM, SurgeryPlan, transplant
from halobench.surgery.anatomy import decoder_layers
from halobench.surgery.checkpoint import load_model, save_model
from halobench.surgery.transplant import build_mixers, swapped

PARITY = Path(__file__).resolve().parents[2] / "shared" / "parity" / "hypenet-tiny-a"
every_keep = pytest.mark.parametrize("keep", [0, 2], ids=["all recurrent", "two softmax"])


def student_of(teacher, keep=2, **arguments) -> HybridForCausalLM:
    torch.manual_seed(7)
    return transplant(teacher, SurgeryPlan.for_model(teacher, keep=keep, **arguments)).eval()


def padded(tokens: Tensor, side: str, pads: int = 9) -> tuple[Tensor, Tensor, slice]:
    """Two copies of the first row, the second short and padded; its mask and where its real tokens are."""
    length = tokens.shape[1]
    ids, mask = tokens[:2].clone(), torch.ones(2, length, dtype=torch.long)
    gap = slice(0, pads) if side == "left" else slice(length - pads, length)
    mask[1, gap], ids[1, gap] = 0, 2
    return ids, mask, slice(pads, length) if side == "left" else slice(0, length - pads)


# A plan that changes nothing


@torch.no_grad()
def test_final_hidden_states_of_an_unchanged_student_unembed_to_the_teachers_logits(teacher, tokens) -> None:
    student = transplant(teacher, SurgeryPlan.for_model(teacher))
    assert torch.equal(student.unembed(student.final_hidden(tokens)), teacher(tokens).logits)
    for side in ("left", "right"):
        ids, mask, _ = padded(tokens, side)
        assert torch.equal(student(ids, attention_mask=mask).logits, teacher(ids, attention_mask=mask).logits)


@torch.no_grad()
def test_a_window_of_the_source_is_respected_by_layers_kept_untouched(pico, tokens) -> None:
    teacher = pico("mistral", sliding_window=8)
    student = transplant(teacher, SurgeryPlan.for_model(teacher))
    assert torch.equal(student(tokens).logits, teacher(tokens).logits)
    expected = teacher.generate(tokens[:1], max_new_tokens=8, do_sample=False)
    assert torch.equal(student.generate(tokens[:1], max_new_tokens=8, do_sample=False), expected)


def test_generation_of_an_unchanged_student_is_the_teachers(teacher, tokens) -> None:
    student = transplant(teacher, SurgeryPlan.for_model(teacher))
    options = {"max_new_tokens": 12, "do_sample": False}
    assert torch.equal(student.generate(tokens, **options), teacher.generate(tokens, **options))


def test_the_teacher_is_untouched_and_shares_no_memory(teacher, tokens) -> None:
    before = {name: tensor.clone() for name, tensor in teacher.state_dict().items()}
    student = student_of(teacher)
    with torch.no_grad():
        for parameter in student.parameters():
            parameter.fill_(0.5)
    assert all(torch.equal(tensor, before[name]) for name, tensor in teacher.state_dict().items())
    assert not hasattr(decoder_layers(teacher)[0][0].self_attn, "mixer")


@torch.no_grad()
def test_softmax_layers_with_rope_and_a_neutral_gate_equal_the_teacher(teacher, tokens) -> None:
    student = student_of(teacher, keep=4, softmax_options={"rope": True, "gate_init": "neutral"})
    torch.testing.assert_close(student(tokens).logits, teacher(tokens).logits, rtol=1e-3, atol=1e-4)
    ids, mask, real = padded(tokens, "left")
    expected = teacher(ids, attention_mask=mask).logits[1, real]
    torch.testing.assert_close(student(ids, attention_mask=mask).logits[1, real], expected, rtol=1e-3, atol=1e-3)


# The interface of transformers


@every_keep
@pytest.mark.parametrize("side", ["left", "right"])
@torch.no_grad()
def test_padding_on_either_side_leaves_the_logits_of_real_tokens(teacher, tokens, keep, side) -> None:
    student = student_of(teacher, keep)
    student.set_logits_scale(50.0)
    ids, mask, real = padded(tokens, side)
    alone = student(ids[1:, real]).logits
    torch.testing.assert_close(student(ids, attention_mask=mask).logits[1:, real], alone, rtol=1e-4, atol=1e-4)


@torch.no_grad()
def test_untouched_and_mixed_layers_agree_on_padding(teacher, tokens) -> None:
    student = student_of(teacher, hype=False)
    ids, mask, real = padded(tokens, "left")
    alone = student(ids[1:, real]).logits
    torch.testing.assert_close(student(ids, attention_mask=mask).logits[1:, real], alone, rtol=1e-4, atol=1e-4)


@every_keep
@pytest.mark.parametrize("hype", [True, False])
@torch.no_grad()
def test_prefill_in_pieces_then_token_by_token_gives_the_logits_of_one_call(teacher, tokens, keep, hype) -> None:
    student = student_of(teacher, keep, hype=hype)
    if hype:
        student.set_logits_scale(50.0)
    whole, cache = student(tokens).logits, student.new_cache()
    bounds = [0, 11, 12, 30, *range(31, 41)]
    parts = [student(tokens[:, a:b], past_key_values=cache).logits for a, b in zip(bounds, bounds[1:], strict=False)]
    torch.testing.assert_close(torch.cat(parts, dim=1), whole, rtol=1e-4, atol=1e-4)
    assert cache.get_seq_length() == 40


@every_keep
@torch.no_grad()
def test_a_padded_batch_is_prefilled_in_pieces_like_its_rows_alone(teacher, tokens, keep) -> None:
    student = student_of(teacher, keep)
    student.set_logits_scale(50.0)
    ids, mask, real = padded(tokens, "left")
    cache = student.new_cache()
    parts = [
        student(ids[:, a:b], attention_mask=mask[:, :b], past_key_values=cache).logits
        for a, b in ((0, 5), (5, 20), (20, 40))
    ]
    alone = student(ids[1:, real]).logits
    torch.testing.assert_close(torch.cat(parts, dim=1)[1:, real], alone, rtol=1e-4, atol=1e-4)


@every_keep
@pytest.mark.parametrize("beams", [1, 3])
def test_generation_does_not_depend_on_batch_neighbours(teacher, tokens, keep, beams) -> None:
    student = student_of(teacher, keep)
    student.set_logits_scale(50.0)
    options = {"max_new_tokens": 8, "do_sample": False, "num_beams": beams, "eos_token_id": -1, "pad_token_id": 2}
    ids, mask, real = padded(tokens, "left")
    together = student.generate(ids, attention_mask=mask, **options)[:, 40:]
    alone = student.generate(ids[1:, real], attention_mask=mask[1:, real], **options)[:, 31:]
    assert torch.equal(together[1:], alone)
    full = student.generate(ids[:1], attention_mask=mask[:1], **options)[:, 40:]
    assert torch.equal(together[:1], full)


@every_keep
def test_cached_generation_equals_generation_without_a_cache(teacher, tokens, keep) -> None:
    student = student_of(teacher, keep)
    for beams in (1, 3):
        options = {"max_new_tokens": 8, "do_sample": False, "num_beams": beams}
        cached = student.generate(tokens, **options)
        assert torch.equal(cached, student.generate(tokens, use_cache=False, **options))
    assert torch.equal(cached, student.generate(tokens, prefill_chunk_size=7, **options))


def test_sampling_is_repeatable_and_uses_the_hybrid_cache(teacher, tokens) -> None:
    student = student_of(teacher)
    answers = []
    for _ in range(2):
        torch.manual_seed(0)
        answers.append(student.generate(tokens, max_new_tokens=6, do_sample=True, return_dict_in_generate=True))
    assert torch.equal(answers[0].sequences, answers[1].sequences)
    assert type(answers[0].past_key_values).__name__ == "HybridCache"


@torch.no_grad()
def test_a_prefilled_text_can_be_asked_several_questions(teacher, tokens) -> None:
    student = student_of(teacher)
    cache = student.new_cache()
    student(tokens[:1, :30], past_key_values=cache, logits_to_keep=1)
    for question in (tokens[1:2, :5], tokens[2:3, :5]):
        asked = student(question, past_key_values=cache.clone()).logits
        fresh = student(torch.cat((tokens[:1, :30], question), dim=1)).logits[:, 30:]
        torch.testing.assert_close(asked, fresh, rtol=1e-4, atol=1e-4)
    assert cache.get_seq_length() == 30


@torch.no_grad()
def test_final_hidden_states_unembed_to_the_logits(teacher, tokens) -> None:
    student = student_of(teacher)
    ids, mask, _ = padded(tokens, "left")
    logits = student(ids, attention_mask=mask).logits
    assert torch.equal(student.unembed(student.final_hidden(ids, attention_mask=mask)), logits)
    torch.testing.assert_close(student(ids, attention_mask=mask, logits_to_keep=1).logits, logits[:, -1:])


def test_labels_give_the_shifted_cross_entropy(teacher, tokens) -> None:
    student = student_of(teacher)
    output = student(tokens, labels=tokens)
    expected = torch.nn.functional.cross_entropy(output.logits[:, :-1].flatten(0, 1), tokens[:, 1:].flatten())
    torch.testing.assert_close(output.loss, expected)


def test_gradient_checkpointing_gives_the_same_gradients(teacher, tokens) -> None:
    gradients = []
    for checkpointing in (False, True):
        student = student_of(teacher).train()
        if checkpointing:
            student.gradient_checkpointing_enable()
        student(tokens, labels=tokens).loss.backward()
        gradients.append({name: p.grad for name, p in student.named_parameters()})
    assert all(grad is not None for grad in gradients[0].values())
    for name, grad in gradients[0].items():
        torch.testing.assert_close(gradients[1][name], grad, rtol=1e-4, atol=1e-6)


@torch.no_grad()
def test_bfloat16_stays_near_float32(teacher, tokens) -> None:
    student = student_of(teacher)
    expected = student(tokens).logits
    got = student.bfloat16()(tokens).logits
    assert got.dtype == torch.bfloat16
    assert (got.float() - expected).norm() / expected.norm() < 0.1
    assert student.generate(tokens, max_new_tokens=4, do_sample=False).shape == (3, 44)


def test_mixers_of_another_layer_and_models_that_could_not_be_loaded_again_are_refused(teacher) -> None:
    mixers = build_mixers(teacher, "lightning")
    plan = SurgeryPlan.for_model(teacher, keep=0)
    with pytest.raises(UserError, match="given for layer 0 was made for layer 3"):
        transplant(teacher, plan, {0: mixers[3]})
    student = transplant(teacher, SurgeryPlan.for_model(teacher))
    with pytest.raises(UserError, match="was made for layer 1"), swapped(student, {0: mixers[1]}):
        pass
    classifier = AutoModelForSequenceClassification.from_config(teacher.config)
    with pytest.raises(UserError, match="AutoModelForCausalLM builds Qwen3ForCausalLM"):
        transplant(classifier, plan)


def test_gradients_flow_through_a_cache(teacher, tokens) -> None:
    gradients = []
    for cached in (True, False):
        student = student_of(teacher).train()
        cache = student.new_cache() if cached else None
        if cached:
            logits = torch.cat(
                [student(tokens[:, a:b], past_key_values=cache).logits for a, b in ((0, 17), (17, 40))], 1
            )
        else:
            logits = student(tokens).logits
        logits.square().mean().backward()
        gradients.append({name: p.grad for name, p in student.named_parameters()})
    for name, gradient in gradients[1].items():
        torch.testing.assert_close(gradients[0][name], gradient, rtol=1e-3, atol=1e-5)


def test_resized_embeddings_and_edits_of_the_source_are_saved(teacher, tokens, tmp_path) -> None:
    student = student_of(teacher)
    student.resize_token_embeddings(120)
    student.backbone.config.max_position_embeddings = 999
    assert student(tokens, labels=tokens).loss.isfinite() and student.config.vocab_size == 120
    save_model(tmp_path / "student", student)
    loaded = load_model(tmp_path / "student")
    assert torch.equal(loaded(tokens).logits, student(tokens).logits)
    assert loaded.backbone.config.max_position_embeddings == 999 and loaded.config.vocab_size == 120


def test_several_texts_packed_into_a_row_are_refused(teacher, tokens) -> None:
    student = student_of(teacher)
    packed = torch.cat((torch.arange(25), torch.arange(15)))[None].expand(3, -1)
    with pytest.raises(UserError, match="packed into one"):
        student(tokens, position_ids=packed)
    shifted = student(tokens, position_ids=torch.arange(100, 140)[None])
    assert shifted.logits.isfinite().all()


def test_a_foreign_cache_and_a_mask_of_the_wrong_length_are_refused(teacher, tokens) -> None:
    student = student_of(teacher)
    with pytest.raises(UserError, match="DynamicCache.*new_cache"):
        student(tokens, past_key_values=DynamicCache())
    with pytest.raises(UserError, match=r"shape \(3, 39\), expected \(3, 40\)"):
        student(tokens, attention_mask=torch.ones(3, 39))
    with pytest.raises(UserError, match="cannot hold recurrent states"):
        student.generate(tokens, max_new_tokens=2, cache_implementation="static")
    with pytest.raises(UserError, match="call the HybridForCausalLM and not the decoder"):
        student.backbone(tokens)


# Mixers in and out


@torch.no_grad()
def test_the_logits_scale_is_set_here_and_in_the_config(teacher, tokens) -> None:
    student = student_of(teacher)
    plain = student(tokens).logits
    student.set_logits_scale(30.0)
    assert not torch.allclose(student(tokens).logits, plain)
    assert [student.config.surgery_plan().layers[i].options["logits_scale_base"] for i in (1, 3)] == [30.0, 30.0]
    student.set_logits_scale(None)
    assert torch.equal(student(tokens).logits, plain)
    with pytest.raises(UserError, match="above 1"):
        student.set_logits_scale(0.5)


@torch.no_grad()
def test_aligned_mixers_are_put_in_and_not_shared(teacher, tokens) -> None:
    mixers = build_mixers(teacher, "lightning")
    for mixer in mixers.values():
        mixer.z_proj.weight.fill_(0.3)
    student = transplant(teacher, SurgeryPlan.for_model(teacher, keep=[1]), mixers).eval()
    placed = student.mixer_modules()
    assert sorted(placed) == [0, 1, 2, 3] and placed[1].name == "softmax"
    assert (placed[0].z_proj.weight == 0.3).all()
    before = student(tokens).logits
    mixers[0].z_proj.weight.zero_()
    assert torch.equal(student(tokens).logits, before)


def test_aligned_mixers_of_other_options_or_layers_are_refused(teacher) -> None:
    plan = SurgeryPlan.for_model(teacher, keep=1)
    with pytest.raises(UserError, match="layer 0 has options"):
        transplant(teacher, plan, build_mixers(teacher, "lightning", {"rope": False}))
    with pytest.raises(UserError, match=r"layers \[4\]"):
        transplant(teacher, plan, {4: build_mixers(teacher, "lightning")[0]})
    with pytest.raises(UserError, match="plan is for 4 layers, the model has 3"):
        transplant(_with_layers(3), plan)


def _with_layers(layers: int):
    config = AutoConfig.for_model("qwen3", hidden_size=32, num_hidden_layers=layers, num_attention_heads=2,
                                  num_key_value_heads=1, head_dim=16, vocab_size=50, intermediate_size=32)  # fmt: skip
    return AutoModelForCausalLM.from_config(config)


@torch.no_grad()
def test_mixers_are_swapped_in_place_for_the_length_of_a_block(teacher, tokens) -> None:
    student = transplant(teacher, SurgeryPlan.for_model(teacher)).eval()
    original = student(tokens).logits
    mixer = build_mixers(teacher, "lightning")[2]
    with swapped(student, {2: mixer, 3: None}) as model:
        assert model is student and list(model.mixer_modules()) == [2]
        within = model(tokens).logits
        generated = model.generate(tokens, max_new_tokens=3, do_sample=False)
    assert torch.equal(student(tokens).logits, original) and not torch.allclose(within, original)
    plan = SurgeryPlan.for_model(teacher, keep=[0, 1, 3], hype=False)
    real = transplant(teacher, plan, {2: mixer}).eval()
    assert torch.equal(real(tokens).logits, within)
    assert torch.equal(real.generate(tokens, max_new_tokens=3, do_sample=False), generated)
    with pytest.raises(RuntimeError, match="inside"), swapped(student, {2: mixer}):
        raise RuntimeError("inside")
    assert torch.equal(student(tokens).logits, original)


def test_a_hybrid_is_no_teacher_unless_it_changed_nothing(teacher, tokens) -> None:
    same = transplant(teacher, SurgeryPlan.for_model(teacher))
    assert student_of(same).mixer_modules().keys() == {0, 1, 2, 3}
    with pytest.raises(UserError, match="hybrid already"):
        student_of(student_of(teacher))


# Parity


def _released() -> HybridForCausalLM:
    """The released architecture's tiny model, its weights mapped by hand."""
    theirs = json.loads((PARITY / "config.json").read_text())
    same = ("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads",
            "head_dim", "vocab_size", "rms_norm_eps", "tie_word_embeddings", "max_position_embeddings")  # fmt: skip
    rope = {"rope_type": "default", "rope_theta": theirs["rope_theta"]}
    source = AutoConfig.for_model("qwen3", rope_parameters=rope, **{name: theirs[name] for name in same})
    keep = [index for index, kind in enumerate(theirs["mixer_types"]) if kind == "attn"]
    base = float(theirs["attn_logits_scaling"].removeprefix("hype "))
    plan = SurgeryPlan.for_model(source, keep=keep, softmax_options={"logits_scale_base": base})
    student = transplant(AutoModelForCausalLM.from_config(source), plan).eval()
    weights = load_file(PARITY / "model.safetensors")
    mapped = {f"backbone.{name.replace('self_attn.', 'self_attn.mixer.')}": tensor for name, tensor in weights.items()}
    missing, unexpected = student.load_state_dict(mapped, strict=False)
    assert missing == ["backbone.lm_head.weight"] and not unexpected  # tied to the embedding
    return student


@pytest.mark.skipif(not PARITY.is_dir(), reason="the parity fixture is not beside the repository")
@torch.no_grad()
def test_logits_equal_those_of_the_released_architecture_in_prefill_and_decoding() -> None:
    student = _released()
    expected = load_file(PARITY / "expected.safetensors")
    ids, prefill = expected["input_ids"], json.loads((PARITY / "expected.json").read_text())["prefill"]
    torch.testing.assert_close(student(ids).logits[0], expected["logits"], rtol=1e-4, atol=1e-4)
    cache = student.new_cache()
    decoded = [student(ids[:, :prefill], past_key_values=cache).logits[0, -1]]
    decoded += [student(ids[:, t : t + 1], past_key_values=cache).logits[0, -1] for t in range(prefill, ids.shape[1])]
    torch.testing.assert_close(torch.stack(decoded), expected["decode_logits"], rtol=1e-4, atol=1e-4)


@pytest.mark.skipif(not PARITY.is_dir(), reason="the parity fixture is not beside the repository")
@torch.no_grad()
def test_parity_hangs_on_the_logits_scale_and_the_norm_over_all_heads() -> None:
    """The fixture must be able to tell: each of these, left out, breaks the agreement."""
    expected = load_file(PARITY / "expected.safetensors")
    student = _released()
    student.set_logits_scale(None)
    assert not torch.allclose(student(expected["input_ids"]).logits[0], expected["logits"], rtol=1e-3, atol=1e-3)
    student = _released()
    for mixer in student.mixer_modules().values():
        if mixer.name == "lightning":
            mixer.o_norm.groups = mixer.num_heads
    assert not torch.allclose(student(expected["input_ids"]).logits[0], expected["logits"], rtol=1e-3, atol=1e-3)
