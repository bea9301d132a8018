"""What the tests of the operators share: seeded inputs, and one comparison of a form with the definition."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

B, H, K, V = 2, 3, 5, 4
RAGGED = (1, 15, 64, 65, 130)


def draw(tokens: int, *sizes: int, seed: int = 0, dtype: torch.dtype = torch.float64) -> Tensor:
    """Normal numbers of shape (B, T, H, *sizes)."""
    generator = torch.Generator().manual_seed(1000 * seed + tokens)
    return torch.randn(B, tokens, H, *sizes, generator=generator, dtype=torch.float64).to(dtype)


def unit(x: Tensor) -> Tensor:
    return torch.nn.functional.normalize(x, dim=-1)


def log_decay(tokens: int, *sizes: int) -> Tensor:
    """Decays of up to exp(-3) a token, and tokens that do not decay."""
    decay = -3 * draw(tokens, *sizes, seed=7).sigmoid()
    decay[:, ::3] = 0
    return decay


def extreme_log_decay(tokens: int) -> Tensor:
    """Channels that forget everything in a token beside channels that keep everything, both also in turn."""
    decay = torch.full((B, tokens, H, K), -1e-6, dtype=torch.float64)
    decay[..., 0] = -60.0
    decay[..., 1] = -1.0
    decay[:, ::2, :, 2] = -60.0
    decay[:, 3::17, :, 3] = -60.0
    return decay


def state() -> Tensor:
    return torch.randn(B, H, K, V, dtype=torch.float64, generator=torch.Generator().manual_seed(9))


def values_and_gradients(
    function: Callable[..., tuple[Tensor, Tensor]], inputs: Sequence[Tensor | None]
) -> list[Tensor]:
    """Output, last state, and the gradients of a mixed loss in every input and in the initial state."""
    leaves = [None if x is None else x.detach().clone().requires_grad_() for x in inputs]
    dtype = torch.float64 if inputs[0] is None else inputs[0].dtype
    start = state().to(torch.promote_types(dtype, torch.float32)).requires_grad_()
    o, last = function(*leaves, scale=0.3, initial_state_BHKV=start)
    weights = torch.linspace(-1, 1, o.numel(), dtype=o.dtype).view_as(o)
    loss = (o * weights).sum() + (last**2).sum()
    return [o, last, *torch.autograd.grad(loss, [x for x in (*leaves, start) if x is not None])]


def assert_same(got: Sequence[Tensor], expected: Sequence[Tensor], tolerance: float = 1e-9) -> None:
    for a, b in zip(got, expected, strict=True):
        torch.testing.assert_close(a.to(b.dtype), b, rtol=tolerance, atol=tolerance)


def drift(got: Tensor, expected: Tensor, span: int = 256) -> tuple[float, float]:
    """Relative error over the first and over the last tokens."""
    parts = slice(0, span), slice(-span, None)
    early, late = (float((got[:, p] - expected[:, p]).norm() / expected[:, p].norm()) for p in parts)
    return early, late
