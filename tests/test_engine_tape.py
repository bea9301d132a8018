"""The tape of operations: it runs on what its tensors hold now, refuses what it cannot hold, and is short."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
import torch
from torch import Tensor

from halobench.surgery.engine.tape import Tape, UnfitError


def test_a_tape_takes_nothing_that_decides_by_numbers() -> None:
    x = torch.tensor([1.0, -1.0])
    asked = (lambda: x.nonzero(), lambda: x[x > 0], lambda: float(x.sum()), lambda: torch.equal(x, x))
    for work in (*asked, lambda: x.tolist(), lambda: x.numpy(), lambda: np.asarray(x)):
        with pytest.raises(UnfitError), Tape():
            work()


def test_a_tape_runs_on_what_its_tensors_hold_now() -> None:
    x, total = torch.tensor([1.0, 2.0]), torch.zeros(2)
    with Tape([x]) as tape:
        total.add_(torch.cat((x[1:], x[:1])) ** 2)
    x.copy_(torch.tensor([3.0, 4.0]))
    tape.replay()
    assert total.tolist() == [4.0 + 16.0, 1.0 + 9.0]


def test_what_comes_of_weights_alone_is_not_computed_again() -> None:
    weight, x, total = torch.tensor([1.0, 2.0]), torch.ones(2), torch.zeros(2)
    with Tape([x]) as tape:
        total.add_(x * (weight + 1).exp())
    assert len(tape.calls) == 2
    first = total.clone()
    tape.replay()
    torch.testing.assert_close(total, 2 * first)


def noted(work: Callable[[Tensor], Tensor], x: Tensor) -> tuple[Tape, Tensor]:
    """A tape of `work` on x, and where it leaves its result."""
    out = torch.empty_like(work(x))
    with Tape([x]) as tape:
        out.copy_(work(x))
    return tape, out


def norm(x: Tensor) -> Tensor:
    return x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 1e-5)


@pytest.mark.parametrize("square", [lambda x: x.pow(2), torch.square], ids=["pow", "square"])
@pytest.mark.parametrize("shape", [(1, 1, 96), (3, 1, 4, 17)])
def test_the_mean_square_of_a_norm_is_one_call_of_the_same_number(square, shape) -> None:  # type: ignore[no-untyped-def]
    x = torch.randn(shape, dtype=torch.float64)
    tape, out = noted(lambda x: x * torch.rsqrt(square(x).mean(-1, keepdim=True) + 1e-5), x)
    assert len(tape.calls) == 4  # product, rsqrt, mul, copy
    x.normal_()
    tape.replay()
    torch.testing.assert_close(out, norm(x), rtol=1e-13, atol=1e-13)


@pytest.mark.parametrize(
    "work",
    [
        lambda x: (x.pow(3).mean(-1, keepdim=True) + 1e-5).rsqrt(),
        lambda x: (x.pow(2).mean(0, keepdim=True) + 1e-5).rsqrt(),
        lambda x: (x.pow(2).mean(-1) + 1e-5).rsqrt(),
        lambda x: torch.add(x.pow(2).mean(-1, keepdim=True), 0.5, alpha=3).rsqrt(),
        lambda x: (x.pow(2).mean(-1, keepdim=True) + x.sum()).rsqrt(),
        lambda x: (y := x.pow(2)) * (y.mean(-1, keepdim=True) + 1e-5),
        lambda x: (y := x.pow(2).mean(-1, keepdim=True)) * (y + 1e-5),
        lambda x: (x.t().pow(2).mean(-1, keepdim=True) + 1e-5).rsqrt(),
        lambda x: x.bfloat16().pow(2).mean(-1, keepdim=True) + 1e-5,
        lambda x: (x.pow(2).mean(-1, keepdim=True) + 1e-5).rsqrt().half() * x,
        lambda x: x.pow(2).mean(-1, keepdim=True, dtype=torch.float64) + 1e-5,
    ],
)
def test_what_only_looks_like_a_norm_is_left_as_it_is(work) -> None:  # type: ignore[no-untyped-def]
    x = torch.rand(3, 5)
    tape, out = noted(work, x)
    called = [getattr(call, "func", None) for call in tape.calls]
    assert torch.baddbmm not in called
    x.copy_(torch.rand(3, 5))
    tape.replay()
    assert torch.equal(out, work(x))


@pytest.mark.parametrize("shapes", [((5,), (5,)), ((4, 5), (5,)), ((2, 3, 5), (5, 4)), ((2, 1, 0), (2, 0, 3))])
def test_products_of_any_shape_are_replayed(shapes) -> None:  # type: ignore[no-untyped-def]
    x, y = (torch.randn(shape) for shape in shapes)
    with torch.inference_mode():
        tape, out = noted(lambda x: x @ y, x)
        x.normal_()
        tape.replay()
        torch.testing.assert_close(out, x @ y)


def test_products_of_batches_are_replayed_without_their_broadcast() -> None:
    x, y = torch.randn(2, 3, 1, 5), torch.randn(2, 3, 5, 4)
    with torch.inference_mode():
        tape, out = noted(lambda x: x @ y, x)
        assert torch.bmm in [getattr(call, "func", None) for call in tape.calls]
        x.normal_()
        tape.replay()
        torch.testing.assert_close(out, x @ y)
