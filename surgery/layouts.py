"""How families lay out the parts of an attention block: one row for each way of storing them.

A new family usually needs nothing here. Where it stores its projections in another way, add a function to PROJECTIONS;
where it names a part differently, add the name to a tuple.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from halobench.errors import UserError
from halobench.mixers.view import NormView

LAYER_LISTS = ("layers", "h", "blocks")  # what a decoder calls its layers
ATTENTIONS = ("self_attn", "attention", "attn", "self_attention")  # what a layer calls its attention
OUTPUTS = ("o_proj", "dense", "out_proj", "c_proj")  # what attention calls its output projection
NORMS = {"q": ("q_norm", "q_layernorm"), "k": ("k_norm", "k_layernorm")}
HARMLESS = {"rotary_emb", "rotary_fn", "attn_dropout", "resid_dropout", "attention_dropout", "sinks"}
# Parts that betray what surgery cannot read, and what it is.
FOREIGN = {
    "kv_a_proj_with_mqa": "latent attention, whose keys and values are made from one compressed vector",
    "kv_b_proj": "latent attention, whose keys and values are made from one compressed vector",
    "q_a_proj": "latent attention, whose queries are made from a compressed vector",
}
BIASES = ("alibi", "position_bias")  # arguments of attention that add something to its scores by distance
# Layers of families that rotate in some layers only and do not say so in `use_rope`.
ROTATES: dict[str, Callable[[Any], bool]] = {
    "cohere2": lambda attention: attention.sliding_window is not None,
    "cohere2_moe": lambda attention: attention.sliding_window is not None or attention.force_rope,
    "exaone4": lambda attention: attention.sliding_window is None or attention.is_sliding,
    "exaone_moe": lambda attention: attention.sliding_window is None or attention.is_sliding,
}


@dataclass(frozen=True, kw_only=True, eq=False)
class Projections:
    """Weights (out, in) and biases (out,) of q, k, v; biases are None where there are none."""

    q: tuple[Tensor, Tensor | None]
    k: tuple[Tensor, Tensor | None]
    v: tuple[Tensor, Tensor | None]


@dataclass(frozen=True, kw_only=True)
class Heads:
    """Head counts and size."""

    query: int
    key: int
    size: int


def weights_of(module: Any, where: str) -> tuple[Tensor, Tensor | None]:
    """(out, in) weight and bias of a linear layer; GPT-2's Conv1D stores (in, out)."""
    if isinstance(module, nn.Linear):
        return module.weight, module.bias
    if isinstance(module, Conv1D):
        return module.weight.T, module.bias
    raise UserError(f"{where} is a {type(module).__name__}, expected a plain linear layer (not quantised or adapted)")


def _separate(attention: Any, heads: Heads, where: str) -> Projections:
    """Llama and most others."""
    q, k, v = (weights_of(getattr(attention, f"{part}_proj"), f"{where}: {part}_proj") for part in "qkv")
    return Projections(q=q, k=k, v=v)


def _stacked(name: str) -> Callable[[Any, Heads, str], Projections]:
    """[all of q | all of k | all of v], as in Phi-3 and GPT-2."""

    def read(attention: Any, heads: Heads, where: str) -> Projections:
        weight, bias = weights_of(getattr(attention, name), f"{where}: {name}")
        sizes = [heads.query * heads.size, heads.key * heads.size, heads.key * heads.size]
        if weight.shape[0] != sum(sizes):
            raise UserError(f"{where}: {name} makes {weight.shape[0]} features, expected q, k and v of {sizes}")
        biases = [None] * 3 if bias is None else bias.split(sizes)
        q, k, v = zip(weight.split(sizes), biases, strict=True)
        return Projections(q=q, k=k, v=v)

    return read


def _by_head(name: str) -> Callable[[Any, Heads, str], Projections]:
    """[q, k, v of head 0 | q, k, v of head 1 | ..], as in GPT-NeoX."""

    def read(attention: Any, heads: Heads, where: str) -> Projections:
        weight, bias = weights_of(getattr(attention, name), f"{where}: {name}")
        if heads.query != heads.key or weight.shape[0] != 3 * heads.query * heads.size:
            raise UserError(f"{where}: {name} has {weight.shape[0]} rows, expected q, k and v for each head")

        def part(x: Tensor, index: int) -> Tensor:
            return x.unflatten(0, (heads.query, 3, heads.size))[:, index].flatten(0, 1)

        q, k, v = ((part(weight, i), None if bias is None else part(bias, i)) for i in range(3))
        return Projections(q=q, k=k, v=v)

    return read


# The parts a layout consists of, which also tell it, and its reader.
PROJECTIONS: list[tuple[tuple[str, ...], Callable[[Any, Heads, str], Projections]]] = [
    (("q_proj", "k_proj", "v_proj"), _separate),
    (("qkv_proj",), _stacked("qkv_proj")),
    (("c_attn",), _stacked("c_attn")),
    (("query_key_value",), _by_head("query_key_value")),
]


def read_norm(norm: Any, heads: int, size: int, where: str) -> NormView:
    """What a module that normalises queries or keys does: found by its weight's shape and by running it.

    Raises:
        UserError: its weight fits no way of normalising heads.
    """
    weight, bias = getattr(norm, "weight", None), getattr(norm, "bias", None)
    eps = getattr(norm, "eps", getattr(norm, "variance_epsilon", None))
    parts = getattr(norm, "norms", None)
    if isinstance(parts, nn.ModuleList):  # one module for each head
        each: list[Any] = list(parts)
        weight = torch.stack([part.weight for part in each])
        biases = [getattr(part, "bias", None) for part in each]
        bias = None if biases[0] is None else torch.stack(biases)  # type: ignore[arg-type]
        eps = parts[0].eps
    shapes = {(size,): "head", (heads, size): "head", (heads * size,): "all"}
    if not isinstance(weight, Tensor) or tuple(weight.shape) not in shapes or eps is None:
        got = tuple(weight.shape) if isinstance(weight, Tensor) else "no weight"
        raise UserError(f"{where} has {got}, expected one of {sorted(shapes)}: one factor a feature, or one a head's")
    scope: Any = shapes[tuple(weight.shape)]
    centred = "LayerNorm" in type(parts[0] if isinstance(parts, nn.ModuleList) else norm).__name__
    if weight.device.type != "meta":
        weight, centred = _acting(norm, weight, bias, heads, size, scope, where)
    return NormView(weight=weight, bias=bias, eps=eps, centred=centred, scope=scope)


@torch.no_grad()
def _acting(
    norm: Any, weight: Tensor, bias: Tensor | None, heads: int, size: int, scope: str, where: str
) -> tuple[Tensor, bool]:
    """The factor as it acts (Gemma's weight acts as 1 + w), and whether the mean is taken away first."""
    shape = (1, 1, heads * size) if scope == "all" else (1, heads, 1, size)
    if weight.ndim == 2 and not isinstance(getattr(norm, "norms", None), nn.ModuleList):
        shape = (1, 1, heads, size)
    # Of mean 0 and mean square 1 in every head: what comes out is the factor itself, with the sign of what went in.
    signs = torch.ones(shape, dtype=weight.dtype, device=weight.device)
    signs[..., 1::2] = -1
    factor = ((norm(signs) - norm(-signs)) / 2 * signs).reshape(-1, size)
    stored = weight.reshape(-1, size)
    candidates = {0: weight, 1: 1 + weight}
    errors = {offset: float((factor - stored - offset).abs().max()) for offset in candidates}
    best = min(errors, key=lambda offset: errors[offset])
    if errors[best] > 0.05:
        raise UserError(f"{where} does not multiply by its weight, nor by 1 + weight; the family needs an adapter")
    level = norm(torch.ones_like(signs)).reshape(-1, size) - (0 if bias is None else bias.reshape(-1, size))
    return candidates[best], bool(level.abs().max() < 1e-3 * factor.abs().max())


def rotation(attention: Any) -> tuple[bool, bool]:
    """How the family's RoPE pairs features and reads its tables: (pairs are neighbours, so are equal numbers).

    Found by turning a small vector with the family's own function: weights are not needed.
    """
    turn = getattr(sys.modules[type(attention).__module__], "apply_rotary_pos_emb", None)
    if turn is None:
        return False, False
    x = torch.arange(1.0, 9.0, device="cpu").view(1, 1, 1, 8)  # also while a model is built on the meta device
    for numbers in (8, 4):  # each number twice, or one for each pair
        table = torch.arange(1.0, numbers + 1, device="cpu").view(1, 1, numbers)
        nothing = torch.zeros_like(table)
        try:
            used = (turn(x, x, table, nothing)[0] / x).flatten().tolist()
            partner = -float(turn(x, x, nothing, torch.ones_like(table))[0].flatten()[0])
        except (RuntimeError, TypeError):
            continue
        interleaved = partner == 2.0
        # Which number the second pair of features uses: its own place in the tables.
        return interleaved, interleaved and used[2] == 3.0
    raise UserError(f"{type(attention).__name__} rotates in a way that is not understood; the family needs an adapter")
