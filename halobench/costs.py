"""What a decoder costs at a context length: cache bytes and floating-point operations, counted from shapes alone.

A multiply-add is two operations. Norms, activations, rotations and gates' elementwise products are left out: they are
below one per cent of the matrix products.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from halobench.errors import UserError

if TYPE_CHECKING:
    from torch import nn

    from halobench.mixers.contract import Mixer
    from halobench.mixers.view import AttentionView

CACHE_BYTES = 2  # of one cached number, in bf16
# Families name the same two numbers of a mixture of experts differently.
EXPERTS = ("num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts")
CHOSEN = ("num_experts_per_tok", "num_experts_per_token", "moe_topk", "moe_top_k", "moe_k", "top_k_experts")


@dataclass(frozen=True, kw_only=True, eq=False)
class MixerCosts:
    """One layer's token mixer, whatever it is made of.

    matrices: elements of its weight matrices. cache: bytes kept after so many tokens, batch 1. flops: operations of one
    token that follows so many others.
    """

    matrices: int
    cache: Callable[[int], int]
    flops: Callable[[int], float]


@dataclass(frozen=True, kw_only=True)
class Backbone:
    """Weights outside attention that multiply each token; the look-up of an embedding multiplies nothing.

    active: matrix elements of the layers, of an expert stack only the share that a token visits.
    unembedding: matrix elements of the last projection, counted even when its weights are the embedding's.
    """

    active: int
    unembedding: int


@dataclass(frozen=True, kw_only=True, eq=False)
class DecoderCosts:
    """A whole decoder: its backbone and one MixerCosts a layer."""

    backbone: Backbone
    layers: list[MixerCosts]

    def cache(self, length: int, layers: Iterable[int] | None = None) -> int:
        """Bytes kept after `length` tokens, in all layers or in those named."""
        chosen = range(len(self.layers)) if layers is None else layers
        return sum(self.layers[index].cache(length) for index in chosen)

    def token(self, length: int) -> float:
        """Operations of decoding one token that follows `length` others, the logits included."""
        return self._fixed() + 2 * self.backbone.unembedding + sum(layer.flops(length) for layer in self.layers)

    def prompt(self, length: int) -> float:
        """Operations of reading a prompt of `length` tokens: logits for the last token only."""
        return self._positions(length) + 2 * self.backbone.unembedding

    def training_token(self, length: int) -> float:
        """Operations forward of one token, averaged over a training sequence of `length`: logits for every token."""
        return self._positions(length) / length + 2 * self.backbone.unembedding

    def mixing_token(self, length: int, layers: Iterable[int]) -> float:
        """The part of `training_token` that the token mixers of these layers take."""
        return sum(over_positions(self.layers[index].flops, length) for index in layers) / length

    @property
    def active(self) -> int:
        """Matrix elements that multiply one token."""
        return self.backbone.active + self.backbone.unembedding + sum(layer.matrices for layer in self.layers)

    def _fixed(self) -> float:
        return 2.0 * self.backbone.active

    def _positions(self, length: int) -> float:
        return length * self._fixed() + sum(over_positions(layer.flops, length) for layer in self.layers)


def attention_costs(view: AttentionView) -> MixerCosts:
    """Softmax attention as the view describes it; a window bounds both what is kept and what is looked at."""

    def seen(length: int) -> int:
        return length if view.sliding_window is None else min(length, view.sliding_window)

    kept = view.k_weight.shape[0] + view.v_weight.shape[0]
    products = 2 * 2 * view.num_heads * view.head_dim  # a query with a key, then a weight with a value
    return MixerCosts(
        matrices=view_matrices(view),
        cache=lambda length: seen(length) * kept * CACHE_BYTES,
        flops=lambda length: float(products * seen(length + 1) + 2 * view_matrices(view)),
    )


def mixer_costs(mixer: Mixer) -> MixerCosts:
    """A mixer by its own account."""
    return MixerCosts(
        matrices=sum(parameter.numel() for parameter in mixer.parameters() if parameter.ndim == 2),
        cache=lambda length: mixer.state_bytes(1, length, CACHE_BYTES),
        flops=mixer.flops_per_token,
    )


def view_matrices(view: AttentionView) -> int:
    """Elements of the four projections."""
    return sum(weight.numel() for weight in (view.q_weight, view.k_weight, view.v_weight, view.o_weight))


def backbone_of(model: Any, views: list[AttentionView]) -> Backbone:
    """Counts the matrices of `model` (the meta device is enough) outside the attention that `views` describe."""
    from torch import nn

    last = model.get_output_embeddings()
    active = 0
    for name, module in model.named_modules():
        if module is last or isinstance(module, nn.Embedding) or "Norm" in type(module).__name__:
            continue
        for own, parameter in module.named_parameters(recurse=False):
            if parameter.ndim >= 2 and not own.endswith("bias"):
                active += _active(f"{name}.{own}", parameter, model.config)
    active -= sum(view_matrices(view) for view in views)
    return Backbone(active=active, unembedding=last.weight.numel())


def over_positions(flops: Callable[[int], float], length: int) -> float:
    """flops(0) + flops(1) + ... + flops(length - 1), without asking for every one of a million positions.

    Costs are straight lines with a few bends (a window that fills): a stretch that proves straight at two inner points
    is summed by its ends, any other is halved. Exact for such costs, and close for smooth ones.
    """

    def stretch(first: int, last: int) -> float:
        count = last - first + 1
        if count <= 4:
            return sum(flops(position) for position in range(first, last + 1))
        start, end = flops(first), flops(last)
        for inner in (first + count // 3, first + count // 2):
            expected = start + (end - start) * (inner - first) / (last - first)
            if abs(flops(inner) - expected) > 1e-9 * abs(expected):
                middle = first + count // 2
                return stretch(first, middle - 1) + stretch(middle, last)
        return count * (start + end) / 2

    return stretch(0, length - 1)


def _active(name: str, parameter: nn.Parameter, config: Any) -> int:
    """Elements of a matrix, or of a stack of experts' matrices, that one token meets."""
    text = config.get_text_config(decoder=True)
    experts = next((n for n in (getattr(text, key, None) for key in EXPERTS) if isinstance(n, int)), None)
    stacked = parameter.ndim == 3 and parameter.shape[0] == experts
    if not stacked and "experts" not in name.split("."):
        return parameter.numel()
    chosen = next((n for n in (getattr(text, key, None) for key in CHOSEN) if isinstance(n, int)), None)
    if not experts or not chosen:
        raise UserError(
            f"{name} of {config.model_type} belongs to experts, but the config does not say how many there are and how "
            f"many a token visits; it needs one of {', '.join(EXPERTS)} and one of {', '.join(CHOSEN)}"
        )
    return parameter.numel() * min(chosen, experts) // experts
