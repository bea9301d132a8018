"""Sliding-window attention that also keeps the first tokens in sight (StreamingLLM, arXiv 2309.17453).

o_t = softmax attention of q_t over the keys s <= t with t - s < window, or s < sinks

Transfer: everything is the teacher's and nothing is new. As long as the text fits the window, the layer is exactly the
teacher's attention; beyond it, the first tokens stay, for trained attention rests on them what it does not need.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Self

from halobench.errors import UserError
from halobench.mixers.parts import GateInit
from halobench.mixers.softmax import AttentionMixer
from halobench.mixers.view import AttentionView


@dataclass(frozen=True, kw_only=True)
class SlidingWindowOptions:
    """Options of sliding-window attention; the defaults change nothing but what is seen.

    window: tokens a query sees, itself included. A narrower window of the teacher's own stays.
    sinks: tokens at the start of the text that stay in sight.
    rope: rotate queries and keys where the teacher does.
    output_gate: multiply by sigmoid(W_g x).
    gate_init: "random" W_g, or "neutral": W_g zero and W_o doubled.
    """

    window: int = 512
    sinks: int = 4
    rope: bool = True
    output_gate: bool = False
    gate_init: GateInit = "neutral"

    def __post_init__(self) -> None:
        if self.window < 1 or self.sinks < 0:
            given = f"window={self.window}, sinks={self.sinks}"
            raise UserError(f"{given}: a window holds at least the token itself, and sinks are 0 or more")


class SlidingWindowMixer(AttentionMixer):
    """See the module's docstring."""

    name = "sliding_window"
    label = "Sliding window"
    paper = "https://arxiv.org/abs/2309.17453"
    uses_rope = True
    Options: ClassVar[type] = SlidingWindowOptions

    @classmethod
    def from_attention(cls, view: AttentionView, options: SlidingWindowOptions) -> Self:
        return cls(
            view,
            options,
            rope=options.rope,
            window=min(options.window, view.sliding_window or options.window),
            first=options.sinks,
            output_gate=options.output_gate,
            gate_init=options.gate_init,
        )
