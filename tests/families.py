"""Pico models of every family that surgery is tested on: what is particular to each is switched on and made visible."""

from __future__ import annotations

from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

from halobench.surgery.anatomy import honour_caps

SLIDING, FULL = "sliding_attention", "full_attention"
COMMON: dict[str, Any] = {
    "hidden_size": 48,
    "intermediate_size": 64,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 101,
    "max_position_embeddings": 512,
    "initializer_range": 0.2,
    "bos_token_id": 0,
    "eos_token_id": 1,
    "pad_token_id": 2,
}
EXPERTS = {"num_local_experts": 4, "num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32}
ALTERNATING = {"sliding_window": 8, "layer_types": [SLIDING, FULL, SLIDING, FULL]}
PARTIAL = {"rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "partial_rotary_factor": 0.5}}

# Family -> (what is particular to it, the fields of its config that make it so).
FAMILIES: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("grouped heads, RoPE", {"head_dim": 12}),
    "mistral": ("window in every layer", {"head_dim": 12, "sliding_window": 8}),
    "mixtral": ("mixture of experts", {"head_dim": 12, **EXPERTS}),
    "qwen2": ("biases on q, k, v", {}),
    "qwen3": ("norms on q and k", {"head_dim": 12}),
    "qwen3_moe": ("norms on q and k, mixture of experts", {"head_dim": 12, **EXPERTS}),
    "gemma": ("one wide key/value head", {"head_dim": 16, "num_key_value_heads": 1}),
    "gemma2": (
        "soft caps, alternating windows, a scale of its own",
        {"head_dim": 12, "query_pre_attn_scalar": 20, "attn_logit_softcapping": 3.0, "final_logit_softcapping": 9.0,
         **ALTERNATING},
    ),
    "gemma3_text": (
        "norms on q and k with 1 + weight, RoPE of two kinds, alternating windows",
        {"head_dim": 12, "query_pre_attn_scalar": 20, **ALTERNATING,
         "rope_parameters": {FULL: {"rope_type": "default", "rope_theta": 1e5},
                             SLIDING: {"rope_type": "default", "rope_theta": 1e3}}},
    ),
    "phi3": ("fused q, k, v; partial rotation", {**PARTIAL, "original_max_position_embeddings": 512}),
    "phi": ("biases everywhere, partial rotation, parallel block, norms on q and k", {**PARTIAL, "qk_layernorm": True}),
    "olmo": ("clipped q, k, v", {"clip_qkv": 0.5}),
    "olmo2": ("norms over all heads together", {}),
    "olmoe": ("norms over all heads together, clipped, mixture of experts", {"clip_qkv": 0.7, **EXPERTS}),
    "smollm3": ("one layer in four without RoPE", {"no_rope_layer_interval": 2}),
    "gpt_neox": ("q, k, v interleaved by head, partial rotation, parallel block", PARTIAL),
    "stablelm": ("a norm of its own for every head, partial rotation", {**PARTIAL, "qk_layernorm": True}),
    "granite": (
        "multipliers on embeddings, attention, residuals and logits",
        {"embedding_multiplier": 3.0, "attention_multiplier": 0.3, "residual_multiplier": 0.4, "logits_scaling": 2.0},
    ),
    "cohere": ("neighbouring pairs rotated, a norm of its own for every head, parallel block", {"use_qk_norm": True}),
    "cohere2": ("RoPE in windowed layers only, parallel block", {"head_dim": 12, **ALTERNATING}),
    "exaone4": ("norms on q and k, RoPE in windowed layers only", {"head_dim": 12, **ALTERNATING}),
    "starcoder2": ("biases everywhere, windows", {"sliding_window": 8}),
    "glm": ("neighbouring pairs of half a head rotated", {"head_dim": 12, "attention_bias": True, **PARTIAL}),
    "gpt2": (
        "Conv1D, learned positions, a scale by layer",
        {"n_embd": 48, "n_layer": 4, "n_head": 4, "n_positions": 512, "scale_attn_by_inverse_layer_idx": True},
    ),
    "gpt_oss": ("learned sinks, windows, biases, mixture of experts", {"head_dim": 12, **EXPERTS, **ALTERNATING}),
}  # fmt: skip


def make_family(family: str, seed: int = 0, **changes: Any) -> PreTrainedModel:
    """A decoder of `family`: 4 layers, hidden size 48, 4 heads (on 2 where it groups them), vocabulary 101."""
    fields = {**COMMON, **FAMILIES[family][1], **changes}
    config = AutoConfig.for_model(family)
    known = {key for key in fields if hasattr(config, key) or key in FAMILIES[family][1] or key in changes}
    torch.manual_seed(seed)
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(family, **{key: fields[key] for key in known}))
    with torch.no_grad():  # norms, biases and sinks start as ones and zeros, which would hide a lost weight
        for parameter in model.parameters():
            if parameter.ndim <= 2 and parameter.std() < 1e-3 or parameter.ndim == 1:
                parameter.add_(0.2 * torch.randn_like(parameter))
    return honour_caps(model).eval()
