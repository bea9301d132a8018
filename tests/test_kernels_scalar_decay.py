"""The scalar-decay operator: every form against the definition, in fp64, forward and backward."""

from __future__ import annotations

import pytest
import torch

from halobench.kernels import chunks
from halobench.kernels.scalar_decay.chunked import scalar_decay_chunked
from halobench.kernels.scalar_decay.naive import scalar_decay_naive
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


def test_slopes_of_a_power_of_two_are_geometric_and_others_are_interpolated() -> None:
    assert alibi_slopes(8) == [2.0**-h for h in range(1, 9)]
    assert alibi_slopes(6) == [2.0**-2, 2.0**-4, 2.0**-6, 2.0**-8, 2.0**-1, 2.0**-3]
    assert alibi_slopes(1) == [2.0**-8]
    with pytest.raises(ValueError, match="at least 1"):
        alibi_slopes(0)
