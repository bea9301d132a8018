"""Chunked losses equal the whole ones in value and gradients, and never hold all logits."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from halobench.kernels.chunked_loss import chunked_loss, cross_entropy, forward_kl

N, D, V = 37, 8, 53


def inputs() -> tuple[Tensor, Tensor, nn.Parameter, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)

    def draw(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    return draw(N, D).requires_grad_(), draw(N, D), nn.Parameter(draw(V, D)), draw(V, D), draw(N).abs()


@pytest.mark.parametrize("chunk", [1, 5, 37, 100])
def test_kl_in_chunks_equals_the_whole_in_value_and_gradients(chunk: int) -> None:
    hidden, target, head, teacher_head, weights = inputs()
    whole = forward_kl(hidden @ head.T, target @ teacher_head.T, weights)
    expected = torch.autograd.grad(whole, [hidden, head])

    def piece(h: Tensor, part: slice) -> Tensor:
        return forward_kl(h @ head.T, target[part] @ teacher_head.T, weights[part])

    loss = chunked_loss(piece, hidden, [head], chunk)
    found = torch.autograd.grad(3 * loss, [hidden, head])
    assert float(loss) == pytest.approx(float(whole), rel=1e-12)
    for a, b in zip(found, expected, strict=True):
        torch.testing.assert_close(a, 3 * b, rtol=1e-10, atol=1e-10)


def test_cross_entropy_in_chunks_equals_the_whole() -> None:
    hidden, _, head, _, weights = inputs()
    targets = torch.arange(N) % V
    whole = cross_entropy(hidden @ head.T, targets, weights)
    loss = chunked_loss(lambda h, part: cross_entropy(h @ head.T, targets[part], weights[part]), hidden, [head], 6)
    torch.testing.assert_close(loss, whole)
    expected = torch.autograd.grad(whole, head)
    torch.testing.assert_close(torch.autograd.grad(loss, head), expected)


def test_a_frozen_head_and_frozen_states_are_allowed() -> None:
    hidden, target, head, teacher_head, weights = inputs()

    def piece(h: Tensor, part: slice) -> Tensor:
        return forward_kl(h @ head.T, target[part] @ teacher_head.T, weights[part])

    frozen = chunked_loss(piece, hidden.detach(), [head], 8)
    assert torch.autograd.grad(frozen, head)[0].abs().sum() > 0
    head.requires_grad_(False)
    assert torch.autograd.grad(chunked_loss(piece, hidden, [head], 8), hidden)[0].abs().sum() > 0


def test_no_more_than_a_chunk_of_logits_is_made_at_once() -> None:
    hidden, target, head, teacher_head, weights = inputs()
    seen: list[int] = []

    def piece(h: Tensor, part: slice) -> Tensor:
        seen.append(len(h))
        return forward_kl(h @ head.T, target[part] @ teacher_head.T, weights[part])

    chunked_loss(piece, hidden, [head], 10)
    assert seen == [10, 10, 10, 7]


def test_kl_is_zero_for_equal_and_positive_for_different_distributions() -> None:
    logits = torch.randn(4, 9, dtype=torch.float64)
    ones = torch.ones(4, dtype=torch.float64)
    assert float(forward_kl(logits, logits + 3.0, ones)) == pytest.approx(0.0, abs=1e-12)
    assert float(forward_kl(logits, logits.flip(-1), ones)) > 0.1
