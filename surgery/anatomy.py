"""Reads the attention of a Hugging Face decoder into AttentionViews, or says what does not fit.

Understood today: decoders whose layers hold q_proj, k_proj, v_proj and o_proj apart, with optional biases and optional
per-head norms of queries and keys (Llama, Mistral, Qwen2, Qwen3 and others built alike). A view is not taken on trust:
each layer is run on a few random tokens and must agree with attention rebuilt from its view.
"""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, PretrainedConfig, PreTrainedModel

from halobench.errors import UserError
from halobench.mixers.contract import MixerContext
from halobench.mixers.softmax import SoftmaxMixer, SoftmaxOptions
from halobench.mixers.view import AttentionView

PARTS = ("q_proj", "k_proj", "v_proj", "o_proj")
NORMS = ("q_norm", "k_norm")
# Sub-modules and parameters that betray another kind of attention, and what it is called.
FOREIGN = {
    "qkv_proj": "fused q, k and v",
    "c_attn": "fused q, k and v",
    "query_key_value": "fused q, k and v",
    "Wqkv": "fused q, k and v",
    "kv_a_proj_with_mqa": "latent attention",
    "kv_b_proj": "latent attention",
    "sinks": "attention sinks",
    "in_proj": "a mixer that is not attention",
    "conv1d": "a mixer that is not attention",
}
FITS = "decoders with separate q_proj, k_proj, v_proj, o_proj fit, such as llama, mistral, qwen2, qwen3"
PROBE_TOKENS = 8


def decoder_layers(model: PreTrainedModel) -> tuple[nn.ModuleList, str]:
    """The decoder's layers, and the attribute of a layer that holds its attention."""
    family = getattr(model.config, "model_type", type(model).__name__)
    if getattr(model.config, "is_encoder_decoder", False):
        raise UserError(f"{family} is an encoder-decoder; only decoders can be converted ({FITS})")
    decoder = model.get_decoder()
    layers = getattr(decoder, "layers", None)
    if not isinstance(layers, nn.ModuleList):
        raise UserError(f"{family} keeps its layers in no list called 'layers'; {FITS}")
    lacking = [index for index, layer in enumerate(layers) if not hasattr(layer, "self_attn")]
    if lacking:
        raise UserError(f"layers {lacking} of {family} have no 'self_attn'; {FITS}")
    return layers, "self_attn"


def attention_modules(model: PreTrainedModel) -> dict[int, nn.Module]:
    """The attention module of each layer, by layer index."""
    layers, name = decoder_layers(model)
    return {index: getattr(layer, name) for index, layer in enumerate(layers)}


def read_attention(model: PreTrainedModel) -> list[AttentionView]:
    """One view for each layer. Weights are the model's own, not copies.

    Raises:
        UserError: the attention is of a kind that is not understood; the message names the layer and what does not fit.
    """
    layers, name = decoder_layers(model)
    views = [_read_layer(model, index, getattr(layer, name)) for index, layer in enumerate(layers)]
    if views[0].q_weight.device.type != "meta":
        for view, layer in zip(views, layers, strict=True):
            _check_view(model, view, getattr(layer, name))
    return views


def describe(config: PretrainedConfig) -> list[AttentionView]:
    """The views a model of this config would have, without weights (on the meta device)."""
    with torch.device("meta"):
        return read_attention(AutoModelForCausalLM.from_config(copy.deepcopy(config)))


def _read_layer(model: PreTrainedModel, index: int, attention: nn.Module) -> AttentionView:
    config = model.config.get_text_config(decoder=True)
    where = f"layer {index} of {config.model_type}"
    held = {key for key, _ in attention.named_children()} | {
        key for key, _ in attention.named_parameters(recurse=False)
    }
    for key in sorted(held & FOREIGN.keys()):
        raise UserError(f"{where} has {FOREIGN[key]} ({key!r}), which is not understood yet; {FITS}")
    missing = [key for key in PARTS if not isinstance(getattr(attention, key, None), nn.Linear)]
    if missing:
        raise UserError(f"{where} lacks the linear layers {', '.join(missing)}; {FITS}")
    strange = held - {*PARTS, *NORMS, "rotary_emb", "rotary_fn"}
    if strange:
        raise UserError(f"{where} has parts that are not understood: {', '.join(sorted(strange))}; {FITS}")
    parts: dict[str, nn.Linear] = {key: getattr(attention, key) for key in PARTS}
    head_dim = getattr(attention, "head_dim", None) or config.hidden_size // config.num_attention_heads
    heads, kv_heads = (parts[key].weight.shape[0] // head_dim for key in ("q_proj", "k_proj"))
    expected = {
        "q_proj": (heads * head_dim, config.hidden_size),
        "k_proj": (kv_heads * head_dim, config.hidden_size),
        "v_proj": (kv_heads * head_dim, config.hidden_size),
        "o_proj": (config.hidden_size, heads * head_dim),
    }
    for key, shape in expected.items():
        if tuple(parts[key].weight.shape) != shape:
            got = tuple(parts[key].weight.shape)
            raise UserError(f"{where}: {key} has shape {got}, expected {shape} for heads of {head_dim}; {FITS}")
    if heads % kv_heads:
        raise UserError(f"{where}: {heads} query heads cannot share {kv_heads} key/value heads evenly; {FITS}")
    biases: dict[str, Any] = {f"{key[0]}_bias": parts[key].bias for key in PARTS}
    norms: dict[str, Any] = {
        f"{key}_weight": _norm_weight(getattr(attention, key, None), head_dim, f"{where}: {key}") for key in NORMS
    }
    rotary_dim = _rotary_dim(model, attention, head_dim)
    return AttentionView(
        layer_index=index,
        hidden_size=config.hidden_size,
        num_heads=heads,
        num_kv_heads=kv_heads,
        head_dim=head_dim,
        **{f"{key[0]}_weight": parts[key].weight for key in PARTS},
        **biases,
        **norms,
        norm_eps=getattr(config, "rms_norm_eps", 1e-6),
        scaling=getattr(attention, "scaling", head_dim**-0.5),
        rope=rotary_dim > 0,
        rotary_dim=rotary_dim,
        sliding_window=getattr(attention, "sliding_window", getattr(config, "sliding_window", None)),
        soft_cap=getattr(attention, "attn_logit_softcapping", None),
        init_std=getattr(config, "initializer_range", 0.02),
    )


def _norm_weight(norm: nn.Module | None, head_dim: int, where: str) -> Tensor | None:
    """The weight of a per-head RMSNorm; a norm of another shape or formula is refused."""
    if norm is None:
        return None
    weight = getattr(norm, "weight", None)
    if not isinstance(weight, Tensor) or weight.shape != (head_dim,):
        got = tuple(weight.shape) if isinstance(weight, Tensor) else "no weight"
        raise UserError(f"{where} has {got}, expected one weight per feature of a head, ({head_dim},); {FITS}")
    return weight


def _rotary_dim(model: PreTrainedModel, attention: nn.Module, head_dim: int) -> int:
    """Features of a head that RoPE turns; 0 for a layer without RoPE."""
    rotary = getattr(model.get_decoder(), "rotary_emb", None)
    if rotary is None or not getattr(attention, "use_rope", True):
        return 0
    frequencies = getattr(rotary, "inv_freq", None)
    if frequencies is None:
        kind = model.config.model_type
        raise UserError(f"{kind} has rotary tables of several kinds, which is not understood yet; {FITS}")
    return min(head_dim, 2 * frequencies.numel())


@torch.no_grad()
def _check_view(model: PreTrainedModel, view: AttentionView, attention: Any) -> None:
    """Runs the layer and attention rebuilt from `view` on the same random tokens; a difference is an error.

    This is what catches a rotation of another layout, a norm of another formula or place, a factor nobody declared.
    """
    weight = view.q_weight
    generator = torch.Generator().manual_seed(view.layer_index)
    hidden = torch.randn(1, PROBE_TOKENS, view.hidden_size, generator=generator).to(weight.device, weight.dtype)
    positions = torch.arange(PROBE_TOKENS, device=weight.device)[None]
    rotary = getattr(model.get_decoder(), "rotary_emb", None)
    tables = None if rotary is None else rotary(hidden, positions)
    later = torch.ones(PROBE_TOKENS, PROBE_TOKENS, dtype=torch.bool, device=weight.device).triu(1)
    mask = torch.zeros(1, 1, *later.shape, dtype=weight.dtype, device=weight.device)
    mask = mask.masked_fill(later, torch.finfo(weight.dtype).min)
    was_training = attention.training
    attention.eval()
    try:
        expected = attention(hidden_states=hidden, position_embeddings=tables, attention_mask=mask)[0]
    finally:
        attention.train(was_training)
    options = SoftmaxOptions(rope=view.rope, output_gate=False, sliding_window=False)
    rebuilt = SoftmaxMixer.from_attention(view, options).eval()
    got = rebuilt(hidden, position_embeddings=tables, context=MixerContext(positions_BT=positions))
    error = ((got - expected).float().norm() / expected.float().norm().clamp(min=1e-30)).item()
    allowed = 1e-4 if weight.dtype in (torch.float32, torch.float64) else 3e-2
    if not error <= allowed:
        raise UserError(
            f"layer {view.layer_index} of {model.config.model_type} does not compute what its weights say: attention "
            f"rebuilt from them differs by {error:.1e} of its size; the family needs an adapter ({FITS})"
        )
