"""Pico models that tests share: a few layers, random weights, made in milliseconds."""

from __future__ import annotations

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
