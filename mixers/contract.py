"""The contract of a token mixer: what surgery, training and evaluation may ask of any of them."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass, replace
from typing import Any, ClassVar, Self

import torch
from torch import Tensor, nn

from halobench.config import from_dict
from halobench.mixers.cache import HybridCache
from halobench.mixers.view import AttentionView


@dataclass(frozen=True, kw_only=True, eq=False)
class MixerContext:
    """What a mixer needs to know of the batch beside the hidden states.

    T counts the new tokens, S the cached and the new ones together.
    """

    positions_BT: Tensor  # absolute position of each new token, counted from 0 over real tokens; B may be 1
    padding_mask_BT: Tensor | None = None  # True at real tokens; None when every new token is real
    key_padding_mask_BS: Tensor | None = None  # the same over past and new tokens; None when all are real
    cache: HybridCache | None = None

    @classmethod
    def plain(cls, tokens: int, device: torch.device | str | None = None, past: int = 0) -> MixerContext:
        """A batch without padding and without a cache, whose first token stands at position `past`."""
        return cls(positions_BT=torch.arange(past, past + tokens, device=device)[None])


class Mixer(nn.Module, ABC):
    """A token mixer in the place of one layer's attention.

    Class attributes:
        name: the name in plans and on the command line.
        label: the name in tables.
        paper: where it is described.
        uses_rope: whether it rotates queries and keys by default.
        backends: forms its recurrence can run in; conformance runs each that works on the machine against the others.
        Options: its frozen keyword-only dataclass of options.

    Attributes:
        backend: the form asked for, one of `backends` or "auto".
        used_backend: the form that ran last; None before the first call.
    """

    name: ClassVar[str]
    label: ClassVar[str]
    paper: ClassVar[str]
    uses_rope: ClassVar[bool]
    backends: ClassVar[tuple[str, ...]] = ("torch",)
    Options: ClassVar[type]

    options: Any
    backend: str = "auto"
    used_backend: str | None = None
    layer_index: int
    _fresh: frozenset[str] = frozenset()  # sub-modules that the teacher has no weights for

    @classmethod
    @abstractmethod
    def from_attention(cls, view: AttentionView, options: Any) -> Self:
        """A new mixer for the layer of `view`, holding copies of the teacher's weights (same dtype and device)."""

    @abstractmethod
    def forward(
        self,
        hidden_BTD: Tensor,
        *,
        position_embeddings: tuple[Tensor, Tensor] | None,
        context: MixerContext,
    ) -> Tensor:
        """Mixes over time; (B, T, D) to (B, T, D).

        Args:
            position_embeddings: (cos, sin) of the new tokens from the teacher's RoPE, each (B or 1, T, rotary_dim).
            context: padding, positions and cache. With a cache, the tokens continue what it holds, and it is updated.
        """

    @abstractmethod
    def state_bytes(self, batch: int, length: int, bytes_per_element: int = 2) -> int:
        """Bytes that must be kept to go on after `length` tokens."""

    @abstractmethod
    def flops_per_token(self, length: int) -> float:
        """Floating-point operations of one token that follows `length` others, projections included."""

    def projection_flops(self) -> float:
        """Floating-point operations of the linear layers for one token."""
        return 2.0 * sum(layer.weight.numel() for layer in self.modules() if isinstance(layer, nn.Linear))

    def new_parameters(self) -> list[nn.Parameter]:
        """Parameters with no counterpart in the teacher."""
        return [parameter for name, parameter in self.named_parameters() if name.split(".")[0] in self._fresh]

    def copied_parameters(self) -> list[nn.Parameter]:
        """Parameters that started as the teacher's."""
        return [parameter for name, parameter in self.named_parameters() if name.split(".")[0] not in self._fresh]

    def set_options(self, **changes: Any) -> None:
        """Replaces options that may change after construction (those that shape no weight)."""
        self.options = replace(self.options, **changes)


def build_mixer(mixer: type[Mixer], view: AttentionView, options: dict[str, Any] | None = None) -> Mixer:
    """`mixer` for the layer of `view`; unknown or ill-typed options raise UserError."""
    return mixer.from_attention(view, from_dict(mixer.Options, options or {}, f"options of mixer {mixer.name!r}"))
