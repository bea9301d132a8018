"""The released HypeNet, written down once more for tests: its files, and a plain computation of its logits.

Nothing of the package is used here: tests hold the package against this, and this against the released code's own
numbers.
"""

from __future__ import annotations

import json
import zlib
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

LIGHTNING, ATTENTION = "lightning-attn", "attn"
BASE: dict[str, Any] = {
    "architectures": ["HypeNetForCausalLM"],
    "model_type": "hypenet",
    "attention_bias": False,
    "attention_dropout": 0.0,
    "attn_logits_scaling": "hype 40",
    "attn_use_output_gate": True,
    "attn_use_rope": False,
    "bos_token_id": 0,
    "eos_token_id": 1,
    "expand_kv_proj": True,
    "head_dim": 8,
    "hidden_act": "silu",
    "hidden_size": 32,
    "initializer_range": 0.02,
    "intermediate_size": 40,
    "lightning_head_dim": 8,
    "lightning_nh": 4,
    "lightning_nkv": 4,
    "lightning_rope_scaling": None,
    "lightning_scale": "1/sqrt(d)",
    "lightning_use_output_gate": True,
    "lightning_use_output_norm": True,
    "lightning_use_qk_norm": True,
    "lightning_use_rope": True,
    "lightning_use_short_conv": False,
    "max_position_embeddings": 4096,
    "mixer_types": [LIGHTNING, ATTENTION, LIGHTNING, LIGHTNING],
    "num_attention_heads": 4,
    "num_hidden_layers": 4,
    "num_key_value_heads": 2,
    "rms_norm_eps": 1e-06,
    "rope_scaling": None,
    "rope_theta": 10000,
    "tie_word_embeddings": True,
    "torch_dtype": "float32",
    "use_cache": True,
    "vocab_size": 61,
}
ABSENT = object()  # a change that removes the field
ACTIVATIONS = {"silu": torch.nn.functional.silu, "gelu": torch.nn.functional.gelu}
IDS = torch.randint(0, 61, (1, 24), generator=torch.Generator().manual_seed(5))


# The released layout, built here


def config_of(**changes: object) -> dict[str, Any]:
    return {name: value for name, value in {**BASE, **changes}.items() if value is not ABSENT}


def kinds_of(config: dict[str, Any]) -> list[str]:
    named = config.get("mixer_types") or [ATTENTION] * config["num_hidden_layers"]
    return [kind.replace("_", "-") for kind in named]


def shapes_of(config: dict[str, Any]) -> dict[str, tuple[int, ...]]:
    """Every tensor that a file of this config holds."""
    width, dim, heads = config["hidden_size"], config["head_dim"], config["num_attention_heads"]
    inner = config["intermediate_size"]
    shapes: dict[str, tuple[int, ...]] = {"model.embed_tokens.weight": (config["vocab_size"], width)}
    shapes["model.norm.weight"] = (width,)
    if not config.get("tie_word_embeddings", False):
        shapes["lm_head.weight"] = (config["vocab_size"], width)
    for index, kind in enumerate(kinds_of(config)):
        at = f"model.layers.{index}."
        shapes |= {at + "input_layernorm.weight": (width,), at + "post_attention_layernorm.weight": (width,)}
        shapes |= {at + f"mlp.{name}_proj.weight": (inner, width) for name in ("gate", "up")}
        shapes[at + "mlp.down_proj.weight"] = (width, inner)
        at += "self_attn."
        recurrent = kind == LIGHTNING
        pairs = (config.get("lightning_nkv") if recurrent else None) or config["num_key_value_heads"]
        outs = {"q_proj": heads * dim, "k_proj": pairs * dim, "v_proj": pairs * dim, "o_proj": width}
        for name, size in outs.items():
            shapes[at + name + ".weight"] = (size, heads * dim if name == "o_proj" else width)
            if config.get("attention_bias"):
                shapes[at + name + ".bias"] = (size,)
        if not recurrent or config.get("lightning_use_qk_norm"):
            shapes |= {at + "q_norm.weight": (dim,), at + "k_norm.weight": (dim,)}
        gated = config.get("lightning_use_output_gate" if recurrent else "attn_use_output_gate")
        if gated:
            shapes[at + ("z_proj" if recurrent else "o_gate") + ".weight"] = (heads * dim, width)
        if recurrent and config.get("lightning_use_output_norm"):
            shapes[at + "o_norm.weight"] = (heads * dim,)
    return shapes


def tensors_of(config: dict[str, Any], dtype: torch.dtype = torch.float32) -> dict[str, Tensor]:
    """Random weights, each from its own name: what two configs share is the same in both."""
    tensors = {}
    for name, shape in shapes_of(config).items():
        random = torch.randn(shape, generator=torch.Generator().manual_seed(zlib.crc32(name.encode())))
        tensors[name] = (1 + 0.2 * random if "norm" in name else 0.25 * random).to(dtype)
    return tensors


def write_released(folder: Path, dtype: torch.dtype = torch.float32, **changes: object) -> Path:
    config = config_of(**changes)
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(config))
    save_file(tensors_of(config, dtype), folder / "model.safetensors", metadata={"format": "pt"})
    return folder


# The released model, computed plainly


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    return weight * x / (x.square().mean(-1, keepdim=True) + eps).sqrt()


def rotated(x_THK: Tensor, config: dict[str, Any]) -> Tensor:
    told = config.get("rope_parameters") or {}
    theta = told.get("rope_theta", config.get("rope_theta", 10000.0))
    factor = ({**told, **(config.get("rope_scaling") or {})}).get("factor", 1.0)
    half = x_THK.shape[-1] // 2
    frequency = theta ** (-torch.arange(half, dtype=torch.float64) / half) / factor
    angle = torch.arange(x_THK.shape[0], dtype=torch.float64)[:, None, None] * frequency
    first, second = x_THK[..., :half], x_THK[..., half:]
    turned = (first * angle.cos() - second * angle.sin(), second * angle.cos() + first * angle.sin())
    return torch.cat(turned, dim=-1)


def mixed(x: Tensor, w: dict[str, Tensor], kind: str, config: dict[str, Any]) -> Tensor:
    """One layer's mixer; (T, D) to (T, D)."""
    recurrent = kind == LIGHTNING
    length, heads, dim, eps = len(x), config["num_attention_heads"], config["head_dim"], config["rms_norm_eps"]

    def project(name: str, x: Tensor = x) -> Tensor:
        return x @ w[name + ".weight"].T + w.get(name + ".bias", 0)

    q, k, v = (project(name).view(length, -1, dim) for name in ("q_proj", "k_proj", "v_proj"))
    if "q_norm.weight" in w:
        q, k = rms_norm(q, w["q_norm.weight"], eps), rms_norm(k, w["k_norm.weight"], eps)
    if config.get("lightning_use_rope" if recurrent else "attn_use_rope", True):
        q, k = rotated(q, config), rotated(k, config)
    k, v = (part.repeat_interleave(heads // part.shape[1], dim=1) for part in (k, v))
    power = {"1/sqrt(d)": 0.5, "1/d": 1, "1": 0}[config["lightning_scale"] if recurrent else "1/sqrt(d)"]
    scores = torch.einsum("thk,shk->hts", q, k) / dim**power
    time = torch.arange(length, dtype=torch.float64)
    later = time[None] > time[:, None]
    if recurrent:
        slopes = torch.tensor([2.0 ** (-8 * (h + 1) / heads) for h in range(heads)], dtype=torch.float64)
        age = (time[:, None] - time[None]).clamp(min=0)
        weights = (scores * torch.exp(-slopes[:, None, None] * age)).masked_fill(later, 0)
    else:
        words = (config.get("attn_logits_scaling") or "").split()
        if words:
            base = float(words[1]) if len(words) > 1 else 362.0
            scores = scores * (torch.log(time + base) / torch.log(torch.tensor(base)))[:, None]
        weights = scores.masked_fill(later, -torch.inf).softmax(-1)
    o = torch.einsum("hts,shk->thk", weights, v).flatten(1)
    if "o_norm.weight" in w:
        o = rms_norm(o, w["o_norm.weight"], eps)
    for gate in ("z_proj", "o_gate"):
        if gate + ".weight" in w:
            o = o * torch.sigmoid(x @ w[gate + ".weight"].T)
    return project("o_proj", o)


def released_logits(config: dict[str, Any], tensors: dict[str, Tensor], ids: Tensor = IDS) -> Tensor:
    """(T, vocabulary) logits of one text."""
    w = {name: tensor.double() for name, tensor in tensors.items()}
    eps, act = config["rms_norm_eps"], ACTIVATIONS[config["hidden_act"]]
    x = w["model.embed_tokens.weight"][ids[0]]
    for index, kind in enumerate(kinds_of(config)):
        at = f"model.layers.{index}."
        own = {name.removeprefix(at): tensor for name, tensor in w.items() if name.startswith(at)}
        mixer = {name.removeprefix("self_attn."): x for name, x in own.items() if name.startswith("self_attn.")}
        x = x + mixed(rms_norm(x, own["input_layernorm.weight"], eps), mixer, kind, config)
        h = rms_norm(x, own["post_attention_layernorm.weight"], eps)
        gate, up = act(h @ own["mlp.gate_proj.weight"].T), h @ own["mlp.up_proj.weight"].T
        x = x + (gate * up) @ own["mlp.down_proj.weight"].T
    x = rms_norm(x, w["model.norm.weight"], eps)
    return (x @ w.get("lm_head.weight", w["model.embed_tokens.weight"]).T).float()
