"""How far a layer's attention is local, and how well a mixer stands in for it: two measures of one layer by itself.

LightTransfer (arXiv 2410.13846) calls a layer lazy when its attention falls on the first and the most recent tokens:
share = mean over heads and the last queries of sum over local keys of softmax(q . k). A learned sink in the softmax
counts as local, for it reads nothing far away.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, ClassVar, NamedTuple

import torch
from torch import Tensor, nn

from halobench.mixers.contract import MixerContext, build_mixer
from halobench.mixers.softmax import SoftmaxMixer, SoftmaxOptions
from halobench.mixers.view import AttentionView
from halobench.surgery.anatomy import decoder_layers

FIRST, RECENT, QUERIES = 4, 64, 64  # tokens


class WatchedAttention(SoftmaxMixer):
    """A layer's own attention, rebuilt from its view; a forward leaves how local it was in `share_B`, by sequence."""

    Options: ClassVar[type] = SoftmaxOptions
    share_B: Tensor

    @classmethod
    def of(cls, view: AttentionView) -> WatchedAttention:
        """The attention of `view` as the teacher computes it."""
        mixer = build_mixer(cls, view, {"rope": view.rope, "output_gate": False})
        assert isinstance(mixer, WatchedAttention)
        return mixer.eval()

    def _project(
        self, hidden_BTD: Tensor, position_embeddings: tuple[Tensor, Tensor] | None
    ) -> tuple[Tensor, Tensor, Tensor]:
        q, k, v = super()._project(hidden_BTD, position_embeddings)
        self.share_B = local_share(
            q, k, scale=self.scaling, window=self.window, soft_cap=self.soft_cap, sinks_H=self.sinks
        )
        return q, k, v


def local_share(
    q_BTHK: Tensor,
    k_BTJK: Tensor,
    *,
    scale: float,
    window: int | None = None,
    soft_cap: float | None = None,
    sinks_H: Tensor | None = None,
) -> Tensor:
    """Share of attention on the FIRST and the RECENT tokens (of T tokens at most T / 8), in fp32; (B,).

    The mean over heads and the last QUERIES queries; scores are made for those queries alone. Arguments as in `attend`.
    """
    tokens = q_BTHK.shape[1]
    recent = max(1, min(RECENT, tokens // 8))
    count = min(QUERIES, tokens)
    q_BNJGK = q_BTHK[:, -count:].float().unflatten(2, (k_BTJK.shape[2], -1))
    scores_BHNS = torch.einsum("bnjgk,bsjk->bjgns", q_BNJGK * scale, k_BTJK.float()).flatten(1, 2)
    if soft_cap is not None:
        scores_BHNS = soft_cap * torch.tanh(scores_BHNS / soft_cap)
    keys = torch.arange(tokens, device=q_BTHK.device)
    behind_NS = keys[-count:, None] - keys[None]  # how many tokens a key lies behind a query
    hidden_NS = (behind_NS < 0) if window is None else (behind_NS < 0) | (behind_NS >= window)
    far_NS = (behind_NS >= recent) & (keys >= FIRST)
    scores_BHNS = scores_BHNS.masked_fill(hidden_NS, -torch.inf)
    if sinks_H is not None:
        sinks_BHN1 = sinks_H.float()[None, :, None, None].expand(*scores_BHNS.shape[:3], 1)
        scores_BHNS = torch.cat((scores_BHNS, sinks_BHN1), dim=-1)
    far = (scores_BHNS.softmax(-1)[..., :tokens] * far_NS).sum(-1)
    return 1 - far.mean((1, 2))


class Heard(NamedTuple):
    """What a layer's mixer was given and what it gave."""

    hidden_BTD: Tensor
    position_embeddings: tuple[Tensor, Tensor] | None
    output_BTD: Tensor


@contextmanager
def watched(model: Any, layer: int) -> Iterator[list[Heard]]:
    """What the mixer in `layer` of a hybrid hears and says in this block, call by call."""
    layers, name = decoder_layers(model.backbone)
    heard: list[Heard] = []

    def keep(module: nn.Module, args: Any, kwargs: dict[str, Any], output: Any) -> None:
        hidden = kwargs["hidden_states"] if "hidden_states" in kwargs else args[0]
        heard.append(Heard(hidden, kwargs.get("position_embeddings"), output[0]))

    handle = getattr(layers[layer], name).register_forward_hook(keep, with_kwargs=True)
    try:
        yield heard
    finally:
        handle.remove()


def stand_in(view: AttentionView, heard: Heard) -> tuple[list[float], list[float]]:
    """Of each sequence, the squared error of a mixer's output relative to its attention's, and how local that was.

    Args:
        view: the attention in whose place the mixer stands.
        heard: one call of the mixer, without padding and from the start of the text.
    """
    attention = WatchedAttention.of(view)
    context = MixerContext.plain(heard.hidden_BTD.shape[1], heard.hidden_BTD.device)
    target = attention(heard.hidden_BTD, position_embeddings=heard.position_embeddings, context=context).float()
    error = (heard.output_BTD.float() - target).square().sum((1, 2)) / target.square().sum((1, 2)).clamp_min(1e-30)
    return error.tolist(), attention.share_B.tolist()
