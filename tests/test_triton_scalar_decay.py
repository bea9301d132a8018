"""The scalar decay in Triton against the definition in fp64: outputs, states and all gradients.

The tests marked `gpu` run on a GPU, and here under Triton's interpreter on small shapes. There the products of bf16
tensors are taken in fp32, so that only inputs and results are rounded.
"""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from halobench.kernels.scalar_decay.naive import scalar_decay_naive
from halobench.kernels.scalar_decay.recurrence import scalar_decay
from tests.triton_interpreter import INTERPRETED, device, passes_under_the_interpreter

__all__ = ["device"]  # the fixture

HEADS, SIZE, CHUNK, SEGMENT = (2, 16, 16, 32) if INTERPRETED else (3, 128, None, 512)
LENGTHS = (1, 17, 50) if INTERPRETED else (1, 63, 64, 65, 200, 1500)
PACKED = (1, 0, 40, 1, 7) if INTERPRETED else (1, 0, 600, 1, 70, 1025)
# Relative, in norm. Rounding a result to bf16 alone is 1.7e-3; a GPU's products of bf16 also round the scores, the
# state and the weighted values, each once, which comes to 2.6e-3.
TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 2e-3 if INTERPRETED else 3e-3}


def test_the_gpu_tests_of_this_file_pass_under_the_interpreter() -> None:
    passes_under_the_interpreter(__file__)


def draw(tokens: int, dtype: torch.dtype, *, per_token: bool, initial: int, key: int = SIZE) -> list[Tensor | None]:
    """q, k, v in `dtype`, log decays and (if any) initial states, in fp32."""
    random = torch.Generator().manual_seed(tokens)
    q, k, v = (torch.randn(1, tokens, HEADS, size, generator=random).to(dtype) for size in (key, key, SIZE))
    if per_token:
        decay = -torch.rand(1, tokens, HEADS, generator=random) / 8
        decay[:, ::3] = 0
        decay[:, 7::19] = -50.0  # tokens that forget everything
    else:
        decay = -torch.tensor([0.9, 0.01, 0.0])[:HEADS]
    start = torch.randn(initial, HEADS, key, SIZE, generator=random) if initial else None
    return [q, k, v, decay, start]


def results(run: Callable[..., tuple[Tensor, Tensor]], inputs: list[Tensor | None], **options: object) -> list[Tensor]:
    """Outputs, last states, and the gradients of a mixed loss in every input."""
    leaves = [None if x is None else x.detach().clone().requires_grad_() for x in inputs]
    o, last = run(*leaves[:4], scale=0.3, initial_state_BHKV=leaves[4], **options)
    random = torch.Generator().manual_seed(5)
    # Weights that bf16 holds: the gradient that reaches the kernel is then the same in every dtype.
    weights, of_last = (torch.randn(x.shape, generator=random).bfloat16().to(x) for x in (o, last))
    return [
        o,
        last,
        *torch.autograd.grad((o * weights).sum() + (last * of_last).sum(), [x for x in leaves if x is not None]),
    ]


def assert_near(got: list[Tensor], exact: list[Tensor], tolerance: float) -> None:
    names = ("o", "state", "dq", "dk", "dv", "decay's gradient", "initial state's gradient")
    for name, a, b in zip(names, got, exact, strict=False):
        assert a.shape == b.shape and a.isfinite().all(), name
        error = float((a.double().cpu() - b.cpu()).norm() / b.norm().clamp(min=1e-30).cpu())
        assert error < tolerance, f"{name}: {error:.1e}"


def exact_results(inputs: list[Tensor | None]) -> list[Tensor]:
    return results(scalar_decay_naive, [None if x is None else x.double().cpu() for x in inputs])


def to(inputs: list[Tensor | None], device: str) -> list[Tensor | None]:
    return [None if x is None else x.to(device) for x in inputs]


def triton_form(*given: Tensor, **options: object) -> tuple[Tensor, Tensor]:
    from halobench.kernels.scalar_decay.triton import scalar_decay_triton

    return scalar_decay_triton(*given, chunk_size=CHUNK, segment_size=SEGMENT, **options)  # type: ignore[arg-type]


@pytest.mark.gpu
@pytest.mark.parametrize("tokens", LENGTHS)
@pytest.mark.parametrize("per_token", [False, True])
def test_outputs_states_and_gradients_are_the_definitions_in_fp32(device: str, tokens: int, per_token: bool) -> None:
    inputs = draw(tokens, torch.float32, per_token=per_token, initial=1 if per_token or tokens == 17 else 0)
    assert_near(results(triton_form, to(inputs, device)), exact_results(inputs), TOLERANCE[torch.float32])


@pytest.mark.gpu
def test_bfloat16_stays_within_what_its_rounding_explains(device: str) -> None:
    inputs = draw(LENGTHS[-1], torch.bfloat16, per_token=False, initial=1)
    got = results(triton_form, to(inputs, device))
    assert got[0].dtype == got[2].dtype == torch.bfloat16 and got[1].dtype == torch.float32
    assert_near(got, exact_results(inputs), TOLERANCE[torch.bfloat16])


@pytest.mark.gpu
def test_sizes_that_are_no_power_of_two_are_filled_up(device: str) -> None:
    inputs = draw(LENGTHS[1], torch.float32, per_token=True, initial=1, key=5)
    assert_near(results(triton_form, to(inputs, device)), exact_results(inputs), TOLERANCE[torch.float32])


@pytest.mark.gpu
@pytest.mark.parametrize("lowest", [-200.0, -1e3, -1e6, -torch.inf])
@pytest.mark.parametrize("per_token", [False, True])
def test_tokens_that_forget_everything_leave_the_others_exact(device: str, lowest: float, per_token: bool) -> None:
    inputs = draw(LENGTHS[-1], torch.float32, per_token=per_token, initial=1)
    decay = inputs[3]
    assert decay is not None
    (decay[:, 3::8] if per_token else decay[:1]).fill_(lowest)
    assert_near(results(triton_form, to(inputs, device)), exact_results(inputs), TOLERANCE[torch.float32])


@pytest.mark.gpu
def test_a_decay_that_needs_no_gradient_costs_none(device: str, monkeypatch: pytest.MonkeyPatch) -> None:
    from halobench.kernels.scalar_decay import triton as form

    inputs = to(draw(LENGTHS[-1], torch.float32, per_token=True, initial=1), device)

    def fixed(q: Tensor, k: Tensor, v: Tensor, g: Tensor, **options: object) -> tuple[Tensor, Tensor]:
        o, last = triton_form(q, k, v, g.detach(), **options)
        return o + 0 * g.sum(), last

    both = results(triton_form, inputs)
    monkeypatch.setattr(form, "decay_gradients", None)  # a launch of it fails
    got = results(fixed, inputs)
    assert not got[5].any()
    assert_near(got[:5] + got[6:], both[:5] + both[6:], TOLERANCE[torch.float32])


@pytest.mark.gpu
def test_packed_sequences_are_each_as_alone(device: str) -> None:
    inputs = draw(sum(PACKED), torch.float32, per_token=True, initial=len(PACKED))
    bounds = torch.tensor((0, *PACKED)).cumsum(0)
    got = results(triton_form, to(inputs, device), cu_seqlens=bounds.to(device))

    def one_by_one(q: Tensor, k: Tensor, v: Tensor, g: Tensor, **options: object) -> tuple[Tensor, Tensor]:
        start, outputs, lasts = options["initial_state_BHKV"], [], []
        for n, (begin, end) in enumerate(zip(bounds[:-1], bounds[1:], strict=True)):
            alone = {**options, "initial_state_BHKV": start[n : n + 1]}  # type: ignore[index]
            if begin < end:
                o, last = scalar_decay_naive(*(x[:, begin:end] for x in (q, k, v, g)), **alone)  # type: ignore[arg-type]
                outputs.append(o)
            lasts.append(last if begin < end else alone["initial_state_BHKV"])
        return torch.cat(outputs, 1), torch.cat(lasts)  # type: ignore[arg-type]

    exact = results(one_by_one, [None if x is None else x.double() for x in inputs])
    assert_near(got, exact, TOLERANCE[torch.float32])


@pytest.mark.gpu
def test_asked_for_by_name_it_runs_in_a_batch_without_gradients(device: str) -> None:
    q, k, v, g, _ = to(draw(20, torch.float32, per_token=False, initial=0), device)
    assert q is not None and k is not None and v is not None and g is not None
    q, k, v = (torch.cat((x, x.flip(1))) for x in (q, k, v))
    got = scalar_decay(q, k, v, g, scale=0.3, backend="triton")
    exact = scalar_decay_naive(*(x.double().cpu() for x in (q, k, v, g)), scale=0.3)
    assert_near(list(got), list(exact), TOLERANCE[torch.float32])


@pytest.mark.gpu
def test_offsets_of_tokens_and_states_pass_2_to_the_31(device: str) -> None:
    from tests.triton_offsets import offsets

    out = torch.zeros(2, dtype=torch.int64, device=device)
    token, index = (torch.tensor([n], dtype=torch.int32, device=device) for n in (600_000, 70_000))
    offsets[(1,)](out, token, 32, index, 128)
    assert out.tolist() == [600_000 * 32 * 128, (70_000 * 32 + 3) * 128 * 128]
