"""Softmax attention: every path against the definition, in fp64."""

from __future__ import annotations

import pytest
import torch

from halobench.kernels.attention import softmax
from halobench.kernels.attention.naive import attend_naive
from halobench.kernels.attention.softmax import attend


def inputs(tokens: int, keys: int, heads: int = 4, kv_heads: int = 2, grad: bool = False) -> list[torch.Tensor]:
    g = torch.Generator().manual_seed(tokens * 100 + keys)
    shapes = ((2, tokens, heads, 6), (2, keys, kv_heads, 6), (2, keys, kv_heads, 5))
    return [torch.randn(shape, generator=g, dtype=torch.float64).requires_grad_(grad) for shape in shapes]


def padding(keys: int, side: str) -> torch.Tensor:
    mask = torch.ones(2, keys, dtype=torch.bool)
    mask[1, : keys // 3] = False
    return mask if side == "left" else mask.flip(1)


@pytest.mark.parametrize("kv_heads", [1, 2, 4])
@pytest.mark.parametrize(("tokens", "keys"), [(1, 1), (9, 9), (1, 9), (4, 9)])
def test_it_equals_the_definition_with_grouped_heads_and_a_past(tokens: int, keys: int, kv_heads: int) -> None:
    q, k, v = inputs(tokens, keys, kv_heads=kv_heads)
    torch.testing.assert_close(attend(q, k, v, scale=0.4), attend_naive(q, k, v, scale=0.4))


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize(("tokens", "keys"), [(9, 9), (1, 9), (4, 9)])
@pytest.mark.parametrize("window", [None, 3])
def test_it_equals_the_definition_with_padding_and_a_window(
    side: str, tokens: int, keys: int, window: int | None
) -> None:
    q, k, v = inputs(tokens, keys)
    options = {"scale": 0.4, "key_padding_mask_BS": padding(keys, side), "window": window}
    expected = attend_naive(q, k, v, **options)
    assert expected.isfinite().all()
    torch.testing.assert_close(attend(q, k, v, **options), expected)


@pytest.mark.parametrize("elements", [2**24, 40])
@pytest.mark.parametrize("window", [None, 3])
@pytest.mark.parametrize("padded", [False, True])
def test_a_soft_cap_equals_the_definition_in_pieces_too(
    elements: int, window: int | None, padded: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(softmax, "MASK_ELEMENTS", elements)
    q, k, v = inputs(6, 11)
    mask = padding(11, "left") if padded else None
    options = {"scale": 0.4, "soft_cap": 0.7, "window": window, "key_padding_mask_BS": mask}
    torch.testing.assert_close(attend(q, k, v, **options), attend_naive(q, k, v, **options))


def test_a_mask_built_in_pieces_changes_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    q, k, v = inputs(7, 12)
    whole = attend(q, k, v, scale=0.4)
    monkeypatch.setattr(softmax, "MASK_ELEMENTS", 24)
    torch.testing.assert_close(attend(q, k, v, scale=0.4), whole)


@pytest.mark.parametrize("padded", [False, True])
def test_gradients_equal_those_of_the_definition_and_are_finite_at_padding(padded: bool) -> None:
    leaves = inputs(8, 8, grad=True)
    mask = padding(8, "left") if padded else None
    gradients = []
    for function in (attend, attend_naive):
        o = function(*leaves, scale=0.4, key_padding_mask_BS=mask)
        gradients.append(torch.autograd.grad((o**2).sum(), leaves))
    for got, expected in zip(*gradients, strict=True):
        assert got.isfinite().all()
        torch.testing.assert_close(got, expected)


def test_no_query_sees_a_later_key() -> None:
    q, k, v = inputs(6, 6)
    before = attend(q, k, v, scale=0.4)
    k[:, 4:], v[:, 4:] = 9.0, -9.0
    after = attend(q, k, v, scale=0.4)
    assert torch.equal(before[:, :4], after[:, :4])
    assert not torch.allclose(before[:, 4:], after[:, 4:])
