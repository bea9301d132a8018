"""Losses over a large vocabulary from hidden states, without ever holding all logits at once."""

from halobench.kernels.chunked_loss.chunked import chunked_loss
from halobench.kernels.chunked_loss.naive import cross_entropy, forward_kl

__all__ = ["chunked_loss", "cross_entropy", "forward_kl"]
