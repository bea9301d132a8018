"""Reads the attention of any Hugging Face decoder into AttentionViews, or says why it cannot be operated on.

Nothing here knows a family by name: layers, projections and norms are found by their structure (layouts.py has the ways
families store them), and a view is not taken on trust. The model is run on a few tokens, and attention rebuilt from
each view must give what the model's own attention gave.
"""

from __future__ import annotations

import copy
import inspect
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map
from transformers import AutoModelForCausalLM, DynamicCache, PretrainedConfig, PreTrainedModel

from halobench.errors import UserError, reason_of, some
from halobench.mixers.contract import MixerContext
from halobench.mixers.softmax import SoftmaxMixer, SoftmaxOptions
from halobench.mixers.view import AttentionView, NormView
from halobench.surgery.layouts import (
    ATTENTIONS,
    BIASES,
    FOREIGN,
    HARMLESS,
    LAYER_LISTS,
    NORMS,
    OUTPUTS,
    PROJECTIONS,
    ROTATES,
    Heads,
    Projections,
    read_norm,
    rotation,
    weights_of,
)

PROBE_TOKENS = 8
PROBE_TOLERANCE = 1e-4  # of the size of what attention gives, in fp32
DECODERS = (
    "decoders of softmax attention can be converted, such as Llama, Qwen, Gemma, Phi, GPT-NeoX (docs/families.md)"
)


def decoder_layers(model: PreTrainedModel) -> tuple[nn.ModuleList, str]:
    """The decoder's layers, and the attribute of a layer that holds its attention.

    Raises:
        UserError: it is no decoder, or some layer has no attention.
    """
    family = model.config.model_type
    refuse_config(model.config)
    decoder = model.get_decoder()
    layers = next((x for name in LAYER_LISTS if isinstance(x := getattr(decoder, name, None), nn.ModuleList)), None)
    if layers is None:
        raise UserError(f"{family} keeps its layers in no list called {', '.join(LAYER_LISTS)}; {DECODERS}")
    places = {index: [name for name in ATTENTIONS if hasattr(layer, name)] for index, layer in enumerate(layers)}
    lacking = [index for index, found in places.items() if not found]
    if lacking:
        kinds = {type(layers[index]).__name__ for index in lacking}
        raise UserError(
            f"layers {some(lacking)} of {family} ({', '.join(sorted(kinds))}) hold no attention called "
            f"{', '.join(ATTENTIONS)}: a hybrid or a state-space model already, or built in another way; {DECODERS}"
        )
    return layers, places[0][0]


def attention_modules(model: PreTrainedModel) -> dict[int, nn.Module]:
    """The attention module of each layer, by layer index."""
    layers, name = decoder_layers(model)
    return {index: getattr(layer, name) for index, layer in enumerate(layers)}


def read_attention(model: PreTrainedModel) -> list[AttentionView]:
    """One view for each layer. Weights are the model's own, not copies, wherever its layout allows.

    Raises:
        UserError: the attention is of a kind that is not understood; the message names the layer and what does not fit.
    """
    modules = attention_modules(model)
    empty = [name for name, parameter in model.named_parameters() if parameter.device.type == "meta"]
    if empty and len(empty) < len(list(model.parameters())):
        raise UserError(
            f"{len(empty)} weights of the model are not in memory (offloaded?), such as {empty[0]}; load all"
        )
    views = [_read_layer(model, index, attention) for index, attention in modules.items()]
    if not empty:
        _check_views(model, views, modules)
    return views


def describe(config: PretrainedConfig) -> list[AttentionView]:
    """The views a model of this config would have, without weights (on the meta device)."""
    return read_attention(empty_model(config))


def empty_model(config: PretrainedConfig) -> PreTrainedModel:
    """A model of this config without weights, on the meta device."""
    refuse_config(config)
    try:
        with torch.device("meta"):
            return AutoModelForCausalLM.from_config(copy.deepcopy(config))
    except ValueError as error:
        raise UserError(f"{config.model_type} has no causal language model in transformers; {DECODERS}") from error
    except (AttributeError, ImportError, KeyError, RuntimeError, TypeError) as error:
        raise UserError(
            f"transformers cannot build a {config.model_type} from this config: {reason_of(error)}"
        ) from error


def leaves_caps_out(model: PreTrainedModel) -> bool:
    """Whether the scores are to be soft-capped and the kernel set for them is sdpa, which cannot do it.

    Versions of transformers differ in what comes of that: an error, another kernel, or scores without caps.
    """
    if model.config.get_text_config(decoder=True)._attn_implementation != "sdpa":
        return False
    return any(getattr(module, "attn_logit_softcapping", None) is not None for module in model.modules())


def honour_caps(model: PreTrainedModel) -> PreTrainedModel:
    """The model itself, set to a kernel that caps its scores if they are to be capped."""
    if leaves_caps_out(model):
        model.set_attn_implementation("eager")
    return model


def refuse_config(config: PretrainedConfig) -> None:
    """Raises UserError for what its config alone shows to be no decoder of attention."""
    if getattr(config, "is_encoder_decoder", False):
        raise UserError(f"{config.model_type} is an encoder-decoder; {DECODERS}")
    text = config.get_text_config(decoder=True)
    kinds = set(getattr(text, "layer_types", None) or ()) - {"full_attention", "sliding_attention"}
    if kinds:
        raise UserError(
            f"{config.model_type} has layers of {', '.join(sorted(kinds))}, which is neither full nor sliding-window "
            f"attention (a hybrid or a state-space model already?); {DECODERS}"
        )


def _read_layer(model: PreTrainedModel, index: int, attention: Any) -> AttentionView:
    config = model.config.get_text_config(decoder=True)
    where = f"layer {index} of {config.model_type}"
    held = {name for name, _ in attention.named_children()} | {
        name for name, _ in attention.named_parameters(recurse=False)
    }
    for name in sorted(held & FOREIGN.keys()):
        raise UserError(f"{where} has {FOREIGN[name]} ({name!r}); {DECODERS}")
    arguments = inspect.signature(attention.forward).parameters
    for name in BIASES:
        if name in arguments and getattr(config, name, True):
            raise UserError(f"{where} adds {name} to its scores, which no mixer can take over; {DECODERS}")
    heads = _heads(config, attention, where)
    projections, read = _projections(attention, heads, held, where)
    output = next((name for name in OUTPUTS if name in held), None)
    if output is None:
        raise UserError(f"{where} has no output projection called {', '.join(OUTPUTS)}; {DECODERS}")
    norms: dict[str, NormView | None] = {}
    for part, names in NORMS.items():
        name = next((name for name in names if name in held), None)
        count = heads.query if part == "q" else heads.key
        norms[part] = (
            None if name is None else read_norm(getattr(attention, name), count, heads.size, f"{where}: {name}")
        )
        read |= {name} if name else set()
    strange = held - read - HARMLESS - {output}
    if strange:
        raise UserError(f"{where} has parts that are not understood: {', '.join(sorted(strange))}; {DECODERS}")
    o_weight, o_bias = weights_of(getattr(attention, output), f"{where}: {output}")
    rotary_dim = _rotary_dim(model, attention, index, heads.size)
    interleaved, table_interleaved = rotation(attention) if rotary_dim else (False, False)
    view = AttentionView(
        layer_index=index,
        hidden_size=config.hidden_size,
        num_heads=heads.query,
        num_kv_heads=heads.key,
        head_dim=heads.size,
        q_weight=projections.q[0], k_weight=projections.k[0], v_weight=projections.v[0], o_weight=o_weight,
        q_bias=projections.q[1], k_bias=projections.k[1], v_bias=projections.v[1], o_bias=o_bias,
        q_norm=norms["q"], k_norm=norms["k"],
        norm_eps=next((e for n in ("rms_norm_eps", "layer_norm_eps") if (e := getattr(config, n, None))), 1e-6),
        scaling=getattr(attention, "scaling", heads.size**-0.5),
        rope=rotary_dim > 0,
        rotary_dim=rotary_dim,
        rope_interleaved=interleaved,
        rope_table_interleaved=table_interleaved,
        sliding_window=_window(config, attention, index),
        soft_cap=getattr(attention, "attn_logit_softcapping", None),
        clip=getattr(config, "clip_qkv", None),
        sinks=getattr(attention, "sinks", None),
        init_std=getattr(config, "initializer_range", 0.02),
    )  # fmt: skip
    _check_shapes(view, where)
    return view


def _heads(config: Any, attention: Any, where: str) -> Heads:
    """Head counts and size, from the module where it says them and from the config else."""
    query = getattr(config, "num_attention_heads", None)
    if query is None:
        raise UserError(f"{where} has no attention heads: it is a state-space model already; {DECODERS}")
    size = next((s for n in ("head_dim", "head_size") if (s := getattr(attention, n, None))), None)
    size = size or getattr(config, "head_dim", None) or config.hidden_size // query
    key = getattr(config, "num_key_value_heads", None) or query
    if query % key:
        raise UserError(f"{where}: {query} query heads cannot share {key} key/value heads evenly; {DECODERS}")
    return Heads(query=query, key=key, size=size)


def _projections(attention: Any, heads: Heads, held: set[str], where: str) -> tuple[Projections, set[str]]:
    """The projections, and the names of the parts they were read from."""
    for names, read in PROJECTIONS:
        if held >= set(names):
            return read(attention, heads, where), set(names)
    known = "; ".join(", ".join(names) for names, _ in PROJECTIONS)
    raise UserError(f"{where} has the parts {', '.join(sorted(held))}, expected its projections as {known}; {DECODERS}")


def _check_shapes(view: AttentionView, where: str) -> None:
    queries, keys = view.num_heads * view.head_dim, view.num_kv_heads * view.head_dim
    expected = {
        "q": (view.q_weight, (queries, view.hidden_size)),
        "k": (view.k_weight, (keys, view.hidden_size)),
        "v": (view.v_weight, (keys, view.hidden_size)),
        "o": (view.o_weight, (view.hidden_size, queries)),
    }
    for name, (weight, shape) in expected.items():
        if tuple(weight.shape) != shape:
            raise UserError(
                f"{where}: the {name} projection has shape {tuple(weight.shape)}, expected {shape} for "
                f"{view.num_heads} heads of {view.head_dim} on {view.num_kv_heads}; {DECODERS}"
            )


def _rotary_dim(model: PreTrainedModel, attention: Any, index: int, head_dim: int) -> int:
    """Features of a head that RoPE turns; 0 for a layer without RoPE."""
    rotary = getattr(model.get_decoder(), "rotary_emb", None)
    config = model.config.get_text_config(decoder=True)
    rotates = ROTATES.get(config.model_type, lambda module: getattr(module, "use_rope", True))
    if rotary is None or not rotates(attention):
        return 0
    kinds = getattr(config, "layer_types", None)
    names = ["inv_freq", *([f"{kinds[index]}_inv_freq"] if kinds else [])]
    frequencies = next((f for name in names if (f := getattr(rotary, name, None)) is not None), None)
    if frequencies is None:
        raise UserError(f"{config.model_type} has rotary tables without frequencies ({', '.join(names)}); {DECODERS}")
    return min(head_dim, 2 * frequencies.shape[-1])


def _window(config: Any, attention: Any, index: int) -> int | None:
    """Tokens a query of this layer sees, itself included; None is all."""
    kinds = getattr(config, "layer_types", None)
    if kinds is not None:
        return config.sliding_window if kinds[index] == "sliding_attention" else None
    if hasattr(attention, "sliding_window"):
        return attention.sliding_window
    return getattr(config, "sliding_window", None) if getattr(config, "use_sliding_window", True) else None


def source_windows(model: PreTrainedModel) -> list[int | None]:
    """The window that transformers itself gives each layer's cache, in tokens; None keeps all.

    Of no meaning where another mixer stands.
    """
    layers = len(decoder_layers(model)[0])
    own = DynamicCache(config=model.config.get_text_config(decoder=True)).layers
    windows = [getattr(layer, "sliding_window", None) for layer in own]
    return windows if len(windows) == layers else [None] * layers


def _check_views(model: PreTrainedModel, views: Sequence[AttentionView], modules: dict[int, nn.Module]) -> None:
    """Runs the model on a few tokens, and attention rebuilt from each view on what its layer saw.

    This is what catches a rotation of another layout, a norm of another formula or place, a factor nobody declared.
    """
    if leaves_caps_out(model):
        raise UserError(
            f"{model.config.model_type} caps its attention scores, and the sdpa kernel that it is set to leaves the "
            'caps out; load it with attn_implementation="eager", or with load_model'
        )
    seen = watch_attention(model, *_probe(model), modules)
    for view in views:
        error = _difference(view, seen[view.layer_index], modules[view.layer_index])
        if not error <= PROBE_TOLERANCE:
            raise UserError(
                f"layer {view.layer_index} of {model.config.model_type} does not compute what its weights say: "
                f"attention rebuilt from them differs by {error:.1e} of its size; the family needs an adapter"
            )


@torch.no_grad()
def _difference(view: AttentionView, seen: Seen, attention: nn.Module) -> float:
    """How far attention rebuilt from a view is from the layer's own, as a share of its size; in fp32 at least."""
    hidden, tables, expected = seen.hidden, seen.position_embeddings, seen.output
    plain = SoftmaxOptions(rope=view.rope, output_gate=False, sliding_window=False)
    rebuilt = SoftmaxMixer.from_attention(view, plain).eval()
    if hidden.dtype in (torch.bfloat16, torch.float16):  # whose own rounding would hide a factor nobody declared
        args, kwargs = tree_map(_exact, (seen.args, seen.kwargs))
        hidden, tables = tree_map(_exact, (hidden, tables))
        expected = copy.deepcopy(attention).float().eval()(*args, **kwargs)[0]
        rebuilt = rebuilt.float()
    got = rebuilt(hidden, position_embeddings=tables, context=MixerContext.plain(PROBE_TOKENS, hidden.device))
    return float((got - expected).norm() / expected.norm().clamp(min=1e-30))


def _exact(x: Any) -> Any:
    return x.float() if isinstance(x, Tensor) and x.dtype in (torch.bfloat16, torch.float16) else x


def _probe(model: PreTrainedModel) -> tuple[Tensor, Tensor]:
    """A few tokens, and positions over all that the model was made for: some families act on far ones alone."""
    table: Any = model.get_input_embeddings().weight
    ids = torch.randint(0, table.shape[0], (1, PROBE_TOKENS), generator=torch.Generator().manual_seed(0))
    config = model.config.get_text_config(decoder=True)
    last = max(getattr(config, "max_position_embeddings", None) or 4096, PROBE_TOKENS) - 1
    positions = torch.linspace(0, last, PROBE_TOKENS).long()[None]
    return ids.to(table.device), positions.to(table.device)


class Seen(NamedTuple):
    """What a layer's attention was given and what it gave."""

    hidden: Tensor
    position_embeddings: Any
    output: Tensor
    args: tuple[Any, ...]
    kwargs: dict[str, Any]


@torch.no_grad()
def watch_attention(
    model: Any, tokens_BT: Tensor, positions_BT: Tensor | None, modules: dict[int, nn.Module]
) -> dict[int, Seen]:
    """One pass of the model, and what the attention of each layer was given and gave in it."""
    seen: dict[int, Seen] = {}

    def hook(layer: int) -> Any:
        def keep(module: nn.Module, args: Any, kwargs: dict[str, Any], output: Any) -> None:
            hidden = kwargs["hidden_states"] if "hidden_states" in kwargs else args[0]
            seen[layer] = Seen(hidden, kwargs.get("position_embeddings"), output[0], args, kwargs)

        return keep

    handles = [module.register_forward_hook(hook(layer), with_kwargs=True) for layer, module in modules.items()]
    # Without a mask, transformers takes positions with gaps for several texts in one row.
    given = {} if positions_BT is None else {
        "position_ids": positions_BT, "attention_mask": torch.ones_like(tokens_BT)
    }  # fmt: skip
    try:
        with evaluating(model):
            model.get_decoder()(input_ids=tokens_BT, use_cache=False, **given)
    finally:
        for handle in handles:
            handle.remove()
    return seen


@contextmanager
def evaluating(module: nn.Module) -> Iterator[None]:
    """Evaluation mode for the length of a block; every part then returns to its own mode."""
    modes = [(part, part.training) for part in module.modules()]
    module.eval()
    try:
        yield
    finally:
        for part, mode in modes:
            part.training = mode
