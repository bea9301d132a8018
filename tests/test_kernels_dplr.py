"""Diagonal plus low rank (RWKV-7): every form against the definition, and against the delta rule it generalises."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from halobench.kernels import chunks
from halobench.kernels.decays import MILD
from halobench.kernels.delta_rule.naive import delta_rule_naive
from halobench.kernels.dplr.chunked import dplr_chunked
from halobench.kernels.dplr.naive import dplr_naive
from halobench.kernels.dplr.step import dplr_step
from halobench.kernels.vector_decay.naive import vector_decay_naive
from tests.kernel_forms import (
    RAGGED,
    H,
    K,
    V,
    assert_same,
    draw,
    drift,
    extreme_log_decay,
    log_decay,
    unit,
    values_and_gradients,
)


def inputs(tokens: int) -> list[Tensor]:
    """q, k, v, a, b, g as RWKV-7 makes them: a = -kappa, b = kappa * alpha."""
    kappa, alpha = unit(draw(tokens, K, seed=4)), draw(tokens, K, seed=5).sigmoid()
    q, k, v = draw(tokens, K, seed=1), draw(tokens, K, seed=2), draw(tokens, V, seed=3)
    return [q, k, v, -kappa, kappa * alpha, log_decay(tokens, K)]


def test_the_token_loop_equals_the_matrices_written_out() -> None:
    q, k, v, a, b, g = inputs(5)
    state = torch.zeros(q.shape[0], H, K, V, dtype=q.dtype)
    for t in range(5):
        transition = torch.diag_embed(g[:, t].exp()) + torch.einsum("bhi,bhj->bhij", b[:, t], a[:, t])
        state = transition @ state + torch.einsum("bhk,bhv->bhkv", k[:, t], v[:, t])
    o, last = dplr_naive(q, k, v, a, b, g, scale=0.5)
    assert_same([o[:, -1], last], [0.5 * torch.einsum("bhkv,bhk->bhv", state, q[:, -1]), state])


@pytest.mark.parametrize("tokens", RAGGED)
def test_chunked_equals_the_token_loop_with_its_gradients(tokens: int) -> None:
    expected = values_and_gradients(dplr_naive, inputs(tokens))
    assert_same(values_and_gradients(dplr_chunked, inputs(tokens)), expected)


def test_many_superblocks_hand_their_state_on(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(chunks, "NUMBERS_IN_SUPERBLOCK", 1)
    tokens = 2 * 4 * chunks.CHUNKS_IN_SUPERBLOCK + 11
    expected = dplr_naive(*inputs(tokens), scale=1.0)
    assert_same(dplr_chunked(*inputs(tokens), scale=1.0, chunk_size=4), expected)


@pytest.mark.parametrize("cut", [1, 5, 32, 69])
def test_a_sequence_cut_anywhere_continues_from_its_state(cut: int) -> None:
    whole, last = dplr_chunked(*inputs(70), scale=1.0)
    first, handed = dplr_chunked(*(x[:, :cut] for x in inputs(70)), scale=1.0)
    second, end = dplr_chunked(*(x[:, cut:] for x in inputs(70)), scale=1.0, initial_state_BHKV=handed)
    assert_same([torch.cat((first, second), 1), end], [whole, last])
    o, _ = dplr_step(*(x[:, cut] for x in inputs(70)), handed, 1.0)
    assert_same([o], [whole[:, cut]])


def test_the_delta_rule_with_decay_is_the_case_where_a_is_the_decayed_key() -> None:
    q, _, v, _, _, g = inputs(70)
    k, beta = unit(draw(70, K, seed=2)), 2 * draw(70, seed=6).sigmoid()
    expected = delta_rule_naive(q, k, v, beta, g, scale=0.4)
    beta_k = beta[..., None] * k
    assert_same(dplr_chunked(q, beta_k, v, k * g.exp(), -beta_k, g, scale=0.4), expected)


def test_without_its_low_rank_part_it_is_the_vector_decay() -> None:
    q, k, v, a, b, g = inputs(70)
    expected = vector_decay_naive(q, k, v, g, scale=0.4)
    assert_same(dplr_chunked(q, k, v, a, 0 * b, g, scale=0.4), expected)


def test_extreme_decays_are_exact_forward_and_backward_in_float32() -> None:
    exact = [*inputs(200)[:5], extreme_log_decay(200)]
    expected = values_and_gradients(dplr_naive, exact)
    got = values_and_gradients(dplr_chunked, [x.float() for x in exact])
    for a, b in zip(got, expected, strict=True):
        assert a.isfinite().all()
        assert (a.double() - b).norm() < 1e-4 * b.norm()


@pytest.mark.parametrize("whole", [0.9 * MILD, 1.1 * MILD])
def test_decays_on_either_side_of_mild_are_exact_forward_and_backward_in_float32(whole: float) -> None:
    g = (-whole / 16 * draw(70, K, seed=6).sigmoid()).clamp(min=-whole / 32)  # most at the floor, 32 tokens a chunk
    g[:, :32] = -whole / 32
    exact = [*inputs(70)[:5], g]
    expected = values_and_gradients(dplr_naive, exact)
    got = values_and_gradients(dplr_chunked, [x.float() for x in exact])
    for a, b in zip(got, expected, strict=True):
        assert (a.double() - b).norm() < 1e-5 * b.norm()


def test_bfloat16_stays_near_the_definition_at_length_and_keeps_an_fp32_state() -> None:
    tensors = [x.bfloat16() for x in inputs(2048)[:5]]
    g = (-0.6 * draw(2048, K, seed=8).sigmoid()).float()  # RWKV-7's decays are at least exp(-0.607)
    o, final = dplr_chunked(*tensors, g, scale=1.0)
    expected, _ = dplr_chunked(*(x.double() for x in tensors), g.double(), scale=1.0)
    assert o.dtype == torch.bfloat16 and final.dtype == torch.float32
    early, late = drift(o.double(), expected)
    assert early < 0.01 and late < 0.01
