"""The operator with a decay per key channel: every form against the definition, forward and backward."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from halobench.kernels import chunks
from halobench.kernels.decays import MILD, decayed_pairs
from halobench.kernels.scalar_decay.naive import scalar_decay_naive
from halobench.kernels.vector_decay.chunked import vector_decay_chunked
from halobench.kernels.vector_decay.naive import vector_decay_naive
from halobench.kernels.vector_decay.step import vector_decay_step
from tests.kernel_forms import (
    RAGGED,
    K,
    V,
    assert_same,
    draw,
    drift,
    extreme_log_decay,
    log_decay,
    values_and_gradients,
)


def inputs(tokens: int) -> list[Tensor]:
    return [draw(tokens, K, seed=1), draw(tokens, K, seed=2), draw(tokens, V, seed=3), log_decay(tokens, K)]


def test_the_token_loop_equals_the_sum_written_out() -> None:
    q, k, v, g = inputs(6)
    o, _ = vector_decay_naive(q, k, v, g, scale=0.5)
    expected = torch.zeros_like(o)
    for t in range(6):
        for s in range(t + 1):
            weight = 0.5 * (q[:, t] * k[:, s] * g[:, s + 1 : t + 1].sum(1).exp()).sum(-1)
            expected[:, t] += weight[..., None] * v[:, s]
    torch.testing.assert_close(o, expected)


@pytest.mark.parametrize("tokens", RAGGED)
def test_chunked_equals_the_token_loop_with_its_gradients(tokens: int) -> None:
    expected = values_and_gradients(vector_decay_naive, inputs(tokens))
    assert_same(values_and_gradients(vector_decay_chunked, inputs(tokens)), expected)


@pytest.mark.parametrize("chunk_size", [1, 2, 8, 128])
def test_any_power_of_two_is_a_chunk_size_and_nothing_else(chunk_size: int) -> None:
    expected = vector_decay_naive(*inputs(70), scale=1.0)
    assert_same(vector_decay_chunked(*inputs(70), scale=1.0, chunk_size=chunk_size), expected)
    with pytest.raises(ValueError, match="power of two, got 48"):
        vector_decay_chunked(*inputs(70), scale=1.0, chunk_size=48)


def test_many_superblocks_hand_their_state_on(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(chunks, "NUMBERS_IN_SUPERBLOCK", 1)
    tokens = 2 * 4 * chunks.CHUNKS_IN_SUPERBLOCK + 11
    expected = vector_decay_naive(*inputs(tokens), scale=1.0)
    assert_same(vector_decay_chunked(*inputs(tokens), scale=1.0, chunk_size=4), expected)


@pytest.mark.parametrize("cut", [1, 5, 32, 69])
def test_a_sequence_cut_anywhere_continues_from_its_state(cut: int) -> None:
    whole, last = vector_decay_chunked(*inputs(70), scale=1.0)
    first, handed = vector_decay_chunked(*(x[:, :cut] for x in inputs(70)), scale=1.0)
    second, end = vector_decay_chunked(*(x[:, cut:] for x in inputs(70)), scale=1.0, initial_state_BHKV=handed)
    assert_same([torch.cat((first, second), 1), end], [whole, last])
    o, _ = vector_decay_step(*(x[:, cut] for x in inputs(70)), handed, 1.0)
    assert_same([o], [whole[:, cut]])


def test_equal_channels_are_the_scalar_decay() -> None:
    q, k, v, _ = inputs(70)
    g = log_decay(70)
    expected = scalar_decay_naive(q, k, v, g, scale=0.4)
    assert_same(vector_decay_chunked(q, k, v, g[..., None].expand_as(q), scale=0.4), expected)


def test_extreme_decays_are_exact_forward_and_backward_in_float32() -> None:
    exact = [*inputs(200)[:3], extreme_log_decay(200)]
    expected = values_and_gradients(vector_decay_naive, exact)
    got = values_and_gradients(vector_decay_chunked, [x.float() for x in exact])
    for a, b in zip(got, expected, strict=True):
        assert a.isfinite().all()
        assert (a.double() - b).norm() < 1e-5 * b.norm()


@pytest.mark.parametrize("size", [1, K])
def test_pair_products_of_several_kinds_equal_the_sum_written_out(size: int) -> None:
    rows, columns = draw(8, 2, K, seed=4), draw(8, 3, K, seed=5)  # (G, N, C, ...) = (B, T, ...)
    rows, columns = (x.permute(0, 2, 3, 1, 4) for x in (rows, columns))
    g = log_decay(8, size).transpose(1, 2)
    pairs = decayed_pairs(rows, columns, g)
    for i in range(8):
        for j in range(8):
            decay = g[:, :, j + 1 : i + 1].sum(2).exp() if j <= i else 0 * g[:, :, 0]
            expected = torch.einsum("gnrk,gnsk->gnrs", rows[:, :, :, i] * decay[..., None, :], columns[:, :, :, j])
            torch.testing.assert_close(pairs.scores_RCSC[:, :, :, i, :, j], expected)


@pytest.mark.parametrize("whole", [0.9 * MILD, 1.1 * MILD])
def test_decays_on_either_side_of_mild_are_exact_forward_and_backward_in_float32(whole: float) -> None:
    g = (-whole / 16 * draw(70, K, seed=6).sigmoid()).clamp(min=-whole / 32)  # most at the floor, 32 tokens a chunk
    g[:, :32] = -whole / 32
    exact = [*inputs(70)[:3], g]
    expected = values_and_gradients(vector_decay_naive, exact)
    got = values_and_gradients(vector_decay_chunked, [x.float() for x in exact])
    for a, b in zip(got, expected, strict=True):
        assert (a.double() - b).norm() < 1e-5 * b.norm()


def test_bfloat16_stays_near_the_definition_at_length_and_keeps_an_fp32_state() -> None:
    q, k, v = (x.bfloat16() for x in inputs(2048)[:3])
    g = (-0.05 * draw(2048, K, seed=8).sigmoid()).float()
    o, final = vector_decay_chunked(q, k, v, g, scale=0.4)
    expected, _ = vector_decay_chunked(q.double(), k.double(), v.double(), g.double(), scale=0.4)
    assert o.dtype == torch.bfloat16 and final.dtype == torch.float32
    early, late = drift(o.double(), expected)
    assert early < 0.02 and late < 0.02


def test_autocast_does_not_lower_the_precision_of_the_state() -> None:
    exact = [x.float() for x in inputs(70)]
    expected = vector_decay_chunked(*exact, scale=1.0)
    with torch.autocast("cpu", torch.bfloat16):
        assert_same(vector_decay_chunked(*exact, scale=1.0), expected, 0.0)
