"""The fields of a released HypeNet's config.json (arXiv 2601.22156): what each may say, and its default there.

Every field that the released model acts on is understood or refused; none is skipped in silence, for a switch that is
lost gives a model that runs and computes something else. Defaults are those of the released config class, which differ
from ours: a field that is absent means what it means there.
"""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from typing import Any

FAMILY = "qwen3"  # the released decoder is Qwen3's, but for its mixers
# "hybrid" and HybridForCausalLM were the names until the first release of the code; the fields are the same.
MODEL_TYPES = ("hypenet", "hybrid")
ARCHITECTURES = ("HypeNetForCausalLM", "HybridForCausalLM")
ATTENTION = "attn"
LIGHTNING = ("lightning-attn", "lightning_attn")
# What lightning_scale says, and the options of our mixer that say the same.
SCALES: dict[str, dict[str, Any]] = {word: {"scale": word} for word in ("1/sqrt(d)", "1/d", "1")}
LONE_HYPE_BASE = 362.0  # the base that a scaling without a number stands for
# Types of RoPE and what each needs beside rope_theta. Of the others, some mean another thing in another version of
# transformers (YaRN's factor), and no HypeNet has one: its reach beyond the teacher's comes from layers without RoPE.
ROPE_TYPES = {
    "default": frozenset[str](),
    "linear": frozenset({"factor"}),
}
# Fields with one value that can be honoured, and why there is no other.
FIXED: dict[str, tuple[Any, str]] = {
    "lightning_use_short_conv": (False, "the released convolutions have a size that cannot run"),
    "lightning_rope_scaling": (None, "the released model gives other values no meaning"),
    "use_sliding_window": (False, "the released model applies a window differently by attention kernel"),
    "is_encoder_decoder": (False, "only decoders are read"),
    "add_cross_attention": (False, "only decoders are read"),
    "chunk_size_feed_forward": (0, "no released model has it"),
    "pruned_heads": ({}, "no released model has it"),
    "quantization_config": (None, "quantised weights are not read"),
}
# Fields that change no output of the layers read here: those of transformers' base class, switches of training and of
# initialisation, sizes of a window that is off, and the options of mixers that no layer read here has.
_HARMLESS = """
    model_type architectures auto_map transformers_version _name_or_path dtype torch_dtype use_cache
    _attn_implementation _attn_implementation_autoset attn_implementation
    bad_words_ids begin_suppress_tokens cross_attention_hidden_size decoder_start_token_id diversity_penalty do_sample
    early_stopping encoder_no_repeat_ngram_size exponential_decay_length_penalty finetuning_task forced_bos_token_id
    forced_eos_token_id id2label is_decoder label2id length_penalty max_length min_length no_repeat_ngram_size
    num_beam_groups num_beams num_return_sequences output_attentions output_hidden_states output_scores prefix
    problem_type remove_invalid_values repetition_penalty return_dict return_dict_in_generate sep_token_id
    suppress_tokens task_specific_params temperature tf_legacy_loss tie_encoder_decoder tokenizer_class top_k top_p
    torchscript typical_p use_bfloat16
    fused_ce_loss loss_fn shift_labels rand_init expand_kv_proj lightning_conv_size
    sliding_window max_window_layers
    gdn_use_short_conv gdn_use_gate gdn_expand_v gdn_attn_mode gdn_fuse_cross_entropy gdn_activation gdn_nh gdn_nkv
    gdn_use_qk_norm gdn_use_rope
    kda_head_dim kda_num_heads kda_use_conv kda_use_qk_norm kda_use_rope kda_conv_size
    mamba2_n_groups mamba2_expand_ratio mamba2_conv_kernel mamba2_bias mamba2_hidden_act
"""
HARMLESS = frozenset(_HARMLESS.split())


@dataclass(frozen=True, kw_only=True)
class SourceFields:
    """What a released config and a Qwen3 config say by the same names."""

    vocab_size: int = 151936
    hidden_size: int = 4096
    intermediate_size: int = 22016
    num_hidden_layers: int = 32
    num_attention_heads: int = 32
    num_key_value_heads: int | None = 32
    head_dim: int | None = 128
    hidden_act: str = "silu"
    max_position_embeddings: int = 32768
    initializer_range: float = 0.02
    rms_norm_eps: float = 1e-6
    tie_word_embeddings: bool = False
    attention_bias: bool = False
    attention_dropout: float = 0.0
    bos_token_id: int | None = None
    eos_token_id: int | list[int] | None = None
    pad_token_id: int | None = None


@dataclass(frozen=True, kw_only=True)
class ReleasedFields(SourceFields):
    """All fields that decide what a released model computes, with the defaults of its config class.

    rope_theta: None stands for 10000, or for what rope_parameters says.
    rope_scaling, rope_parameters: the spellings of transformers 4 and 5.
    mlp_hidden_act: read by no released model; it may only repeat hidden_act.
    """

    mixer_types: list[str] = field(default_factory=list)
    rope_theta: float | None = None
    rope_scaling: dict[str, Any] | None = None
    rope_parameters: dict[str, Any] | None = None
    mlp_hidden_act: str | None = None
    attn_use_rope: bool = True
    attn_use_output_gate: bool = False
    attn_logits_scaling: str | float | None = None
    lightning_nh: int | None = None
    lightning_nkv: int | None = None
    lightning_head_dim: int | None = None
    lightning_scale: str = "1/sqrt(d)"
    lightning_use_qk_norm: bool = False
    lightning_use_rope: bool = True
    lightning_use_output_norm: bool = False
    lightning_use_output_gate: bool = False


def shown(value: Any) -> str:
    """A value as JSON has it, for messages."""
    return json.dumps(value, default=str)
