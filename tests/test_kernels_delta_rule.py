"""The delta rule, without decay, with one per head and one per channel: every form against the definition."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from halobench.kernels import chunks
from halobench.kernels.decays import MILD
from halobench.kernels.delta_rule.chunked import delta_rule_chunked
from halobench.kernels.delta_rule.naive import delta_rule_naive
from halobench.kernels.delta_rule.step import delta_rule_step
from halobench.kernels.triangular import unit_lower_inverse
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

DECAYS = ("none", "head", "channel")


def inputs(tokens: int, decay: str = "none") -> list[Tensor | None]:
    beta = 2 * draw(tokens, seed=4).sigmoid()
    g = {"none": None, "head": log_decay(tokens), "channel": log_decay(tokens, K)}[decay]
    return [draw(tokens, K, seed=1), unit(draw(tokens, K, seed=2)), draw(tokens, V, seed=3), beta, g]


def part(tensors: list[Tensor | None], tokens: slice) -> list[Tensor | None]:
    return [None if x is None else x[:, tokens] for x in tensors]


def test_one_token_replaces_what_is_held_under_its_key() -> None:
    _, k, v, _, _ = inputs(9)
    o, _ = delta_rule_chunked(k, k, v, torch.ones_like(v[..., 0]), None, scale=1.0)  # reads under the key just written
    torch.testing.assert_close(o, v)


def test_the_token_loop_equals_the_matrices_written_out() -> None:
    q, k, v, beta, g = inputs(5, "channel")
    state = torch.zeros(k.shape[0], H, K, V, dtype=k.dtype)
    for t in range(5):
        kk = torch.einsum("bhi,bhj->bhij", k[:, t], k[:, t])
        transition = (torch.eye(K) - beta[:, t, :, None, None] * kk) @ torch.diag_embed(g[:, t].exp())
        state = transition @ state + beta[:, t, :, None, None] * torch.einsum("bhk,bhv->bhkv", k[:, t], v[:, t])
    o, last = delta_rule_naive(q, k, v, beta, g, scale=0.5)
    assert_same([o[:, -1], last], [0.5 * torch.einsum("bhkv,bhk->bhv", state, q[:, -1]), state])


@pytest.mark.parametrize("tokens", RAGGED)
@pytest.mark.parametrize("decay", DECAYS)
def test_chunked_equals_the_token_loop_with_its_gradients(tokens: int, decay: str) -> None:
    expected = values_and_gradients(delta_rule_naive, inputs(tokens, decay))
    assert_same(values_and_gradients(delta_rule_chunked, inputs(tokens, decay)), expected)


@pytest.mark.parametrize("decay", DECAYS)
def test_many_superblocks_hand_their_state_on(decay: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(chunks, "NUMBERS_IN_SUPERBLOCK", 1)
    tokens = 2 * 4 * chunks.CHUNKS_IN_SUPERBLOCK + 11
    expected = delta_rule_naive(*inputs(tokens, decay), scale=1.0)
    assert_same(delta_rule_chunked(*inputs(tokens, decay), scale=1.0, chunk_size=4), expected)


@pytest.mark.parametrize("cut", [1, 5, 32, 69])
@pytest.mark.parametrize("decay", DECAYS)
def test_a_sequence_cut_anywhere_continues_from_its_state(cut: int, decay: str) -> None:
    tensors = inputs(70, decay)
    whole, last = delta_rule_chunked(*tensors, scale=1.0)
    first, handed = delta_rule_chunked(*part(tensors, slice(cut)), scale=1.0)
    second, end = delta_rule_chunked(*part(tensors, slice(cut, None)), scale=1.0, initial_state_BHKV=handed)
    assert_same([torch.cat((first, second), 1), end], [whole, last])
    o, _ = delta_rule_step(*(None if x is None else x[:, cut] for x in tensors), handed, 1.0)
    assert_same([o], [whole[:, cut]])


def test_no_decay_is_a_decay_of_zero_and_equal_channels_are_one_per_head() -> None:
    q, k, v, beta, g = inputs(70, "head")
    zero = delta_rule_chunked(q, k, v, beta, torch.zeros_like(q), scale=1.0)
    assert_same(delta_rule_chunked(q, k, v, beta, None, scale=1.0), zero)
    per_head = delta_rule_chunked(q, k, v, beta, g, scale=1.0)
    assert_same(delta_rule_chunked(q, k, v, beta, g[..., None].expand_as(q), scale=1.0), per_head)


def test_orthogonal_keys_written_once_are_linear_attention() -> None:
    k = torch.eye(K, dtype=torch.float64)[None, :, None].expand(2, K, H, K)
    q, _, v, beta, _ = inputs(K)
    o, _ = delta_rule_chunked(q, k, v, beta, None, scale=1.0)
    expected = torch.einsum("bthk,bshk,bshv,bsh,ts->bthv", q, k, v, beta, torch.ones(K, K, dtype=k.dtype).tril())
    assert_same([o], [expected])


def test_a_key_repeated_at_full_strength_does_not_lose_digits() -> None:
    q, k, v, _, _ = inputs(256)
    k, beta = k[:, :1].expand_as(k), torch.full_like(v[..., 0], 1.9)
    expected = delta_rule_naive(q, k, v, beta, None, scale=1.0)
    got = delta_rule_chunked(*(x.float() for x in (q, k, v, beta)), None, scale=1.0)
    # The token loop itself is off by 5e-5 here; a series in powers of the matrix would overflow.
    assert_same([x.double() for x in got], expected, 1e-3)


def test_extreme_decays_are_exact_forward_and_backward_in_float32() -> None:
    exact = [*inputs(200)[:4], extreme_log_decay(200)]
    expected = values_and_gradients(delta_rule_naive, exact)
    got = values_and_gradients(delta_rule_chunked, [x.float() for x in exact])
    for a, b in zip(got, expected, strict=True):
        assert a.isfinite().all()
        assert (a.double() - b).norm() < 1e-4 * b.norm()


@pytest.mark.parametrize("lowest", [-200.0, -1e3, -1e6, -torch.inf])
@pytest.mark.parametrize("decay", ["head", "channel"])
def test_tokens_that_forget_everything_leave_the_others_exact(lowest: float, decay: str) -> None:
    given = inputs(150, decay)
    assert given[4] is not None
    given[4][:, 3::8] = lowest
    expected = values_and_gradients(delta_rule_naive, given)
    got = values_and_gradients(delta_rule_chunked, [x.float() for x in given])
    for a, b in zip(got, expected, strict=True):
        assert (a.double() - b).norm() < 5e-5 * b.norm()


@pytest.mark.parametrize("decay", DECAYS)
def test_a_bfloat16_initial_state_is_summed_in_fp32(decay: str) -> None:
    given = [None if x is None else x.float() for x in inputs(40, decay)]
    start = draw(1, K, seed=9)[:, 0, :, :, None].expand(-1, -1, -1, V).bfloat16()
    _, last = delta_rule_chunked(*given, scale=1.0, initial_state_BHKV=start)
    _, expected = delta_rule_naive(*given, scale=1.0, initial_state_BHKV=start.float())
    assert last.dtype == torch.float32
    torch.testing.assert_close(last, expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("whole", [0.9 * MILD, 1.1 * MILD])
def test_decays_on_either_side_of_mild_are_exact_forward_and_backward_in_float32(whole: float) -> None:
    g = (-whole / 16 * draw(70, K, seed=6).sigmoid()).clamp(min=-whole / 32)  # most at the floor, 32 tokens a chunk
    g[:, :32] = -whole / 32
    exact = [*inputs(70)[:4], g]
    expected = values_and_gradients(delta_rule_naive, exact)
    got = values_and_gradients(delta_rule_chunked, [x.float() for x in exact])
    for a, b in zip(got, expected, strict=True):
        assert (a.double() - b).norm() < 1e-5 * b.norm()


@pytest.mark.parametrize("decay", DECAYS)
def test_bfloat16_stays_near_the_definition_at_length_and_keeps_an_fp32_state(decay: str) -> None:
    q, k, v, beta, g = inputs(2048, decay)
    half = [x.bfloat16() for x in (q, k, v, beta / 2)]
    g = None if g is None else (0.05 * g).float()
    o, final = delta_rule_chunked(*half, g, scale=0.4)
    expected, _ = delta_rule_chunked(*(x.double() for x in half), None if g is None else g.double(), scale=0.4)
    assert o.dtype == torch.bfloat16 and final.dtype == torch.float32
    early, late = drift(o.double(), expected)
    assert early < 0.01 and late < 0.01


@pytest.mark.parametrize("size", [1, 2, 32])
def test_the_triangular_inverse_and_its_gradient_are_those_of_a_solve(size: int) -> None:
    lower = torch.randn(2, 3, size, size, dtype=torch.float64).tril(-1).requires_grad_()
    eye = torch.eye(size, dtype=torch.float64).expand_as(lower)
    solved = torch.linalg.solve_triangular(lower, eye, upper=False, unitriangular=True)
    weights = torch.randn_like(solved).tril()
    (expected,) = torch.autograd.grad((solved * weights).sum(), lower)
    (got,) = torch.autograd.grad((unit_lower_inverse(lower) * weights).sum(), lower)
    assert_same([unit_lower_inverse(lower), got], [solved, expected.tril(-1)])
