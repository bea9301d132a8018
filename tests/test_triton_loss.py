"""Distillation in Triton equals its definition in float64, in value and gradients; bodies run on a GPU and interpreted.

Sizes are no multiples of anything: a vocabulary of 1,000 (one partial block) or 9,001 (two of 4,096 and a part).
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import pytest
import torch
from torch import Tensor

from halobench.kernels.chunked_loss import (
    Bend,
    Head,
    SoftTargets,
    chunked_loss,
    cross_entropy,
    distillation,
    forward_kl,
    naive,
)
from halobench.kernels.chunked_loss.rows import DistilRows
from tests.triton_interpreter import INTERPRETED, device, passes_under_the_interpreter

__all__ = ["device"]  # a fixture
gpu = pytest.mark.gpu
ROUNDING = 2**-7 if INTERPRETED else 2**-8  # the interpreter cuts bits off where a GPU rounds to bf16

ASKED = {
    "plain": SoftTargets(),
    "warm": SoftTargets(temperature=2.0),
    "cold": SoftTargets(temperature=0.5, ce_share=0.5),
    "top 20": SoftTargets(top_k=20),
    "top 1, warm": SoftTargets(top_k=1, temperature=2.0),
    "top of all": SoftTargets(top_k=100_000),
    "with text": SoftTargets(ce_share=0.3),
    "text alone": SoftTargets(ce_share=1.0),
    "all at once": SoftTargets(temperature=2.0, top_k=20, ce_share=0.3),
}


@dataclass(frozen=True, kw_only=True)
class Case:
    """Seeded hidden states and unembeddings, rounded to `dtype`; every seventh token weighs nothing."""

    device: str
    dtype: torch.dtype = torch.float32
    tokens: int = 23
    vocabulary: int = 1000
    bend: Bend = Bend()
    teacher_bend: Bend = Bend()

    def values(self, asked: SoftTargets, backend: str, chunk: int | None = 9) -> list[Tensor]:
        """Loss, and its gradients in hidden states, unembedding and bias, in fp64 on the CPU."""
        generator = torch.Generator().manual_seed(self.tokens)
        dtype = torch.float64 if backend == "naive" else self.dtype

        def draw(*shape: int) -> Tensor:
            drawn = torch.randn(*shape, generator=generator, dtype=torch.float64)
            return drawn.to(self.dtype).to(device=self.device, dtype=dtype)

        hidden, head, bias = (
            draw(*s).requires_grad_() for s in ((self.tokens, 24), (self.vocabulary, 24), (self.vocabulary,))
        )
        target, teacher = draw(self.tokens, 16), draw(self.vocabulary, 16)
        weights = draw(self.tokens).abs()
        weights[::7] = 0
        text = torch.arange(self.tokens, device=self.device) * 37 % self.vocabulary
        loss = distillation(
            Head(weight_VD=head, bias_V=bias, bend=self.bend),
            Head(weight_VD=teacher, bend=self.teacher_bend),
            hidden, target, weights, text, asked=asked, chunk=chunk, backend=backend,
        )  # fmt: skip
        found = [loss.detach(), *torch.autograd.grad(0.5 * loss, [hidden, head, bias])]
        return [x.double().cpu() for x in found]


def errors(case: Case, asked: SoftTargets, chunk: int | None = 9) -> list[float]:
    """Relative errors of the loss and of each gradient against the definition in fp64."""
    found, expected = case.values(asked, "triton", chunk), case.values(asked, "naive")
    return [float((a - b).norm() / b.norm()) for a, b in zip(found, expected, strict=True)]


@gpu
@pytest.mark.parametrize("asked", ASKED.values(), ids=ASKED)
def test_value_and_gradients_equal_the_definition_in_fp32(device: str, asked: SoftTargets) -> None:
    assert max(errors(Case(device=device), asked)) < 1e-5


@gpu
def test_more_rows_than_a_chunk_or_two_equal_the_definition(device: str) -> None:
    assert max(errors(Case(device=device, tokens=151), ASKED["all at once"], 64)) < 1e-5


@gpu
@pytest.mark.parametrize("asked", [ASKED["plain"], ASKED["all at once"]], ids=["plain", "all at once"])
def test_a_row_of_several_blocks_equals_the_definition(device: str, asked: SoftTargets) -> None:
    assert max(errors(Case(device=device, tokens=9, vocabulary=9001), asked, None)) < 1e-5


@gpu
@pytest.mark.parametrize("asked", [ASKED["plain"], ASKED["all at once"]], ids=["plain", "all at once"])
def test_scaled_and_capped_logits_equal_the_definition(device: str, asked: SoftTargets) -> None:
    case = Case(device=device, bend=Bend(scale=0.5, cap=3.0), teacher_bend=Bend(scale=0.25))
    assert max(errors(case, asked)) < 1e-5
    assert max(errors(replace(case, bend=Bend(scale=2.0), teacher_bend=Bend(cap=5.0)), asked)) < 1e-5


@gpu
@pytest.mark.parametrize("asked", ASKED.values(), ids=ASKED)
def test_bf16_logits_cost_their_own_rounding_and_no_more(device: str, asked: SoftTargets) -> None:
    """Rows alone, judged by fp64 on the same rounded logits, the gradient in the logits' place."""
    student, teacher = (3 * torch.randn(5, 5003, generator=torch.Generator().manual_seed(s)) for s in (1, 2))
    student, teacher = student.bfloat16(), teacher.bfloat16()
    weights, text = torch.rand(5, generator=torch.Generator().manual_seed(3)), torch.arange(5) * 1200
    exact = student.double().requires_grad_()
    loss = naive.distillation(exact, teacher.double(), weights.double(), text, asked)
    (slope,) = torch.autograd.grad(loss, exact)
    rows, place = DistilRows(asked=asked, form="triton"), student.to(device)
    found = rows(place, teacher.to(device), weights.to(device), text.to(device), place)
    assert float(found) == pytest.approx(float(loss.detach()), rel=1e-5)
    torch.testing.assert_close(place.cpu().double(), slope, rtol=ROUNDING, atol=1e-7)


@gpu
def test_tokens_without_weight_leave_no_gradient(device: str) -> None:
    hidden = Case(device=device).values(ASKED["all at once"], "triton")[1]
    assert float(hidden[::7].abs().max()) == 0.0
    assert float(hidden[1::7].abs().amin(-1).min()) > 0.0


@gpu
@pytest.mark.parametrize("asked", [ASKED["plain"], ASKED["all at once"]], ids=["plain", "all at once"])
def test_extreme_logits_stay_finite_and_exact(device: str, asked: SoftTargets) -> None:
    """Logits of +-10,000: mass on one token or many, on other tokens or the same; none left outside the top k."""
    student, teacher = torch.full((4, 600), -1e4), torch.full((4, 600), -1e4)
    student[0, 3], teacher[0, 400] = 1e4, 1e4
    student[1, 3], teacher[1, 3] = 1e4, 1e4
    student[2], teacher[2, ::2] = 1e4, 1e4
    student[3, :50], teacher[3, 25:75] = 1e4, 1e4
    weights, text = torch.ones(4), torch.tensor([400, 3, 9, 0])
    exact = student.double().requires_grad_()
    loss = naive.distillation(exact, teacher.double(), weights.double(), text, asked)
    (slope,) = torch.autograd.grad(loss, exact)
    place = student.to(device)
    found = DistilRows(asked=asked, form="triton")(
        place, teacher.to(device), weights.to(device), text.to(device), place
    )
    assert float(found) == pytest.approx(float(loss.detach()), rel=1e-5)
    torch.testing.assert_close(place.cpu().double(), slope, rtol=1e-5, atol=1e-6)


@gpu
def test_equal_distributions_cost_nothing(device: str) -> None:
    logits = 5 * torch.randn(7, 5003, generator=torch.Generator().manual_seed(1)).to(device)
    place = logits.clone()
    for asked in (SoftTargets(), SoftTargets(top_k=3)):
        rows = DistilRows(asked=asked, form="triton")
        assert abs(float(rows(place, logits + 3.0, torch.ones(7, device=device), None, None))) < 1e-4
    assert torch.equal(place, logits)  # nothing is written where no gradient is asked for


@gpu
def test_logits_that_another_loss_reads_are_left_alone(device: str) -> None:
    """Through autograd the gradient has a place of its own, so that a cross entropy may follow on the same logits."""

    def mixed(backend: str, dtype: torch.dtype) -> list[Tensor]:
        generator = torch.Generator().manual_seed(5)
        hidden, head, teacher = (
            torch.randn(*s, generator=generator).to(device=device, dtype=dtype) for s in ((20, 8), (300, 8), (20, 300))
        )
        head = torch.nn.Parameter(head)
        ones, text = torch.ones(20, device=device), torch.arange(20, device=device)

        def loss(h: Tensor, part: slice) -> Tensor:
            logits = h @ head.T
            kl = forward_kl(logits, teacher[part], ones[part], temperature=2.0, backend=backend)
            return kl + cross_entropy(logits, text[part], ones[part])

        value = chunked_loss(loss, hidden.requires_grad_(), [head], 9)
        return [value.detach(), *torch.autograd.grad(value, [hidden, head])]

    for found, expected in zip(mixed("triton", torch.float32), mixed("torch", torch.float64), strict=True):
        assert float((found.double() - expected).norm() / expected.norm()) < 1e-5


@gpu
def test_a_chunk_in_bf16_gathers_the_unembedding_s_gradient_in_fp32(device: str) -> None:
    if device == "cpu":
        pytest.skip("products of bf16 factors with an fp32 sum exist on a GPU alone")
    case = Case(device=device, dtype=torch.bfloat16, tokens=4096)
    found, whole = (case.values(ASKED["plain"], "triton", chunk)[2] for chunk in (16, 4096))
    exact = case.values(ASKED["plain"], "naive")[2]
    # A sum of 256 parts in bf16 would be off by far more than one product is.
    assert float((found - exact).norm()) < 1.1 * float((whole - exact).norm()) < 0.02 * float(exact.norm())


@gpu
def test_a_gigabyte_holds_all_logits_that_are_alive(device: str) -> None:
    if device == "cpu":
        pytest.skip("memory of a GPU")
    vocabulary, tokens, width = 151_936, 4096, 64
    options = {"device": device, "dtype": torch.bfloat16}
    head = Head(weight_VD=torch.randn(vocabulary, width, **options).requires_grad_())
    hidden = torch.randn(tokens, width, **options).requires_grad_()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    ones = torch.ones(tokens, device=device)
    distillation(head, head, hidden, hidden, ones, asked=SoftTargets(), backend="triton").backward()
    others = (4 + 4 + 2) * vocabulary * width + 32 * tokens * width  # the unembedding's gradient, and small things
    assert torch.cuda.max_memory_allocated() - before < 1_000_000_000 + others


@pytest.mark.skipif(torch.cuda.is_available(), reason="the same tests run on the GPU: pytest -m gpu")
def test_the_same_under_the_interpreter() -> None:
    passes_under_the_interpreter(__file__)
