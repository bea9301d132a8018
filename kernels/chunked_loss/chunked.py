"""Any per-token loss over logits, a chunk of tokens at a time: gradients are made on the way forward.

Only one chunk of logits is alive at any moment, and nothing is computed twice: each chunk's gradient with respect to
the hidden states and the unembedding is taken at once, and scaled by the incoming gradient later.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn


class _ChunkedLoss(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, chunk_loss: Callable[[Tensor, slice], Tensor], chunk: int, hidden_ND: Tensor, *parameters: Tensor
    ) -> Tensor:
        wanted = [p for p in parameters if p.requires_grad]
        grad_hidden = torch.empty_like(hidden_ND) if hidden_ND.requires_grad else None
        grads = [torch.zeros_like(p, dtype=torch.promote_types(p.dtype, torch.float32)) for p in wanted]
        total = hidden_ND.new_zeros((), dtype=torch.promote_types(hidden_ND.dtype, torch.float32))
        for start in range(0, len(hidden_ND), chunk):
            part = slice(start, min(start + chunk, len(hidden_ND)))
            with torch.enable_grad():
                piece = hidden_ND[part].detach().requires_grad_(grad_hidden is not None)
                loss = chunk_loss(piece, part)
            total += loss.detach()
            sources = [piece, *wanted] if grad_hidden is not None else wanted
            if not sources:
                continue
            found = torch.autograd.grad(loss, sources)
            if grad_hidden is not None:
                grad_hidden[part], found = found[0], found[1:]
            for grad, more in zip(grads, found, strict=True):
                grad += more
        ctx.grad_hidden, ctx.grads, ctx.parameters = grad_hidden, grads, parameters
        return total

    @staticmethod
    def backward(ctx: Any, grad_total: Tensor) -> tuple[Any, ...]:
        remaining = iter(ctx.grads)
        found = [(next(remaining) * grad_total).to(p.dtype) if p.requires_grad else None for p in ctx.parameters]
        hidden = None if ctx.grad_hidden is None else ctx.grad_hidden * grad_total.to(ctx.grad_hidden.dtype)
        return (None, None, hidden, *found)


def chunked_loss(
    chunk_loss: Callable[[Tensor, slice], Tensor], hidden_ND: Tensor, parameters: list[nn.Parameter], chunk: int = 1024
) -> Tensor:
    """The sum of `chunk_loss` over chunks of tokens, differentiable in the hidden states and `parameters`.

    Args:
        chunk_loss: (hidden of the chunk, its slice of the tokens) -> scalar sum over the chunk. It may close over the
            teacher's hidden states and over targets; it must reach `parameters` only through the unembedding.
        hidden_ND: the student's hidden states, N tokens of width D.
        parameters: what the unembedding trains (empty when it is frozen).
        chunk: tokens whose logits are held at once.

    Returns:
        a scalar, fp32 (fp64 for fp64 input).
    """
    return _ChunkedLoss.apply(chunk_loss, chunk, hidden_ND, *parameters)
