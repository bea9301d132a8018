"""Chunked losses equal the whole ones in value and gradients, and never hold all logits."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from halobench.errors import UserError
from halobench.kernels.chunked_loss import chunked_loss, cross_entropy, forward_kl, naive, rows, tokens_per_chunk

N, D, V = 37, 8, 53
CAP = 2.0
BENCHMARK = Path(__file__).resolve().parents[1] / "benchmarks" / "loss.py"


class Case:
    """Student and teacher of one vocabulary: hidden states, unembeddings with biases, weights and targets of tokens."""

    def __init__(self, dtype: torch.dtype = torch.float64) -> None:
        generator = torch.Generator().manual_seed(0)

        def draw(*shape: int) -> Tensor:
            return torch.randn(*shape, generator=generator, dtype=torch.float64).to(dtype)

        self.hidden, self.target = draw(N, D).requires_grad_(), draw(N, D)
        self.head, self.teacher_head = nn.Parameter(draw(V, D)), draw(V, D)
        self.bias, self.teacher_bias = nn.Parameter(draw(V)), draw(V)
        self.weights, self.targets = draw(N).abs(), torch.arange(N) * 7 % V
        self.capped = False

    @property
    def parameters(self) -> list[nn.Parameter]:
        return [self.head, self.bias]

    def _cap(self, logits: Tensor) -> Tensor:
        return CAP * torch.tanh(logits / CAP) if self.capped else logits

    def student(self, hidden: Tensor) -> Tensor:
        return self._cap(hidden @ self.head.T + self.bias)

    def teacher(self, part: slice) -> Tensor:
        return self._cap(self.target[part] @ self.teacher_head.T + self.teacher_bias)

    def kl(self, kl: Callable[..., Tensor] = forward_kl, temperature: float = 1.0) -> Callable[[Tensor, slice], Tensor]:
        return lambda h, part: kl(self.student(h), self.teacher(part), self.weights[part], temperature=temperature)

    def ce(self, ce: Callable[..., Tensor] = cross_entropy) -> Callable[[Tensor, slice], Tensor]:
        return lambda h, part: ce(self.student(h), self.targets[part], self.weights[part])

    def whole(self, loss: Callable[[Tensor, slice], Tensor]) -> tuple[Tensor, ...]:
        """The loss of all tokens at once, and its gradients."""
        value = loss(self.hidden, slice(0, N))
        return value.detach(), *torch.autograd.grad(value, [self.hidden, *self.parameters])

    def chunked(self, loss: Callable[[Tensor, slice], Tensor], chunk: int | None) -> tuple[Tensor, ...]:
        value = chunked_loss(loss, self.hidden, self.parameters, chunk)
        return value.detach(), *torch.autograd.grad(value, [self.hidden, *self.parameters])


def assert_equal(found: tuple[Tensor, ...], expected: tuple[Tensor, ...], tolerance: float) -> None:
    """Value and gradients, by hidden states, unembedding and bias."""
    for a, b in zip(found, expected, strict=True):
        assert float((a - b).norm()) <= tolerance * float(b.norm())


@pytest.mark.parametrize("capped", [False, True])
@pytest.mark.parametrize("chunk", [1, 5, 37, 100, None])
def test_kl_in_chunks_equals_its_definition_in_value_and_gradients(chunk: int | None, capped: bool) -> None:
    case = Case()
    case.capped = capped
    assert_equal(case.chunked(case.kl(), chunk), case.whole(case.kl(naive.forward_kl)), 1e-12)


@pytest.mark.parametrize("temperature", [0.5, 1.0, 3.0])
def test_a_temperature_divides_both_logits_and_the_result_is_multiplied_by_its_square(temperature: float) -> None:
    case = Case()
    expected = case.whole(case.kl(naive.forward_kl, temperature))
    student, teacher = (
        torch.log_softmax(x / temperature, -1) for x in (case.student(case.hidden), case.teacher(slice(0, N)))
    )
    by_hand = (case.weights * (teacher.exp() * (teacher - student)).sum(-1)).sum() * temperature**2
    assert float(expected[0]) == pytest.approx(float(by_hand.detach()), rel=1e-12)
    assert_equal(case.chunked(case.kl(temperature=temperature), 10), expected, 1e-12)


@pytest.mark.parametrize("capped", [False, True])
def test_cross_entropy_in_chunks_equals_its_definition(capped: bool) -> None:
    case = Case()
    case.capped = capped
    assert_equal(case.chunked(case.ce(), 6), case.whole(case.ce(naive.cross_entropy)), 1e-12)


def test_a_mix_of_kl_and_cross_entropy_on_the_same_logits_is_the_mix_of_their_gradients() -> None:
    case = Case()

    def mix(h: Tensor, part: slice) -> Tensor:
        logits = case.student(h)
        kl = forward_kl(logits, case.teacher(part), case.weights[part], temperature=2.0)
        return 0.7 * kl + 0.3 * cross_entropy(logits, case.targets[part], case.weights[part])

    kl, ce = case.whole(case.kl(naive.forward_kl, 2.0)), case.whole(case.ce(naive.cross_entropy))
    assert_equal(case.chunked(mix, 9), tuple(0.7 * a + 0.3 * b for a, b in zip(kl, ce, strict=True)), 1e-12)


def test_rows_of_a_block_are_no_part_of_the_result(monkeypatch: pytest.MonkeyPatch) -> None:
    case = Case()
    whole = case.whole(case.kl()), case.whole(case.ce())
    monkeypatch.setattr(rows, "BLOCK_BYTES", 3 * V * 8)  # three rows at a time, and one left over
    assert_equal(case.whole(case.kl()), whole[0], 1e-14)
    assert_equal(case.whole(case.ce()), whole[1], 1e-14)


@pytest.mark.parametrize("loss", ["kl", "ce"])
def test_sums_over_bf16_logits_are_taken_in_fp32(loss: str) -> None:
    """Judged by fp64 on the same rounded logits: only the gradient's own rounding to bf16 is left."""
    low, high = Case(torch.bfloat16), Case()
    student, teacher = low.student(low.hidden).detach(), low.teacher(slice(0, N))

    def both(s: Tensor, t: Tensor, module: object) -> tuple[Tensor, Tensor]:
        s = s.clone().requires_grad_()
        weights = high.weights.to(s.dtype)
        value = module.forward_kl(s, t, weights) if loss == "kl" else module.cross_entropy(s, high.targets, weights)  # type: ignore[attr-defined]
        return value.detach(), torch.autograd.grad(value, s)[0]

    high.weights = low.weights.double()
    found, slope = both(student, teacher, rows)
    expected, exact = both(student.double(), teacher.double(), naive)
    assert found.dtype == torch.float32 and slope.dtype == torch.bfloat16
    assert float(found) == pytest.approx(float(expected), rel=1e-6)
    torch.testing.assert_close(slope.double(), exact, rtol=2**-8, atol=1e-9)


def test_the_incoming_gradient_scales_what_is_returned() -> None:
    case = Case()
    loss = chunked_loss(case.kl(), case.hidden, case.parameters, 8)
    once = case.chunked(case.kl(), 8)[1:]
    assert_equal(torch.autograd.grad(3 * loss, [case.hidden, *case.parameters]), tuple(3 * g for g in once), 1e-12)


def test_a_frozen_head_and_frozen_states_are_allowed() -> None:
    case = Case()
    expected = case.whole(case.kl(naive.forward_kl))
    frozen = chunked_loss(case.kl(), case.hidden.detach(), [case.head], 8)
    assert_equal((torch.autograd.grad(frozen, case.head)[0],), (expected[2],), 1e-12)
    case.head.requires_grad_(False)
    case.bias.requires_grad_(False)
    for parameters in ([case.head], []):
        loss = chunked_loss(case.kl(), case.hidden, parameters)
        assert_equal((torch.autograd.grad(loss, case.hidden)[0],), (expected[1],), 1e-12)


def test_a_loss_without_gradients_is_taken_all_the_same() -> None:
    case = Case()
    expected = float(case.whole(case.kl(naive.forward_kl))[0])
    with torch.inference_mode():
        assert float(case.kl()(case.hidden, slice(0, N))) == pytest.approx(expected, rel=1e-12)


def test_no_more_than_a_chunk_of_logits_is_made_at_once() -> None:
    case, seen = Case(), []

    def piece(h: Tensor, part: slice) -> Tensor:
        seen.append(len(h))
        return case.kl()(h, part)

    chunked_loss(piece, case.hidden, case.parameters, 10)
    assert seen == [10, 10, 10, 7]


def test_the_chunk_follows_from_the_vocabulary() -> None:
    assert (
        5 * 4 * 151_936 * tokens_per_chunk(151_936) <= 768 * 2**20 < 5 * 4 * 151_936 * (tokens_per_chunk(151_936) + 1)
    )
    assert tokens_per_chunk(2048) == 4096 and tokens_per_chunk(10**9) == 16


def test_kl_is_zero_for_equal_and_positive_for_different_distributions() -> None:
    logits = torch.randn(4, 9, dtype=torch.float64)
    ones = torch.ones(4, dtype=torch.float64)
    assert float(forward_kl(logits, logits + 3.0, ones)) == pytest.approx(0.0, abs=1e-12)
    assert float(forward_kl(logits, logits.flip(-1), ones)) > 0.1


def test_what_is_no_temperature_and_what_is_another_vocabulary_is_refused() -> None:
    logits, ones = torch.zeros(2, 5), torch.ones(2)
    with pytest.raises(UserError, match="above 0, got 0"):
        forward_kl(logits, logits, ones, temperature=0.0)
    with pytest.raises(UserError, match="one vocabulary"):
        forward_kl(logits, torch.zeros(2, 6), ones)


def peak(tokens: int, vocabulary: int, width: int) -> dict[str, int]:
    """Peak memory of the KL with gradients in a fresh process, as benchmarks/loss.py counts it."""
    command = [sys.executable, str(BENCHMARK), "chunked", *map(str, (tokens, vocabulary, width))]
    return json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout)


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="the peak is read from Linux's /proc")
def test_memory_stays_below_its_bound_which_whole_logits_would_exceed() -> None:
    found = peak(6144, 16_384, 16)
    assert found["peak_bytes"] <= found["bound_bytes"] < found["whole_logits_bytes"]


@pytest.mark.slow
@pytest.mark.parametrize("width", [64, 128])
def test_sixteen_thousand_tokens_over_qwens_vocabulary_take_less_than_a_gigabyte_and_a_half(width: int) -> None:
    found = peak(16_384, 151_936, width)
    assert found["peak_bytes"] <= found["bound_bytes"] < 1_500_000_000
