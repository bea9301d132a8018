"""From a hybrid to the config.json of the released layout, or to the reason why there is none."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import fields
from typing import Any

from transformers import PretrainedConfig

from halobench.config import to_dict
from halobench.errors import UserError
from halobench.mixers import MIXERS
from halobench.surgery.hybrid import TOKEN_IDS, HybridConfig
from halobench.surgery.hypenet.fields import (
    ARCHITECTURES,
    ATTENTION,
    FAMILY,
    HARMLESS,
    LIGHTNING,
    MODEL_TYPES,
    SCALES,
    ReleasedFields,
    SourceFields,
    shown,
)
from halobench.surgery.hypenet.reading import read_hypenet
from halobench.surgery.plan import KEEP, LayerPlan, SurgeryPlan


def write_hypenet(config: HybridConfig) -> dict[str, Any]:
    """The released config.json of a hybrid.

    Raises:
        UserError: the layout has no way to say what this hybrid is; the message says what.
    """
    source, plan = config.source_config(), config.surgery_plan()
    for name in TOKEN_IDS:
        setattr(source, name, getattr(config, name))
    if source.model_type != FAMILY:
        raise UserError(f"the hybrid was made from {source.model_type}; HypeNet's layout is for {FAMILY} alone")
    softmax = _one_for_all(plan, _written_softmax)
    lightning = _one_for_all(plan, lambda layer: _written_lightning(layer, source))
    rope = dict(source.rope_parameters)
    theta, kind = rope.pop("rope_theta"), rope.get("rope_type", "default")
    released = ReleasedFields(
        **{item.name: getattr(source, item.name) for item in fields(SourceFields)},
        mixer_types=[LIGHTNING[0] if layer.mixer == "lightning" else ATTENTION for layer in plan.layers],
        rope_theta=theta,
        rope_scaling=None if kind == "default" and len(rope) <= 1 else rope,
        **softmax,
        **lightning,
    )
    own = {key: value for key, value in to_dict(released).items() if key not in ("rope_parameters", "mlp_hidden_act")}
    expanded = released.lightning_nkv == source.num_attention_heads
    written = {
        "architectures": [ARCHITECTURES[0]],
        "model_type": MODEL_TYPES[0],
        **own,
        "expand_kv_proj": expanded,
        "lightning_rope_scaling": None,
        "lightning_use_short_conv": False,
        "use_cache": True,
    }
    _check_written(written, source, plan)
    return written


def _one_for_all(plan: SurgeryPlan, written: Callable[[LayerPlan], dict[str, Any] | None]) -> dict[str, Any]:
    """The switches of all layers of a kind, which must be the same: the layout has one of each."""
    found: dict[int, dict[str, Any]] = {}
    for index, layer in enumerate(plan.layers):
        switches = written(layer)
        if switches is None:
            continue
        found[index] = switches
        first, wanted = next(iter(found.items()))
        for name, value in switches.items():
            if value != wanted[name]:
                raise UserError(
                    f"{name} would be {shown(wanted[name])} in layer {first} and {shown(value)} in layer {index}; "
                    "HypeNet's layout has one for all layers of a kind"
                )
    return next(iter(found.values()), {})


def _written_softmax(layer: LayerPlan) -> dict[str, Any] | None:
    """The attn_* switches of a layer; None for another mixer, which has none."""
    if layer.mixer == KEEP:
        return {"attn_use_rope": True, "attn_use_output_gate": False, "attn_logits_scaling": None}
    if layer.mixer == "lightning":
        return None
    if layer.mixer != "softmax":
        raise UserError(f"the hybrid has {layer.mixer!r} layers; HypeNet's layout knows softmax and lightning alone")
    _check_rest(layer, {"rope", "output_gate", "gate_init", "logits_scale_base", "sliding_window"})
    base = layer.options["logits_scale_base"]
    if base is not None and not float(base).is_integer():
        raise UserError(f"logits_scale_base is {base}; the released model is exact for whole numbers alone")
    return {
        "attn_use_rope": layer.options["rope"],
        "attn_use_output_gate": layer.options["output_gate"],
        "attn_logits_scaling": None if base is None else f"hype {base:.0f}",
    }


def _written_lightning(layer: LayerPlan, source: PretrainedConfig) -> dict[str, Any] | None:
    """The lightning_* switches of a layer; None for another mixer, which has none."""
    if layer.mixer != "lightning":
        return None
    options = layer.options
    said = {key for own in SCALES.values() for key in own}
    _check_rest(layer, {"qk_norm", "rope", "expand_kv", "output_norm", "norm_scope", "output_gate", "gate_init", *said})
    if options["output_norm"] and options["norm_scope"] != "all" and source.num_attention_heads > 1:
        raise UserError(f"norm_scope is {options['norm_scope']!r}; HypeNet's layout has one norm over all heads, 'all'")
    scales = [word for word, own in SCALES.items() if all(options[key] == value for key, value in own.items())]
    if not scales:
        raise UserError(f"the lightning layers have a scale that HypeNet's layout lacks; allowed: {', '.join(SCALES)}")
    return {
        "lightning_nh": source.num_attention_heads,
        "lightning_nkv": source.num_attention_heads if options["expand_kv"] else source.num_key_value_heads,
        "lightning_head_dim": source.head_dim,
        "lightning_scale": scales[0],
        "lightning_use_qk_norm": options["qk_norm"],
        "lightning_use_rope": options["rope"],
        "lightning_use_output_norm": options["output_norm"],
        "lightning_use_output_gate": options["output_gate"],
    }


def _check_rest(layer: LayerPlan, understood: set[str]) -> None:
    """Options that the layout has no word for must stand at their defaults."""
    defaults = to_dict(MIXERS.get(layer.mixer).Options())
    for name, value in layer.options.items():
        if name not in understood and value != defaults[name]:
            raise UserError(
                f"the {layer.mixer} layers have {name} = {shown(value)}, which HypeNet's layout cannot say; "
                f"allowed: {shown(defaults[name])}"
            )


def _check_written(written: dict[str, Any], source: PretrainedConfig, plan: SurgeryPlan) -> None:
    """Reads what was written and compares: the last guard against a field of the source that the layout lacks."""
    again, plan_again = read_hypenet(written)
    before, after = ({k: v for k, v in x.to_dict().items() if k not in HARMLESS} for x in (source, again))
    differing = sorted(name for name in before.keys() | after.keys() if before.get(name) != after.get(name))
    if differing:
        name = differing[0]
        raise UserError(f"the source has {name} = {shown(before.get(name))}, which HypeNet's layout cannot say")
    for index, (mine, theirs) in enumerate(zip(plan.layers, plan_again.layers, strict=True)):
        switches = [(_written_softmax(x), _written_lightning(x, source)) for x in (mine, theirs)]
        if switches[0] != switches[1]:
            raise UserError(f"layer {index} would be read back otherwise; it cannot be written in HypeNet's layout")
