"""Pico models that tests share: a few layers, random weights, made in milliseconds."""

from __future__ import annotations

import os
from pathlib import Path

os.environ.setdefault("HF_HUB_OFFLINE", "1")  # before any Hugging Face import: tests fetch nothing

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel, PreTrainedTokenizerBase

torch.set_num_threads(1)


def make_pico(family: str = "qwen3", seed: int = 0, **changes: object) -> PreTrainedModel:
    """A decoder of `family`: 4 layers, hidden size 48, 4 heads of 12 on 2 key/value heads, vocabulary 101."""
    fields: dict[str, object] = {
        "hidden_size": 48,
        "intermediate_size": 64,
        "num_hidden_layers": 4,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 12,
        "vocab_size": 101,
        "max_position_embeddings": 512,
        "initializer_range": 0.2,
        "bos_token_id": 0,
        "eos_token_id": 1,
        "pad_token_id": 2,
    }
    torch.manual_seed(seed)
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(family, **{**fields, **changes}))
    with torch.no_grad():  # norms and biases start as ones and zeros, which would hide a lost weight
        for parameter in model.parameters():
            if parameter.ndim == 1:
                parameter.add_(0.2 * torch.randn_like(parameter))
    return model.eval()


@pytest.fixture
def pico() -> object:
    """The factory of pico decoders: pico(family="qwen3", seed=0, **config)."""
    return make_pico


@pytest.fixture
def teacher() -> PreTrainedModel:
    """A pico Qwen3."""
    return make_pico()


@pytest.fixture
def tokens() -> torch.Tensor:
    """(3, 40) token ids that avoid the special ones."""
    return torch.randint(3, 101, (3, 40), generator=torch.Generator().manual_seed(1))


@pytest.fixture(scope="session")
def bpe() -> PreTrainedTokenizerBase:
    """A byte-level BPE of 512 tokens with single digits, trained on the embedded held-out text."""
    from halobench.assets import TEXT_HELDOUT
    from halobench.teacher import train_tokenizer

    return train_tokenizer([TEXT_HELDOUT], 512)


@pytest.fixture
def reader(bpe: PreTrainedTokenizerBase) -> PreTrainedModel:
    """A pico Qwen3 with the vocabulary of `bpe`, in float32."""
    return make_pico(vocab_size=len(bpe), max_position_embeddings=4096)


# `--families-record PATH` writes how tests/test_families.py ended, by family and by test or mixer.

FAMILY_TESTS = {
    "test_a_plan_that_keeps_every_layer_gives_the_teachers_logits_bit_for_bit": "identity",
    "test_softmax_layers_built_from_the_views_behave_as_the_teachers": "views",
    "test_gradients_reach_every_mixer_through_checkpointing": "gradients",
    "test_family_with_mixer": None,  # the column is the mixer
}


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--families-record", default=None, help="write the outcomes of tests/test_families.py here")


def pytest_configure(config: pytest.Config) -> None:
    config.family_outcomes = {}  # type: ignore[attr-defined]


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item: pytest.Item, call: pytest.CallInfo[None]):  # type: ignore[no-untyped-def]
    report = yield
    test = getattr(item, "originalname", None)
    if call.when == "call" and test in FAMILY_TESTS:
        parameters = item.callspec.params  # type: ignore[attr-defined]
        column = FAMILY_TESTS[test] or parameters["mixer"]
        item.config.family_outcomes[(parameters["family"], column)] = report.outcome  # type: ignore[attr-defined]
    return report


def pytest_sessionfinish(session: pytest.Session) -> None:
    path = session.config.getoption("--families-record")
    if path is None:
        return
    from halobench.files import write_json
    from halobench.mixers import MIXERS
    from halobench.provenance import versions
    from tests.families import FAMILIES

    outcomes = session.config.family_outcomes  # type: ignore[attr-defined]
    columns = [*dict.fromkeys(column for _, column in outcomes)]
    columns.sort(key=["identity", "views", "gradients", *MIXERS.names()].index)
    families = {
        family: {
            "particular": particular,
            "outcomes": {c: outcomes[family, c] for c in columns if (family, c) in outcomes},
        }
        for family, (particular, _) in FAMILIES.items()
    }
    used = {name: number for name, number in versions().items() if name in ("torch", "transformers")}
    write_json(Path(path), {"columns": columns, "families": families, "versions": used})
