"""Both ends of a decoder's last step: the hidden states after the final norm, and the logits they give.

Losses ask for these apart, so that logits are only ever made a chunk at a time.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

# What families do to their logits besides the matrix product: (field of the config, how it acts).
_SCALES: tuple[tuple[str, Callable[[Tensor, float], Tensor]], ...] = (
    ("logits_scaling", lambda logits, scale: logits / scale),  # Granite
    ("logit_scale", lambda logits, scale: logits * scale),  # Cohere
)


def final_hidden(model: Any, tokens_BT: Tensor) -> Tensor:
    """Hidden states (B, T, D) after the last norm, without a cache; for any Hugging Face decoder and for hybrids."""
    if hasattr(model, "final_hidden"):
        return model.final_hidden(tokens_BT)
    return model.base_model(input_ids=tokens_BT, use_cache=False).last_hidden_state


def unembed(model: Any, hidden: Tensor) -> Tensor:
    """Logits of hidden states, with the family's own scaling and soft-cap."""
    if hasattr(model, "unembed"):
        return model.unembed(hidden)
    logits = model.get_output_embeddings()(hidden)
    for field, act in _SCALES:
        scale = getattr(model.config, field, None)
        if scale is not None:
            logits = act(logits, scale)
    cap = getattr(model.config, "final_logit_softcapping", None)
    return logits if cap is None else cap * torch.tanh(logits / cap)


def head_parameters(model: Any) -> list[nn.Parameter]:
    """The unembedding's parameters that train."""
    return [p for p in model.get_output_embeddings().parameters() if p.requires_grad]
