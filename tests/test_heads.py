"""The last step taken apart: hidden states and logits as each family makes them, and the check that says when not."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM

from halobench.errors import UserError
from halobench.surgery import SurgeryPlan, heads, transplant
from halobench.surgery.gates import check_identity
from halobench.surgery.stages.distil import Distillation
from tests.conftest import make_pico
from tests.families import make_family

TEXT: dict[str, Any] = {
    "hidden_size": 48, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "head_dim": 12, "vocab_size": 101, "pad_token_id": 2, "bos_token_id": 0,
    "eos_token_id": 1, "initializer_range": 0.3,
}  # fmt: skip
MULTIMODAL: dict[str, Any] = {"vision_config": None, "audio_config": None}
GEMMA3_VISION = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 1}
GEMMA4_TEXT: dict[str, Any] = {
    **TEXT, "global_head_dim": 12, "hidden_size_per_layer_input": 8, "vocab_size_per_layer_input": 101,
    "num_kv_shared_layers": 0, "layer_types": ["sliding_attention", "full_attention"],
    "final_logit_softcapping": 2.0,
}  # fmt: skip


def build(family: str, **fields: Any) -> Any:
    torch.manual_seed(0)
    return AutoModelForCausalLM.from_config(AutoConfig.for_model(family, **fields)).eval()


PICO: dict[str, Callable[[], Any]] = {
    "llama": lambda: make_pico("llama"),
    "granite": lambda: make_pico("granite", logits_scaling=3.0),
    "cohere": lambda: make_pico("cohere", logit_scale=0.25),
    "gemma2": lambda: make_family("gemma2"),
    "hyperclovax": lambda: make_pico("hyperclovax", logits_scaling=0.25),
    "minicpm3": lambda: build(
        "minicpm3", **{**TEXT, "num_key_value_heads": 4}, q_lora_rank=16, kv_lora_rank=16, qk_nope_head_dim=8,
        qk_rope_head_dim=4, v_head_dim=12, dim_model_base=16,
    ),
    "gemma3": lambda: build(
        "gemma3", text_config={**TEXT, "final_logit_softcapping": 2.0}, vision_config=GEMMA3_VISION
    ),
    "gemma4": lambda: build("gemma4", text_config=GEMMA4_TEXT, **MULTIMODAL),
    "gemma4_text": lambda: build("gemma4_text", **GEMMA4_TEXT),
    "recurrent_gemma": lambda: build(
        "recurrent_gemma", **{**TEXT, "num_hidden_layers": 3}, lru_width=48, attention_window_size=8,
        logits_soft_cap=2.0,
    ),
    "mpt": lambda: build("mpt", d_model=48, n_heads=4, n_layers=2, vocab_size=101, max_seq_len=64, logit_scale=0.5),
    "mamba": lambda: build("mamba", hidden_size=48, state_size=4, num_hidden_layers=2, vocab_size=101),
}  # fmt: skip


@pytest.mark.parametrize("family", PICO)
def test_logits_of_hidden_states_are_the_familys_own(family: str, tokens: Tensor) -> None:
    model = PICO[family]()
    heads.check_head(model)
    with torch.no_grad():
        wanted, hidden = model(input_ids=tokens).logits, heads.final_hidden(model, tokens)
        taken = heads.head(model)
        torch.testing.assert_close(heads.unembed(model, hidden), wanted, atol=1e-5, rtol=1e-4)
        products = taken.products(hidden.flatten(0, 1)).view_as(wanted)
        torch.testing.assert_close(taken.bend.logits(products), wanted, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("family", sorted(heads.AFTER.keys() & PICO.keys()))
def test_a_head_that_leaves_out_what_its_family_does_is_refused(family: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delitem(heads.AFTER, family)
    with pytest.raises(UserError, match=f"^{family}: its logits are not those computed here"):
        heads.check_head(PICO[family]())


def test_a_soft_cap_far_above_the_logits_is_not_overlooked(monkeypatch: pytest.MonkeyPatch) -> None:
    model = make_pico("gemma2", final_logit_softcapping=30.0)
    with torch.no_grad():
        model.get_output_embeddings().weight.mul_(1e-3)
        assert model(input_ids=torch.arange(9)[None]).logits.abs().max() < 0.1
    heads.check_head(model)
    monkeypatch.delitem(heads.AFTER, "gemma2")
    with pytest.raises(UserError, match="gemma2"):
        heads.check_head(model)


def test_a_family_that_cuts_its_logits_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    model = make_pico()
    faithful = model.forward

    def cutting(*args: Any, **kwargs: Any) -> Any:
        output = faithful(*args, **kwargs)
        output.logits = output.logits[..., :90]
        return output

    monkeypatch.setattr(model, "forward", cutting)
    with pytest.raises(UserError, match="qwen3: its logits .* difference inf"):
        heads.check_head(model)


@pytest.mark.parametrize("stage", ["identity", "distillation"])
def test_a_wrong_head_stops_a_conversion_before_it_trains(
    stage: str, tokens: Tensor, monkeypatch: pytest.MonkeyPatch
) -> None:
    teacher = PICO["hyperclovax"]()
    monkeypatch.setitem(heads.AFTER, "hyperclovax", ("logits_scaling", "over"))
    with pytest.raises(UserError, match="hyperclovax: its logits"):
        if stage == "identity":
            check_identity(teacher, tokens)
        else:
            Distillation(make_pico(seed=1), teacher)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_check_reads_hybrids_and_leaves_them_as_they_came(dtype: torch.dtype) -> None:
    teacher = PICO["gemma2"]()
    student: Any = transplant(teacher, SurgeryPlan.for_model(teacher, keep=[0], mixer="lightning"))
    student.to(dtype).train()
    student.backbone.get_decoder().norm.eval()
    before = {name: module.training for name, module in student.named_modules()}
    heads.check_head(student)
    assert {name: module.training for name, module in student.named_modules()} == before
    assert not student.get_output_embeddings()._forward_hooks
    assert heads.head(student).bend.cap == 9.0
    assert all(p.grad is None for p in student.parameters())


def test_hidden_states_that_the_unembedding_cannot_take_are_told() -> None:
    with pytest.raises(
        UserError, match=r"mamba: its hidden states are torch\.float32 and its unembedding torch\.bfloat16"
    ):
        heads.check_head(PICO["mamba"]().to(torch.bfloat16))


class Packed(nn.Linear):
    """A linear layer of another kind: its weight is no matrix to multiply with."""

    def forward(self, x: Tensor) -> Tensor:
        return x @ self.weight.T * 2


def test_an_unembedding_that_is_no_plain_linear_layer_is_named_in_full() -> None:
    model = make_pico("llama", tie_word_embeddings=False)
    model.set_output_embeddings(Packed(48, 101, bias=False))
    with pytest.raises(
        UserError,
        match=r"a tests\.test_heads\.Packed with weights of torch\.float32; .* merge its adapters",
    ):
        heads.head(model)
    integers = nn.Linear(48, 101, bias=False)
    integers.weight = nn.Parameter(torch.zeros(101, 48, dtype=torch.int8), requires_grad=False)
    model.set_output_embeddings(integers)
    with pytest.raises(UserError, match=r"is a torch\.nn\.modules\.linear\.Linear with weights of torch\.int8"):
        heads.head(model)
