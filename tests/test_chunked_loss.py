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

from halobench.errors import HalobenchError, UserError
from halobench.kernels.chunked_loss import (
    Bend,
    Head,
    SoftTargets,
    chunked_loss,
    cross_entropy,
    distillation,
    forward_kl,
    naive,
    rows,
    tokens_per_chunk,
)
from halobench.kernels.chunked_loss.hidden import LIVE_BYTES, chunk_tokens

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

    def distilled(self, asked: SoftTargets, chunk: int | None = 10, backend: str = "auto") -> tuple[Tensor, ...]:
        """The loss from hidden states, by explicit products, and its gradients."""
        value = self.distillation(asked, chunk, backend)
        return value.detach(), *torch.autograd.grad(value, [self.hidden, *self.parameters])

    def distillation(self, asked: SoftTargets, chunk: int | None = 10, backend: str = "auto") -> Tensor:
        bend = Bend(cap=CAP) if self.capped else Bend()
        return distillation(
            Head(weight_VD=self.head, bias_V=self.bias, bend=bend),
            Head(weight_VD=self.teacher_head, bias_V=self.teacher_bias, bend=bend),
            self.hidden, self.target, self.weights, self.targets, asked=asked, chunk=chunk, backend=backend,
        )  # fmt: skip

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
    monkeypatch.setitem(rows.BLOCK_BYTES, "cpu", 3 * V * 8)  # three rows at a time, and one left over
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


MIXED = SoftTargets(temperature=2.0, top_k=7, ce_share=0.3)


@pytest.mark.parametrize("asked", [SoftTargets(), SoftTargets(temperature=3.0), SoftTargets(top_k=7), MIXED])
@pytest.mark.parametrize("capped", [False, True])
@pytest.mark.parametrize("chunk", [5, 37, None])
def test_distillation_from_hidden_states_equals_its_definition(
    chunk: int | None, capped: bool, asked: SoftTargets
) -> None:
    case = Case()
    case.capped = capped
    assert_equal(case.distilled(asked, chunk), case.distilled(asked, backend="naive"), 1e-12)


def test_distillation_is_the_mix_of_kl_and_cross_entropy() -> None:
    case = Case()
    kl, ce = case.whole(case.kl(naive.forward_kl, 2.0)), case.whole(case.ce(naive.cross_entropy))
    mix = tuple(0.7 * a + 0.3 * b for a, b in zip(kl, ce, strict=True))
    assert_equal(case.distilled(SoftTargets(temperature=2.0, ce_share=0.3)), mix, 1e-12)


@pytest.mark.parametrize("kl", [naive.forward_kl, forward_kl])
def test_a_top_k_leaves_the_likeliest_tokens_and_one_bucket_for_the_rest(kl: Callable[..., Tensor]) -> None:
    case = Case()
    student, teacher = case.student(case.hidden), case.teacher(slice(0, N))
    by_hand = torch.zeros((), dtype=torch.float64)
    for s, t, weight in zip(student.softmax(-1), teacher.softmax(-1), case.weights, strict=True):
        best = t.topk(5).indices
        p, q = (torch.cat([x[best], (1 - x[best].sum())[None]]) for x in (t, s))
        by_hand = by_hand + weight * (p * (p.log() - q.log())).sum()
    value = kl(student, teacher, case.weights, top_k=5)
    assert float(value.detach()) == pytest.approx(float(by_hand.detach()), rel=1e-10)
    (slope,), (expected,) = (torch.autograd.grad(x, case.hidden, retain_graph=True) for x in (value, by_hand))
    torch.testing.assert_close(slope, expected, rtol=1e-9, atol=1e-11)
    whole = float(kl(student, teacher, case.weights).detach())
    assert 0 < float(value.detach()) < whole
    assert float(kl(student, teacher, case.weights, top_k=V).detach()) == pytest.approx(whole, rel=1e-12)


@pytest.mark.parametrize("kl", [naive.forward_kl, forward_kl])
def test_tokens_as_likely_as_the_kth_are_all_told_apart(kl: Callable[..., Tensor]) -> None:
    """Two ties at the third place: a top 3 is a top 4. All tokens tied: the whole KL."""
    student = torch.randn(1, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(0)).requires_grad_()
    teacher, one = torch.tensor([[3.0, 2.0, 1.0, 1.0, 0.0, -1.0]], dtype=torch.float64), torch.ones(1)
    torch.testing.assert_close(kl(student, teacher, one, top_k=3), kl(student, teacher, one, top_k=4))
    flat = torch.zeros_like(teacher)
    values = [kl(student, flat, one, top_k=k) for k in (2, None)]
    torch.testing.assert_close(values[0], values[1])
    slopes = [torch.autograd.grad(value, student)[0] for value in values]
    torch.testing.assert_close(slopes[0], slopes[1])


def test_distillation_scales_with_the_incoming_gradient_and_may_be_taken_twice() -> None:
    case = Case()
    once = case.distilled(MIXED)[1:]
    loss = case.distillation(MIXED)
    for _ in range(2):
        found = torch.autograd.grad(3 * loss, [case.hidden, *case.parameters], retain_graph=True)
        assert_equal(found, tuple(3 * g for g in once), 1e-12)


def test_what_is_kept_for_the_gradient_goes_with_it_and_a_second_one_must_be_asked_for() -> None:
    case = Case()
    for loss in (case.distillation(MIXED), chunked_loss(case.kl(), case.hidden, case.parameters, 10)):
        torch.autograd.grad(loss, [case.hidden, *case.parameters])
        with pytest.raises(RuntimeError, match="second time"):
            torch.autograd.grad(loss, [case.hidden, *case.parameters])


def test_a_gradient_of_the_gradient_is_refused_rather_than_wrong() -> None:
    case = Case()
    for loss in (case.distillation(MIXED), chunked_loss(case.kl(), case.hidden, case.parameters, 10)):
        (slope,) = torch.autograd.grad(loss**2, case.hidden, create_graph=True)
        with pytest.raises(RuntimeError, match="once_differentiable"):
            slope.square().sum().backward()


def test_logits_laid_out_the_other_way_have_the_same_gradient() -> None:
    logits, other = torch.randn(2, N, V, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    ones, found = torch.ones(N), []
    for student in (logits, logits.T.contiguous().T):
        leaf = student.detach().requires_grad_()
        found.append(torch.autograd.grad(forward_kl(leaf, other, ones), leaf)[0])
    torch.testing.assert_close(found[1], found[0])


@pytest.mark.parametrize("wrong", [-100, V])
def test_a_target_that_is_no_token_is_refused(wrong: int) -> None:
    case = Case()
    case.targets[3] = wrong
    with pytest.raises(RuntimeError, match=f"no token of the vocabulary of {V}"):
        case.distillation(MIXED)


def test_distillation_takes_no_gradient_that_nobody_asked_for() -> None:
    case = Case()
    value, *expected = case.distilled(MIXED)
    with torch.inference_mode():
        assert float(case.distillation(MIXED)) == pytest.approx(float(value), rel=1e-12)
    case.head.requires_grad_(False)
    case.bias.requires_grad_(False)
    assert_equal(torch.autograd.grad(case.distillation(MIXED), case.hidden), (expected[0],), 1e-12)
    case.hidden.requires_grad_(False)
    assert not case.distillation(MIXED).requires_grad


def test_under_autocast_products_are_in_bf16_and_gradients_in_the_parameters_own_dtype() -> None:
    case, exact = Case(torch.float32), Case()
    with torch.autocast("cpu", torch.bfloat16):
        found = case.distilled(SoftTargets(), 3)
    for a, b in zip(found, exact.distilled(SoftTargets()), strict=True):
        assert a.dtype == torch.float32
        assert 1e-4 * float(b.norm()) < float((a.double() - b).norm()) < 2e-2 * float(b.norm())


def test_a_student_in_bf16_may_have_a_teacher_in_fp32() -> None:
    case, exact = Case(torch.bfloat16), Case()
    case.target, case.teacher_head, case.teacher_bias = (
        x.float() for x in (exact.target, exact.teacher_head, exact.teacher_bias)
    )
    for a, b in zip(case.distilled(SoftTargets()), exact.distilled(SoftTargets()), strict=True):
        assert float((a.double() - b).norm()) < 2e-2 * float(b.norm())


def test_the_logits_of_a_chunk_fit_into_a_gigabyte_on_a_gpu() -> None:
    assert chunk_tokens(151_936, 4, "cuda") == 1536
    for vocabulary in (49_152, 151_936, 262_144):
        for size in (4, 8):
            assert 128 * vocabulary * size <= chunk_tokens(vocabulary, size, "cuda") * vocabulary * size < 10**9
    assert chunk_tokens(151_936, 8, "cpu") == 128 and LIVE_BYTES["cpu"] >= 128 * 8 * 151_936
    assert chunk_tokens(1000, 4, "cuda") == 4096 and chunk_tokens(10**9, 8, "cpu") == 16


def test_the_definition_can_be_asked_for_by_name_and_no_other_form_stands_in_for_an_unknown_one() -> None:
    case = Case()
    by_name = case.whole(lambda h, p: forward_kl(case.student(h), case.teacher(p), case.weights, 2.0, 7, "naive"))
    definition = case.whole(
        lambda h, p: naive.forward_kl(case.student(h), case.teacher(p), case.weights, temperature=2.0, top_k=7)
    )
    assert_equal(by_name, definition, 0.0)
    with pytest.raises(HalobenchError, match="no form fla"):
        rows.DistilRows(asked=SoftTargets(), form="fla")


def test_what_distillation_cannot_do_is_said() -> None:
    case = Case()
    head, small = Head(weight_VD=case.head), Head(weight_VD=case.teacher_head[:-1])
    with pytest.raises(UserError, match="one vocabulary"):
        distillation(head, small, case.hidden, case.target, case.weights, asked=SoftTargets())
    with pytest.raises(UserError, match="no text was given"):
        distillation(head, head, case.hidden, case.target, case.weights, asked=SoftTargets(ce_share=0.1))
    for wrong in ({"temperature": 0.0}, {"top_k": 0}, {"ce_share": 1.5}):
        with pytest.raises(UserError, match=f"^{next(iter(wrong))} (must be|is)"):
            SoftTargets(**wrong)
    with pytest.raises(UserError, match="above 0, got 0"):
        Bend(scale=0.0)


def peak(form: str, tokens: int, vocabulary: int, width: int) -> dict[str, int]:
    """Peak memory of the KL with gradients in a fresh process, as benchmarks/loss.py counts it."""
    sizes = {"--tokens": tokens, "--vocabulary": vocabulary, "--width": width}
    words = [str(word) for pair in sizes.items() for word in pair]
    command = [sys.executable, str(BENCHMARK), "--memory-of", form, "--device", "cpu", *words]
    return json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout)


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="the peak is read from Linux's /proc")
def test_memory_stays_below_its_bound_which_whole_logits_would_exceed() -> None:
    found = peak("torch", 6144, 16_384, 16)
    assert found["peak_bytes"] <= found["bound_bytes"] < found["whole_logits_bytes"]


@pytest.mark.slow
@pytest.mark.parametrize("width", [64, 128])
def test_sixteen_thousand_tokens_over_qwens_vocabulary_take_less_than_half_a_gigabyte(width: int) -> None:
    found = peak("torch", 16_384, 151_936, width)
    assert found["peak_bytes"] <= found["bound_bytes"] < 500_000_000


@pytest.mark.slow
def test_memory_is_a_tenth_of_the_definitions() -> None:
    ours, whole = (peak(form, 1024, 151_936, 64)["peak_bytes"] for form in ("torch", "naive"))
    assert 10 * ours <= whole
