"""Decoding two ways: by the engine, and by plain forwards on the cache of transformers."""

from __future__ import annotations

import torch
from torch import Tensor
from transformers import DynamicCache, PreTrainedModel

from halobench.surgery import SurgeryPlan, transplant
from halobench.surgery.engine import DecodeEngine

STEPS = 12


def student_of(
    teacher: PreTrainedModel, hype: bool = True, mixer: str = "lightning", keep: int | list[int] = 2
) -> PreTrainedModel:
    torch.manual_seed(0)
    return transplant(teacher, SurgeryPlan.for_model(teacher, mixer, keep=keep, hype=hype)).eval()


def prompt(device: str = "cpu") -> Tensor:
    return torch.randint(3, 101, (2, 21), generator=torch.Generator().manual_seed(1)).to(device)


@torch.no_grad()
def plain(model: PreTrainedModel, ids: Tensor, steps: int = STEPS) -> Tensor:
    """Logits behind a prompt and behind each of the most likely tokens, by forwards on the model's usual cache."""
    cache = model.new_cache() if hasattr(model, "new_cache") else DynamicCache(config=model.config)
    found = [model(ids, past_key_values=cache, use_cache=True).logits[:, -1]]
    for _ in range(steps):
        token = found[-1].argmax(-1, keepdim=True)
        found.append(model(token, past_key_values=cache, use_cache=True).logits[:, -1])
    return torch.stack(found, dim=1)


def engines(model: PreTrainedModel, ids: Tensor, steps: int = STEPS, **options: object) -> tuple[Tensor, DecodeEngine]:
    """The same by the engine, the prompt in two pieces."""
    engine = DecodeEngine(model, room=ids.shape[1] + steps, **options)
    found = [engine.prefill(ids, [9, ids.shape[1] - 9])]
    for _ in range(steps):
        found.append(engine.step(found[-1].argmax(-1, keepdim=True)).clone())
    return torch.stack(found, dim=1), engine


def assert_same(got: Tensor, expected: Tensor) -> None:
    assert float((got - expected).abs().max() / expected.abs().max()) < 1e-5
    assert torch.equal(got.argmax(-1), expected.argmax(-1))
