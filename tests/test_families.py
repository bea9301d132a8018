"""Every family times every mixer: read, operated on, run in batches and in pieces, saved and loaded."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import transformers
from packaging.version import Version
from transformers import AutoConfig, AutoModelForCausalLM

from halobench.errors import UserError
from halobench.mixers import MIXERS
from halobench.surgery import SurgeryPlan, transplant
from halobench.surgery.anatomy import describe, read_attention
from halobench.surgery.checkpoint import load_model, save_model
from halobench.surgery.transplant import build_mixers
from tests.families import FAMILIES, make_family

every_family = pytest.mark.parametrize("family", FAMILIES)
PADS = 9


def left_padded(tokens: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    ids, mask = tokens[:2].clone(), torch.ones(2, tokens.shape[1], dtype=torch.long)
    mask[1, :PADS], ids[1, :PADS] = 0, 2
    return ids, mask


# The identity law


@every_family
@torch.no_grad()
def test_a_plan_that_keeps_every_layer_gives_the_teachers_logits_bit_for_bit(family, tokens, tmp_path) -> None:
    teacher = make_family(family)
    student = transplant(teacher, SurgeryPlan.for_model(teacher, keep="all"))
    ids, mask = left_padded(tokens)
    expected = teacher(tokens).logits
    assert torch.equal(student(tokens).logits, expected)
    assert torch.equal(student(ids, attention_mask=mask).logits, teacher(ids, attention_mask=mask).logits)
    options = {"max_new_tokens": 12, "do_sample": False, "eos_token_id": -1, "pad_token_id": 2}
    assert torch.equal(student.generate(tokens, **options), teacher.generate(tokens, **options))
    save_model(tmp_path / "same", student)
    loaded = load_model(tmp_path / "same")
    assert torch.equal(loaded(tokens).logits, expected)
    assert torch.equal(loaded.generate(tokens, **options), teacher.generate(tokens, **options))


@every_family
@torch.no_grad()
def test_softmax_layers_built_from_the_views_behave_as_the_teachers(family, tokens) -> None:
    """Beyond the windows (8) and in a padded batch: what a view says is all there is to the family's attention."""
    teacher = make_family(family)
    plain = {"rope": True, "output_gate": False}
    student = transplant(teacher, SurgeryPlan.for_model(teacher, keep=4, softmax_options=plain))
    torch.testing.assert_close(student(tokens).logits, teacher(tokens).logits, rtol=1e-3, atol=2e-4)
    ids, mask = left_padded(tokens)
    places = (mask.cumsum(-1) - 1).clamp(min=0)  # which GPT-2 does not count by itself
    expected = teacher(ids, attention_mask=mask, position_ids=places).logits[1, PADS:]
    torch.testing.assert_close(student(ids, attention_mask=mask).logits[1, PADS:], expected, rtol=1e-3, atol=2e-4)
    options = {"max_new_tokens": 8, "do_sample": False, "eos_token_id": -1, "pad_token_id": 2}
    assert torch.equal(student.generate(tokens, **options), teacher.generate(tokens, **options))


@every_family
@torch.no_grad()
def test_sliding_windows_wider_than_the_text_change_nothing(family, tokens) -> None:
    teacher = make_family(family)
    student = transplant(
        teacher, SurgeryPlan.for_model(teacher, mixer="sliding_window", keep=0, mixer_options={"sinks": 0})
    )
    torch.testing.assert_close(student(tokens).logits, teacher(tokens).logits, rtol=1e-3, atol=2e-4)


# Every family with every mixer


@every_family
@pytest.mark.parametrize("mixer", MIXERS.names())
@torch.no_grad()
def test_family_with_mixer(family, mixer, tokens, tmp_path) -> None:
    """Pieces as at once, padded rows as alone, saved and loaded to the same bits, generated with a cache as without."""
    teacher = make_family(family)
    before = {name: tensor.clone() for name, tensor in teacher.state_dict().items()}
    torch.manual_seed(7)
    student = transplant(teacher, SurgeryPlan.for_model(teacher, mixer=mixer, keep=[1], hype=False)).eval()
    assert all(torch.equal(tensor, before[name]) for name, tensor in teacher.state_dict().items())
    whole = student(tokens).logits
    assert whole.isfinite().all()
    if mixer != "sliding_window":  # with which 40 tokens still fit the window
        assert not torch.allclose(whole, teacher(tokens).logits, atol=1e-2)
    cache = student.new_cache()
    bounds = [0, 11, 12, 30, *range(31, 41)]
    parts = [student(tokens[:, a:b], past_key_values=cache).logits for a, b in zip(bounds, bounds[1:], strict=False)]
    torch.testing.assert_close(torch.cat(parts, dim=1), whole, rtol=1e-3, atol=2e-4)
    ids, mask = left_padded(tokens)
    padded = student(ids, attention_mask=mask).logits[1:, PADS:]
    torch.testing.assert_close(padded, student(ids[1:, PADS:]).logits, rtol=1e-3, atol=2e-4)
    save_model(tmp_path / "student", student)
    loaded = load_model(tmp_path / "student")
    assert torch.equal(loaded(tokens).logits, whole)
    options = {"max_new_tokens": 4, "do_sample": False, "eos_token_id": -1, "pad_token_id": 2}
    assert torch.equal(loaded.generate(tokens, **options), student.generate(tokens, use_cache=False, **options))


@every_family
def test_gradients_reach_every_mixer_through_checkpointing(family, tokens) -> None:
    teacher = make_family(family)
    gradients = []
    for checkpointing in (False, True):
        torch.manual_seed(7)
        student = transplant(teacher, SurgeryPlan.for_model(teacher, keep=[1])).train()
        if checkpointing:
            student.gradient_checkpointing_enable()
        student(tokens, labels=tokens).loss.backward()
        gradients.append({n: p.grad for m in student.mixer_modules().values() for n, p in m.named_parameters()})
    for name, gradient in gradients[0].items():
        assert gradient is not None and gradient.isfinite().all(), name
        torch.testing.assert_close(gradients[1][name], gradient, rtol=1e-3, atol=1e-6)


@torch.no_grad()
def test_each_layer_may_have_its_own_mixer_and_options(tokens) -> None:
    teacher = make_family("llama")
    plan = SurgeryPlan.for_model(
        teacher, mixer="gated_deltanet", keep=[1, 3], mixer_options={"short_conv": 4}, hype=False
    )
    plan = plan.with_layer(2, "lightning", output_gate=False).with_layer(3, "softmax")
    student = transplant(teacher, plan)
    assert [m.name for m in student.mixer_modules().values()] == ["gated_deltanet", "lightning", "softmax"]
    assert student.mixer_modules()[0].options.short_conv == 4 and not student.mixer_modules()[2].options.output_gate
    assert student.generate(tokens, max_new_tokens=3, do_sample=False).shape == (3, 43)
    with pytest.raises(UserError, match="no layer 4; its layers are 0 to 3"):
        plan.with_layer(4, "gla")


# Reading


@every_family
def test_a_config_alone_describes_what_the_weights_show(family) -> None:
    model = make_family(family)
    views, shapes = read_attention(model), describe(model.config)
    assert [view.parameters for view in shapes] == [view.parameters for view in views]
    assert shapes[0].q_weight.device.type == "meta"
    for field in (
        "num_heads",
        "num_kv_heads",
        "head_dim",
        "rotary_dim",
        "rope_interleaved",
        "sliding_window",
        "scaling",
    ):
        assert [getattr(view, field) for view in shapes] == [getattr(view, field) for view in views], field
    assert views[0].rope == (family != "gpt2")


def test_what_is_particular_to_a_family_is_in_its_views() -> None:
    views = {family: read_attention(make_family(family)) for family in FAMILIES}
    assert [v.sliding_window for v in views["gemma3_text"]] == [8, None, 8, None]
    assert [v.rope for v in views["cohere2"]] == [True, False, True, False]
    assert [v.rope for v in views["smollm3"]] == [True, False, True, False]
    assert [v.scaling for v in views["gpt2"]] == [12**-0.5 / (layer + 1) for layer in range(4)]
    assert views["phi3"][0].rotary_dim == 6 and views["gpt_neox"][0].rotary_dim == 6
    assert views["cohere"][0].rope_interleaved and views["glm"][0].rope_interleaved
    assert views["olmo2"][0].q_norm.scope == "all" and not views["olmo2"][0].q_norm.centred
    assert views["phi"][0].q_norm.centred and views["stablelm"][0].q_norm.weight.shape == (4, 12)
    assert views["gpt_oss"][0].sinks is not None and views["gemma2"][0].soft_cap == 3.0
    gemma = make_family("gemma3_text")
    stored = gemma.model.layers[0].self_attn.q_norm.weight
    torch.testing.assert_close(read_attention(gemma)[0].q_norm.weight, 1 + stored)


REFUSED = {
    "t5": "t5 is an encoder-decoder",
    "bart": "bart is an encoder-decoder",
    "deepseek_v3": "latent attention",
    "mamba2": "layers of linear_attention.*a state-space model already",
    "rwkv": "no attention heads: it is a state-space model already",
    "jamba": "layers of .*a state-space model already",
    "qwen3_next": "layers of linear_attention, which is neither full nor sliding-window",
    "bloom": "adds alibi to its scores",
}


@pytest.mark.parametrize("family", REFUSED)
def test_what_cannot_be_operated_on_is_refused_with_the_reason(family) -> None:
    fields = {"num_hidden_layers": 2, "n_layer": 2, "hidden_size": 48, "vocab_size": 101}
    config = AutoConfig.for_model(family)
    for name, value in fields.items():
        if hasattr(config, name) and family not in ("deepseek_v3", "jamba", "qwen3_next", "mamba2"):
            setattr(config, name, value)
    with pytest.raises(UserError, match=REFUSED[family]) as caught:
        describe(config)
    assert "\n" not in str(caught.value)


def test_a_model_with_an_unknown_twist_is_refused_by_running_it(tokens) -> None:
    teacher = make_family("llama")
    original = teacher.model.layers[2].self_attn.forward

    def twisted(*args, **kwargs):
        output, weights = original(*args, **kwargs)
        return output * 1.01, weights

    teacher.model.layers[2].self_attn.forward = twisted
    with pytest.raises(UserError, match=r"layer 2 of llama does not compute what its weights say.*9\.9e-03"):
        build_mixers(teacher, "lightning")


def test_a_twist_that_shows_at_far_positions_alone_is_refused() -> None:
    """Ministral 3 scales queries by position beyond its original length, where a probe of near tokens sees nothing."""
    rope = {"rope_type": "default", "rope_theta": 1e4, "llama_4_scaling_beta": 0.1,
            "original_max_position_embeddings": 128}  # fmt: skip
    config = AutoConfig.for_model("ministral3", hidden_size=48, num_hidden_layers=2, num_attention_heads=4,
                                  num_key_value_heads=2, head_dim=12, intermediate_size=64, vocab_size=101,
                                  max_position_embeddings=512, rope_parameters=rope)  # fmt: skip
    with pytest.raises(UserError, match="does not compute what its weights say"):
        read_attention(AutoModelForCausalLM.from_config(config))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_a_slight_twist_of_a_half_precision_teacher_is_refused_too(dtype) -> None:
    teacher = make_family("llama").to(dtype)
    assert read_attention(teacher)[0].q_weight.dtype == dtype
    for layer in teacher.model.layers:
        layer.self_attn.scaling *= 1.01
        del layer.self_attn.head_dim
        layer.self_attn.head_dim = 12
    views = read_attention(teacher)
    assert views[0].scaling == pytest.approx(1.01 * 12**-0.5)
    original = type(teacher.model.layers[0].self_attn).forward

    class Twisted(type(teacher.model.layers[0].self_attn)):
        def forward(self, *args, **kwargs):
            output, weights = original(self, *args, **kwargs)
            return output * 1.01, weights

    teacher.model.layers[1].self_attn.__class__ = Twisted
    with pytest.raises(UserError, match="layer 1 of llama does not compute what its weights say"):
        read_attention(teacher)


def test_a_family_that_begins_its_cache_anew_past_a_length_is_followed(tokens) -> None:
    """Phi-3 with LongRoPE changes its frequencies there: keys that were cached under the others are of no use."""
    rope = {"rope_type": "longrope", "rope_theta": 1e4, "short_factor": [1.0] * 3, "long_factor": [2.0, 5.0, 9.0],
            "original_max_position_embeddings": 16, "partial_rotary_factor": 0.5}  # fmt: skip
    teacher = make_family("phi3", rope_parameters=rope, original_max_position_embeddings=16, max_position_embeddings=64)
    options = {"max_new_tokens": 12, "do_sample": False, "eos_token_id": -1, "pad_token_id": 2}
    same = transplant(teacher, SurgeryPlan.for_model(teacher))
    assert torch.equal(same.generate(tokens[:, :12], **options), teacher.generate(tokens[:, :12], **options))
    if Version(transformers.__version__) < Version("5.23"):
        pytest.skip("transformers 5.17 gives the model the last token alone when it begins the cache anew")
    mixed = transplant(teacher, SurgeryPlan.for_model(teacher, keep=1))
    uncached = mixed.generate(tokens[:, :12], use_cache=False, **options)
    assert torch.equal(mixed.generate(tokens[:, :12], **options), uncached)


@torch.no_grad()
def test_soft_caps_are_kept_whichever_kernel_transformers_would_choose(tokens, tmp_path) -> None:
    teacher = make_family("gemma2")
    expected = teacher(tokens).logits
    student = transplant(teacher, SurgeryPlan.for_model(teacher, keep=[1, 2]))
    for name, model in (("teacher", teacher), ("student", student)):
        save_model(tmp_path / name, model)
        assert torch.equal(load_model(tmp_path / name)(tokens).logits, model(tokens).logits)
    by_transformers = AutoModelForCausalLM.from_pretrained(tmp_path / "student")
    assert torch.equal(by_transformers(tokens).logits, student(tokens).logits)
    for layer in teacher.model.layers:
        layer.self_attn.attn_logit_softcapping = None
    assert not torch.allclose(teacher(tokens).logits, expected, atol=1e-2)


def test_a_model_set_to_a_kernel_without_its_soft_caps_is_refused() -> None:
    teacher = make_family("gemma2")
    teacher.config._attn_implementation = "sdpa"
    with pytest.raises(UserError, match="gemma2 caps its attention scores.*attn_implementation=.eager."):
        build_mixers(teacher, "lightning")


def test_quantised_or_adapted_projections_are_refused() -> None:
    teacher = make_family("llama")
    attention = teacher.model.layers[0].self_attn
    attention.q_proj = torch.nn.Sequential(attention.q_proj)
    with pytest.raises(UserError, match="q_proj is a Sequential, expected a plain linear layer"):
        read_attention(teacher)


def test_a_hub_name_needs_no_family_code(tmp_path: Path) -> None:
    """A family nobody listed, built as others are, goes through on its structure alone."""
    config = AutoConfig.for_model("seed_oss", hidden_size=48, num_hidden_layers=2, num_attention_heads=4,
                                  num_key_value_heads=2, head_dim=12, intermediate_size=64, vocab_size=101)  # fmt: skip
    model = AutoModelForCausalLM.from_config(config)
    assert transplant(model, SurgeryPlan.for_model(model, keep=1)).mixer_modules().keys() == {0, 1}
