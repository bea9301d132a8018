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


@pytest.mark.parametrize("kv_heads", [1, 2, 4])
@pytest.mark.parametrize(("tokens", "keys"), [(2, 3), (4, 9), (40, 300)])
def test_a_past_on_a_cpu_needs_no_mask_and_equals_the_definition(
    tokens: int, keys: int, kv_heads: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(softmax, "_in_pieces", None)
    q, k, _ = inputs(tokens, keys, kv_heads=kv_heads)
    v = k.flip(1) * 3
    torch.testing.assert_close(attend(q, k, v, scale=0.4), attend_naive(q, k, v, scale=0.4))
    half = [x.bfloat16() for x in (q, k, v)]
    torch.testing.assert_close(attend(*half, scale=0.4), attend_naive(*half, scale=0.4), atol=0.03, rtol=0.03)


def test_a_past_whose_gradient_is_wanted_has_it() -> None:
    q, k, _ = inputs(4, 9)
    leaves = [x.requires_grad_() for x in (q, k, k.flip(1) * 3)]
    found, expected = (
        torch.autograd.grad((form(*leaves, scale=0.4) ** 2).sum(), leaves) for form in (attend, attend_naive)
    )
    torch.testing.assert_close(found, expected)


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


SINKS = torch.tensor([0.5, -1.0, 2.0, 0.0], dtype=torch.float64)


def test_a_learned_sink_joins_the_denominator_and_carries_no_value() -> None:
    q, k, v = inputs(1, 3, heads=1, kv_heads=1)
    scores = (q[:, 0, 0] @ k[:, :, 0].transpose(1, 2))[0, 0] * 0.4
    weights = scores.exp() / (scores.exp().sum() + torch.tensor(0.7).double().exp())
    for function in (attend, attend_naive):
        o = function(q[:1], k[:1], v[:1], scale=0.4, sinks_H=torch.tensor([0.7]).double())
        torch.testing.assert_close(o[0, 0, 0], weights @ v[0, :, 0], atol=1e-7, rtol=1e-7)


@pytest.mark.parametrize("soft_cap", [None, 0.7])
@pytest.mark.parametrize("window", [None, 3])
@pytest.mark.parametrize("side", [None, "left", "right"])
@pytest.mark.parametrize(("tokens", "keys", "kv_heads"), [(1, 1, 2), (9, 9, 2), (9, 9, 4), (1, 9, 1), (4, 9, 2)])
def test_learned_sinks_equal_the_definition_with_gradients(
    tokens: int, keys: int, kv_heads: int, side: str | None, window: int | None, soft_cap: float | None
) -> None:
    leaves = [*inputs(tokens, keys, kv_heads=kv_heads, grad=True), SINKS.clone().requires_grad_()]
    mask = None if side is None else padding(keys, side)
    results = []
    for function in (attend, attend_naive):
        o = function(
            *leaves[:3], sinks_H=leaves[3], scale=0.4, key_padding_mask_BS=mask, window=window, soft_cap=soft_cap
        )
        results.append((o, *torch.autograd.grad((o**2).sum(), leaves)))
    for got, expected in zip(*results, strict=True):
        assert got.isfinite().all()
        torch.testing.assert_close(got, expected)


@pytest.mark.parametrize("elements", [2**24, 24])
def test_learned_sinks_change_nothing_when_low_and_everything_when_high(
    elements: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(softmax, "MASK_ELEMENTS", elements)
    for tokens in (1, 5, 9):
        q, k, v = inputs(tokens, 9)
        for cap in (None, 0.7):
            plain = attend(q, k, v, scale=0.4, soft_cap=cap)
            low = attend(q, k, v, scale=0.4, soft_cap=cap, sinks_H=torch.full((4,), -80.0).double())
            high = attend(q, k, v, scale=0.4, soft_cap=cap, sinks_H=torch.full((4,), 80.0).double())
            torch.testing.assert_close(low, plain)
            assert high.abs().max() < 1e-20


@pytest.mark.parametrize("tokens", [1, 4, 40])
def test_learned_sinks_in_bf16_are_as_near_as_attention_without_them(tokens: int) -> None:
    q, k, v = (x.to(torch.bfloat16) for x in inputs(tokens, 40))
    sinks = torch.tensor([3.7, 5.3, 6.1, 2.9], dtype=torch.bfloat16)
    errors = []
    for scores in (None, sinks):
        exact = attend_naive(q.double(), k.double(), v.double(), scale=0.37, sinks_H=scores)
        errors.append((attend(q, k, v, scale=0.37, sinks_H=scores).double() - exact).abs().max())
    assert errors[1] < 2 * errors[0]


def test_no_query_sees_a_later_key() -> None:
    q, k, v = inputs(6, 6)
    before = attend(q, k, v, scale=0.4)
    k[:, 4:], v[:, 4:] = 9.0, -9.0
    after = attend(q, k, v, scale=0.4)
    assert torch.equal(before[:, :4], after[:, :4])
    assert not torch.allclose(before[:, 4:], after[:, 4:])
