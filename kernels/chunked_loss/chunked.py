"""Any per-token loss over logits, a chunk of tokens at a time: gradients are made on the way forward.

Only one chunk of logits is alive at any moment, and nothing is computed twice: each chunk's gradient with respect to
the hidden states and the unembedding is taken at once, and scaled by the incoming gradient later.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

LIVE_BYTES = 768 << 20  # of all the logits alive at once
# Student's and teacher's logits, the gradients of two losses (a KL mixed with a cross entropy) and their sum.
COPIES = 5
FEWEST_TOKENS, MOST_TOKENS = 16, 4096


def tokens_per_chunk(vocabulary: int, live_bytes: int = LIVE_BYTES) -> int:
    """Tokens whose logits fit into `live_bytes` as `COPIES` copies in fp32: 256 at a vocabulary of 151,936.

    Never below 16, for products of fewer rows waste the machine, nor above 4,096, beyond which nothing is gained.
    """
    return max(FEWEST_TOKENS, min(MOST_TOKENS, live_bytes // (vocabulary * 4 * COPIES)))


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
        ctx.save_for_backward(grad_hidden, *grads)  # freed with the graph, and one backward alone
        ctx.dtypes = [p.dtype if p.requires_grad else None for p in parameters]
        return total

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_total: Tensor) -> tuple[Any, ...]:
        grad_hidden, *grads = ctx.saved_tensors
        remaining = iter(grads)
        found = [None if dtype is None else (next(remaining) * grad_total).to(dtype) for dtype in ctx.dtypes]
        hidden = None if grad_hidden is None else grad_hidden * grad_total.to(grad_hidden.dtype)
        return (None, None, hidden, *found)


def chunked_loss(
    chunk_loss: Callable[[Tensor, slice], Tensor],
    hidden_ND: Tensor,
    parameters: list[nn.Parameter],
    chunk: int | None = None,
) -> Tensor:
    """The sum of `chunk_loss` over chunks of tokens, differentiable in the hidden states and `parameters`.

    Beyond the weights and hidden states it holds `LIVE_BYTES` of logits, three times the unembedding in fp32 (its
    gradient summed, one chunk's part of it, and what backward returns), and the gradient of the hidden states.

    Args:
        chunk_loss: (hidden of the chunk, its slice of the tokens) -> scalar sum over the chunk. It may close over the
            teacher's hidden states and over targets; it must reach `parameters` only through the unembedding.
        hidden_ND: the student's hidden states, N tokens of width D.
        parameters: what the unembedding trains (empty when it is frozen).
        chunk: tokens whose logits are held at once; by default `tokens_per_chunk` of the unembedding's vocabulary, and
            of the largest in use, 262,144, when it is frozen and so not among the parameters.

    Returns:
        a scalar, fp32 (fp64 for fp64 input).
    """
    if chunk is None:
        chunk = tokens_per_chunk(max((len(p) for p in parameters), default=262_144))
    if not torch.is_grad_enabled():  # no gradient is made that nobody asked for
        parts = [slice(start, min(start + chunk, len(hidden_ND))) for start in range(0, len(hidden_ND), chunk)]
        return torch.stack([chunk_loss(hidden_ND[part], part) for part in parts]).sum()
    return _ChunkedLoss.apply(chunk_loss, chunk, hidden_ND, *parameters)
