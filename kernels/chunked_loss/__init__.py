"""Losses over a large vocabulary from hidden states, without ever holding all logits at once."""

from halobench.kernels.chunked_loss.chunked import chunked_loss, tokens_per_chunk
from halobench.kernels.chunked_loss.head import Bend, Head
from halobench.kernels.chunked_loss.hidden import distillation
from halobench.kernels.chunked_loss.naive import SoftTargets
from halobench.kernels.chunked_loss.rows import cross_entropy, forward_kl

__all__ = [
    "Bend",
    "Head",
    "SoftTargets",
    "chunked_loss",
    "cross_entropy",
    "distillation",
    "forward_kl",
    "tokens_per_chunk",
]
