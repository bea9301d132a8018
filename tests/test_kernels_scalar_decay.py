"""The scalar-decay operator: every form against the definition, in fp64, forward and backward."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

from halobench.kernels import chunks
from halobench.kernels.scalar_decay.chunked import scalar_decay_chunked
from halobench.kernels.scalar_decay.naive import scalar_decay_naive
from halobench.kernels.scalar_decay.recurrence import scalar_decay
from halobench.kernels.scalar_decay.slopes import alibi_slopes
from halobench.kernels.scalar_decay.step import scalar_decay_step

B, H, K, V = 2, 3, 5, 4


def inputs(tokens: int, per_token: bool = False, dtype: torch.dtype = torch.float64) -> list[torch.Tensor]:
    g = torch.Generator().manual_seed(tokens)
    q, k = (torch.randn(B, tokens, H, K, generator=g, dtype=torch.float64) for _ in range(2))
    v = torch.randn(B, tokens, H, V, generator=g, dtype=torch.float64)
    decay = -torch.rand(B, tokens, H, generator=g, dtype=torch.float64)
    if per_token:
        decay[:, ::3] = 0  # tokens that take nothing, as padding does
    else:
        decay = -torch.tensor([0.9, 0.05, 0.001], dtype=torch.float64)
    return [x.to(dtype) for x in (q, k, v, decay)]


def state() -> torch.Tensor:
    return torch.randn(B, H, K, V, dtype=torch.float64, generator=torch.Generator().manual_seed(9))


def test_the_token_loop_equals_the_sum_written_out() -> None:
    q, k, v, g = inputs(6)
    o, _ = scalar_decay_naive(q, k, v, g, scale=0.5)
    expected = torch.zeros_like(o)
    for t in range(6):
        for s in range(t + 1):
            weight = 0.5 * (q[:, t] * k[:, s]).sum(-1) * torch.exp(g * (t - s))
            expected[:, t] += weight[..., None] * v[:, s]
    torch.testing.assert_close(o, expected)


@pytest.mark.parametrize("tokens", [1, 7, 8, 9, 37, 64])
@pytest.mark.parametrize("per_token", [False, True])
@pytest.mark.parametrize("initial", [False, True])
def test_chunked_equals_the_token_loop(tokens: int, per_token: bool, initial: bool) -> None:
    q, k, v, g = inputs(tokens, per_token)
    start = state() if initial else None
    expected = scalar_decay_naive(q, k, v, g, scale=0.3, initial_state_BHKV=start)
    got = scalar_decay_chunked(q, k, v, g, scale=0.3, initial_state_BHKV=start, chunk_size=8)
    for a, b in zip(got, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("per_token", [False, True])
def test_gradients_of_chunked_equal_those_of_the_token_loop(per_token: bool) -> None:
    leaves = [x.requires_grad_() for x in (*inputs(21, per_token), state())]
    gradients = []
    for function in (scalar_decay_naive, scalar_decay_chunked):
        chunk = {"chunk_size": 4} if function is scalar_decay_chunked else {}
        o, final = function(*leaves[:4], scale=0.3, initial_state_BHKV=leaves[4], **chunk)
        weights = torch.linspace(-1, 1, o.numel(), dtype=o.dtype).view_as(o)
        loss = (o * weights).sum() + (final**2).sum()
        gradients.append(torch.autograd.grad(loss, leaves))
    for got, expected in zip(gradients[1], gradients[0], strict=True):
        torch.testing.assert_close(got, expected, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("per_token", [False, True])
def test_many_superblocks_hand_their_state_on(per_token: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(chunks, "NUMBERS_IN_SUPERBLOCK", 1)
    tokens = 2 * 4 * chunks.CHUNKS_IN_SUPERBLOCK + 11
    q, k, v, g = inputs(tokens, per_token)
    expected = scalar_decay_naive(q, k, v, g, scale=1.0)
    got = scalar_decay_chunked(q, k, v, g, scale=1.0, chunk_size=4)
    for a, b in zip(got, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("cut", [1, 5, 8, 20])
def test_a_sequence_cut_anywhere_continues_from_its_state(cut: int) -> None:
    q, k, v, g = inputs(21)
    whole, last = scalar_decay_chunked(q, k, v, g, scale=1.0, chunk_size=8)
    first, handed = scalar_decay_chunked(q[:, :cut], k[:, :cut], v[:, :cut], g, scale=1.0, chunk_size=8)
    second = []
    for t in range(cut, 21):
        o, handed = scalar_decay_step(q[:, t], k[:, t], v[:, t], g, handed, 1.0)
        second.append(o)
    torch.testing.assert_close(torch.cat((first, torch.stack(second, 1)), 1), whole)
    torch.testing.assert_close(handed, last)


def test_the_fastest_decay_neither_overflows_nor_turns_to_nan_in_float32() -> None:
    q, k, v, _ = inputs(600, dtype=torch.float32)
    g = torch.tensor([-40.0, -1.0, 0.0])
    o, final = scalar_decay_chunked(q, k, v, g, scale=1.0)
    expected, expected_final = scalar_decay_naive(q.double(), k.double(), v.double(), g.double(), scale=1.0)
    torch.testing.assert_close(o.double(), expected, rtol=1e-3, atol=1e-3)
    torch.testing.assert_close(final.double(), expected_final, rtol=1e-3, atol=1e-3)


def test_bfloat16_stays_near_the_definition_at_length_and_keeps_an_fp32_state() -> None:
    q, k, v, _ = inputs(4096, dtype=torch.bfloat16)
    g = -torch.tensor([0.5, 0.01, 0.004])
    o, final = scalar_decay_chunked(q, k, v, g, scale=0.4)
    expected, _ = scalar_decay_chunked(q.double(), k.double(), v.double(), g.double(), scale=0.4)
    assert o.dtype == torch.bfloat16 and final.dtype == torch.float32
    early, late = ((o[:, part].double() - expected[:, part]).norm() / expected[:, part].norm()
                   for part in (slice(0, 512), slice(-512, None)))  # fmt: skip
    assert early < 0.02 and late < 0.02


def results(function: Callable[..., Any], given: list[torch.Tensor]) -> list[torch.Tensor]:
    """Outputs, last state and the gradients of a mixed loss in q, k, v, log decay and initial state."""
    leaves = [x.detach().clone().requires_grad_() for x in given]
    o, last = function(*leaves[:4], scale=0.3, initial_state_BHKV=leaves[4])
    weights, of_last = (torch.linspace(-1, 1, x.numel()).bfloat16().view_as(x).to(x) for x in (o, last))
    return [o, last, *torch.autograd.grad((o * weights).sum() + (last * of_last).sum(), leaves)]


def relative_errors(got: list[torch.Tensor], exact: list[torch.Tensor]) -> list[float]:
    return [float((a.double() - b).detach().norm() / b.detach().norm()) for a, b in zip(got, exact, strict=True)]


@pytest.mark.parametrize("mean", [0.01, 0.3, 3.0])
@pytest.mark.parametrize("per_token", [False, True])
def test_the_gradient_of_the_decay_survives_bfloat16(mean: float, per_token: bool) -> None:
    q, k, v, g = inputs(150, per_token, torch.bfloat16)
    g = g.float() * (2 * mean) if per_token else -torch.tensor([mean, mean / 2, mean * 2])
    given = [q, k, v, g, state().float()]
    exact = results(scalar_decay_naive, [x.double() for x in given])
    got = results(scalar_decay_chunked, given)
    assert got[2].dtype == torch.bfloat16 and got[5].dtype == torch.float32
    assert max(relative_errors(got[2:], exact[2:])) < 5e-3


@pytest.mark.parametrize("lowest", [-200.0, -1e3, -1e6, -torch.inf])
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 5e-5), (torch.float64, 1e-10)])
@pytest.mark.parametrize("per_token", [False, True])
def test_tokens_that_forget_everything_leave_the_others_exact(
    lowest: float, dtype: torch.dtype, tolerance: float, per_token: bool
) -> None:
    q, k, v, g = inputs(150, per_token)
    if per_token:
        g[:, 3::8] = lowest
    else:
        g[0] = lowest
    given = [x.to(dtype) for x in (q, k, v, g, state())]
    exact = results(scalar_decay_naive, [x.double() for x in given])
    got = results(scalar_decay_chunked, given)
    assert max(relative_errors(got, exact)) < tolerance
    assert not (got[5][:, 3::8] if per_token else got[5][0]).any()


@pytest.mark.parametrize("backend", ["naive", "torch"])
@pytest.mark.parametrize("tokens", [1, 9])
def test_a_bfloat16_initial_state_is_summed_in_fp32(backend: str, tokens: int) -> None:
    q, k, v, g = inputs(tokens, dtype=torch.bfloat16)
    start = state().bfloat16()
    _, last = scalar_decay(q, k, v, g.float(), scale=1.0, initial_state_BHKV=start, backend=backend)
    exact = [x.double() for x in (q, k, v, g)]
    _, expected = scalar_decay_naive(*exact, scale=1.0, initial_state_BHKV=start.double())
    assert last.dtype == torch.float32
    torch.testing.assert_close(last.double(), expected, rtol=1e-2, atol=2e-2)


@pytest.mark.parametrize("backend", ["naive", "torch"])
@pytest.mark.parametrize("initial", [False, True])
def test_no_tokens_leave_the_state_as_it_is(backend: str, initial: bool) -> None:
    q, k, v, g = inputs(0)
    start = state() if initial else None
    o, last = scalar_decay(q, k, v, g, scale=1.0, initial_state_BHKV=start, backend=backend)
    assert o.shape == (B, 0, H, V)
    torch.testing.assert_close(last, state() if initial else torch.zeros(B, H, K, V, dtype=torch.float64))


def test_a_step_reads_its_state_in_fp32_under_autocast() -> None:
    q, k, v, g = (x.float() for x in inputs(1))
    token = q[:, 0], k[:, 0], v[:, 0], g, state().float(), 0.5
    expected = scalar_decay_step(*token)
    with torch.autocast("cpu", torch.bfloat16):
        got = scalar_decay_step(*token)
    assert got[0].dtype == torch.float32 and all(torch.equal(a, b) for a, b in zip(got, expected, strict=True))


def test_slopes_of_a_power_of_two_are_geometric_and_others_are_interpolated() -> None:
    assert alibi_slopes(8) == [2.0**-h for h in range(1, 9)]
    assert alibi_slopes(6) == [2.0**-2, 2.0**-4, 2.0**-6, 2.0**-8, 2.0**-1, 2.0**-3]
    assert alibi_slopes(1) == [2.0**-8]
    with pytest.raises(ValueError, match="at least 1"):
        alibi_slopes(0)
