"""From a released HypeNet's config.json to our Qwen3 source config and plan."""

from __future__ import annotations

from dataclasses import fields
from typing import Any

from transformers import AutoConfig, PretrainedConfig
from transformers.activations import ACT2FN

from halobench.config import from_dict
from halobench.errors import UserError
from halobench.surgery.hybrid import HybridConfig
from halobench.surgery.hypenet.fields import (
    ARCHITECTURES,
    ATTENTION,
    FAMILY,
    FIXED,
    HARMLESS,
    LIGHTNING,
    LONE_HYPE_BASE,
    MODEL_TYPES,
    ROPE_TYPES,
    SCALES,
    ReleasedFields,
    SourceFields,
    shown,
)
from halobench.surgery.plan import LayerPlan, SurgeryPlan


def read_hypenet(config: dict[str, Any]) -> tuple[PretrainedConfig, SurgeryPlan]:
    """The Qwen3 config and the plan that a released config.json stands for.

    Raises:
        UserError: a field is unknown, or has a value that cannot be honoured; the message names field and value, and
            says what is allowed.
    """
    _check_kind(config)
    for name, (only, why) in FIXED.items():
        value = config.get(name)
        _require(value is None or value == only, name, value, f"{shown(only)}; {why}")
    skipped = HARMLESS | FIXED.keys()
    given = {name: value for name, value in config.items() if name not in skipped}
    released = from_dict(ReleasedFields, given, "a HypeNet's config.json")
    same = {item.name: getattr(released, item.name) for item in fields(SourceFields)}
    same["head_dim"], same["num_key_value_heads"] = _head_dim(released), _kv_heads(released)
    _check_sizes(same)
    _require(released.hidden_act in ACT2FN, "hidden_act", released.hidden_act, "an activation of transformers")
    repeated = released.mlp_hidden_act in (None, released.hidden_act)
    _require(repeated, "mlp_hidden_act", released.mlp_hidden_act, f"what hidden_act says, {released.hidden_act!r}")
    source = AutoConfig.for_model(FAMILY, **same, rope_parameters=_rope_parameters(released))
    return source, _plan(released)


def _check_kind(config: dict[str, Any]) -> None:
    kind = config.get("model_type")
    if kind == HybridConfig.model_type:
        raise UserError("this is a hybrid of halobench already; use it as it is")
    _require(kind in MODEL_TYPES, "model_type", kind, " or ".join(map(shown, MODEL_TYPES)))
    classes = config.get("architectures") or []
    known = isinstance(classes, list) and all(name in ARCHITECTURES for name in classes)
    _require(known, "architectures", classes, " or ".join(ARCHITECTURES))


def _check_sizes(sizes: dict[str, Any]) -> None:
    for name in ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads",
                 "num_key_value_heads", "head_dim", "max_position_embeddings"):  # fmt: skip
        _require(sizes[name] >= 1, name, sizes[name], "1 or more")
    heads, kv_heads = sizes["num_attention_heads"], sizes["num_key_value_heads"]
    _require(heads % kv_heads == 0, "num_key_value_heads", kv_heads, f"a divisor of num_attention_heads, {heads}")
    _require(sizes["head_dim"] % 2 == 0, "head_dim", sizes["head_dim"], "an even number, for RoPE turns pairs")


def _head_dim(released: ReleasedFields) -> int:
    return released.head_dim or released.hidden_size // max(1, released.num_attention_heads)


def _kv_heads(released: ReleasedFields) -> int:
    return released.num_attention_heads if released.num_key_value_heads is None else released.num_key_value_heads


def _plan(released: ReleasedFields) -> SurgeryPlan:
    kinds = released.mixer_types or [ATTENTION] * released.num_hidden_layers
    fits = len(kinds) == released.num_hidden_layers
    _require(fits, "number of mixer_types", len(kinds), f"num_hidden_layers, {released.num_hidden_layers}")
    known = (ATTENTION, *LIGHTNING)
    for kind in kinds:
        _require(kind in known, "mixer_types", kind, f"{', '.join(known)}; the released code reads no other mixer")
    options: dict[str, LayerPlan] = {}
    if ATTENTION in kinds:
        options[ATTENTION] = LayerPlan(mixer="softmax", options=_softmax_options(released))
    if set(kinds) & set(LIGHTNING):
        options |= dict.fromkeys(LIGHTNING, LayerPlan(mixer="lightning", options=_lightning_options(released)))
    return SurgeryPlan(layers=tuple(options[kind] for kind in kinds))


def _softmax_options(released: ReleasedFields) -> dict[str, Any]:
    return {
        "rope": released.attn_use_rope,
        "output_gate": released.attn_use_output_gate,
        "logits_scale_base": _scale_base(released.attn_logits_scaling),
    }


def _scale_base(scaling: str | float | None) -> float | None:
    """a of log(t + a) / log(a) in "hype a"."""
    if scaling is None:
        return None
    words = scaling.split() if isinstance(scaling, str) else []
    allowed = 'null, "hype" or "hype A", A a whole number above 1 (the released model rounds A in one place)'
    _require(bool(words) and words[0] == "hype" and len(words) <= 2, "attn_logits_scaling", scaling, allowed)
    try:
        base = float(words[1]) if len(words) > 1 else LONE_HYPE_BASE
    except ValueError:
        base = 0.0
    _require(base > 1 and base.is_integer(), "attn_logits_scaling", scaling, allowed)
    return base


def _lightning_options(released: ReleasedFields) -> dict[str, Any]:
    heads, kv_heads, head_dim = released.num_attention_heads, _kv_heads(released), _head_dim(released)
    own = heads if released.lightning_nh is None else released.lightning_nh
    _require(own == heads, "lightning_nh", own, f"num_attention_heads, {heads}")
    own = head_dim if released.lightning_head_dim is None else released.lightning_head_dim
    _require(own == head_dim, "lightning_head_dim", own, f"head_dim, {head_dim}")
    own = kv_heads if released.lightning_nkv is None else released.lightning_nkv
    either = f"num_attention_heads or num_key_value_heads, {heads} or {kv_heads}"
    _require(own in (heads, kv_heads), "lightning_nkv", own, either)
    _require(released.lightning_scale in SCALES, "lightning_scale", released.lightning_scale, ", ".join(SCALES))
    biased = released.attention_bias and released.lightning_use_output_gate
    without = "false, or lightning_use_output_gate = false; else the gate has a bias, which our mixer lacks"
    _require(not biased, "attention_bias", released.attention_bias, without)
    return {
        "qk_norm": released.lightning_use_qk_norm,
        "rope": released.lightning_use_rope,
        "expand_kv": own == heads,
        "output_norm": released.lightning_use_output_norm,
        "norm_scope": "all",
        "output_gate": released.lightning_use_output_gate,
        **SCALES[released.lightning_scale],
    }


def _rope_parameters(released: ReleasedFields) -> dict[str, Any]:
    """RoPE in the spelling of transformers 5, from either spelling or from both when they agree."""
    tables = {"rope_scaling": released.rope_scaling, "rope_parameters": released.rope_parameters}
    read = {name: _rope_table(name, table) for name, table in tables.items() if table}
    thetas = {f"{name}.rope_theta": table.pop("rope_theta") for name, table in read.items() if "rope_theta" in table}
    if released.rope_theta is not None:
        thetas["rope_theta"] = released.rope_theta
    for name, theta in thetas.items():
        _require(isinstance(theta, int | float) and theta > 0, name, theta, "a number above 0")
        first = next(iter(thetas))
        _require(theta == thetas[first], name, theta, f"what {first} says, {thetas[first]}")
    if len(read) == 2:
        same = read["rope_scaling"] == read["rope_parameters"]
        _require(same, "rope_parameters", released.rope_parameters, "what rope_scaling says, or nothing")
    table = next(iter(read.values()), {"rope_type": "default"})
    return {**table, "rope_theta": float(next(iter(thetas.values()), 10000.0))}


def _rope_table(name: str, table: dict[str, Any]) -> dict[str, Any]:
    """One of the two tables, checked; "type" is an old name of rope_type."""
    rest = {key: value for key, value in table.items() if key not in ("type", "rope_type")}
    kind = table.get("rope_type", table.get("type", "default"))
    _require(isinstance(kind, str) and kind in ROPE_TYPES, f"{name}.rope_type", kind, ", ".join(ROPE_TYPES))
    needed = ROPE_TYPES[kind]
    wanted = f"for {kind!r} these beside rope_theta: {', '.join(sorted(needed)) or 'none'}, each a number"
    numbers = all(isinstance(value, int | float) for value in rest.values())
    _require(numbers and rest.keys() - {"rope_theta"} == needed, name, table, wanted)
    return {"rope_type": kind, **rest}


def _require(condition: bool, name: str, value: Any, allowed: str) -> None:
    if not condition:
        raise UserError(f"config.json: {name} is {shown(value)}; allowed: {allowed}")
