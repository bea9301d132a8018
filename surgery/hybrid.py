"""The class of every student: a Hugging Face decoder of any family, some of whose layers mix tokens in other ways.

The decoder itself is the source family's own class, built from its config; only `self_attn` of the replaced layers is
another module. What a mixer needs to know of the batch travels through the decoder's forward as a keyword argument.
"""

from __future__ import annotations

from collections.abc import Mapping
from contextvars import ContextVar
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM, GenerationMixin, PretrainedConfig, PreTrainedModel
from transformers.generation import GenerationMode
from transformers.modeling_outputs import CausalLMOutputWithPast

from halobench.errors import UserError
from halobench.mixers import MIXERS
from halobench.mixers.cache import FIRST_ROOM, HybridCache
from halobench.mixers.contract import Mixer, MixerContext, build_mixer
from halobench.mixers.forms import used
from halobench.progress import say
from halobench.surgery import heads
from halobench.surgery.anatomy import decoder_layers, honour_caps, read_attention, source_windows
from halobench.surgery.batch import BatchFacts, carried, read_batch
from halobench.surgery.plan import KEEP, SurgeryPlan

# Fields of the source's config that transformers, generate() and lm-eval look up on the model's own.
DELEGATED = (
    "vocab_size",
    "hidden_size",
    "intermediate_size",
    "num_hidden_layers",
    "num_attention_heads",
    "num_key_value_heads",
    "head_dim",
    "max_position_embeddings",
    "initializer_range",
    "tie_word_embeddings",
)
TOKEN_IDS = ("bos_token_id", "eos_token_id", "pad_token_id")
STEPPED = (GenerationMode.GREEDY_SEARCH, GenerationMode.SAMPLE)  # what the decode engine can be of use to
_ENGINES: ContextVar[list[Any] | None] = ContextVar("engines of the generate() that runs", default=None)


class HybridConfig(PretrainedConfig):
    """All that is needed to rebuild a hybrid: the source decoder's config and the plan.

    Args:
        source: the source's config as a dict, with its model_type.
        plan: SurgeryPlan.to_dict().
    """

    model_type = "halobench_hybrid"
    source: dict[str, Any] | None = None
    plan: dict[str, Any] | None = None

    def __post_init__(self, **kwargs: Any) -> None:
        source = AutoConfig.for_model(**self.source).get_text_config(decoder=True) if self.source else None
        for name in DELEGATED:
            kwargs.pop(name, None)
            if hasattr(source, name):  # under the source's own name for it, such as n_layer
                setattr(self, name, getattr(source, name))
        for name in TOKEN_IDS:
            setattr(self, name, kwargs.pop(name, getattr(source, name, None)))
        super().__post_init__(**kwargs)

    @classmethod
    def of(cls, source: PretrainedConfig, plan: SurgeryPlan) -> HybridConfig:
        """The config of a hybrid of `source`, with its choice of attention kernel."""
        config = cls(source=_plain(source), plan=plan.to_dict(), architectures=["HybridForCausalLM"])
        config._attn_implementation = source._attn_implementation
        return config

    def take_source(self, source: PretrainedConfig) -> None:
        """Takes over what the source's config says now."""
        self.source = _plain(source)
        text = source.get_text_config(decoder=True)
        for name in DELEGATED:
            if hasattr(text, name):
                setattr(self, name, getattr(text, name))

    def source_config(self) -> PretrainedConfig:
        """The source's config as its own class."""
        if not self.source or not self.plan:
            raise UserError("a hybrid's config needs 'source' and 'plan'; it may not have been written by halobench")
        return AutoConfig.for_model(**self.source)

    def surgery_plan(self) -> SurgeryPlan:
        """The plan as an object."""
        return SurgeryPlan.from_dict(self.plan)


def _plain(source: PretrainedConfig) -> dict[str, Any]:
    """A config as data; the dtype is the student's own affair."""
    return {key: value for key, value in source.to_dict().items() if key not in ("dtype", "torch_dtype")}


class MixerAdapter(nn.Module):
    """A mixer behind the call of a Hugging Face attention module."""

    def __init__(self, mixer: Mixer) -> None:
        super().__init__()
        self.mixer = mixer

    def forward(
        self,
        hidden_states: Tensor,
        position_embeddings: tuple[Tensor, Tensor] | None = None,
        attention_mask: Tensor | None = None,
        past_key_values: HybridCache | None = None,
        layer_past: HybridCache | None = None,
        position_ids: Tensor | None = None,
        mixer_context: MixerContext | None = None,
        **kwargs: Any,
    ) -> tuple[Tensor, None]:
        if mixer_context is None:
            mixer_context = carried(position_ids)
        if mixer_context is None:
            raise UserError(
                "a mixer was not told of its batch: call the HybridForCausalLM and not the decoder inside it; if that "
                "was called, this family hands nothing on to its attention and cannot be operated on"
            )
        # The cache comes from the layer's own argument: gradient checkpointing takes it away there.
        context = replace(mixer_context, cache=past_key_values if layer_past is None else layer_past)
        return self.mixer(hidden_states, position_embeddings=position_embeddings, context=context), None


class HybridForCausalLM(PreTrainedModel, GenerationMixin):
    """A decoder with some token mixers replaced.

    Args:
        config: source and plan.
        backbone: a decoder of the source's class to take over; built from the config by default.
        mixers: mixers for layers of the plan, by layer index; the rest are built from the backbone's attention.
    """

    config_class = HybridConfig
    config: HybridConfig
    base_model_prefix = "backbone"
    supports_gradient_checkpointing = True
    _supports_sdpa = True
    _supports_flash_attn = True
    _skip_keys_device_placement = ["past_key_values"]

    def __init__(
        self, config: HybridConfig, backbone: PreTrainedModel | None = None, mixers: Mapping[int, Mixer] | None = None
    ) -> None:
        asked = config._attn_implementation  # for a kernel by the user; what this class would choose means nothing
        super().__init__(config)
        if backbone is None:
            source = config.source_config()
            source._attn_implementation = asked
            backbone = honour_caps(AutoModelForCausalLM.from_config(source, dtype=torch.get_default_dtype()))
            config._attn_implementation = backbone.config._attn_implementation
        self.backbone = backbone
        self._replace_attention(config.surgery_plan(), mixers or {})
        self.post_init()

    def _replace_attention(self, plan: SurgeryPlan, mixers: Mapping[int, Mixer]) -> None:
        self._layers = decoder_layers(self.backbone)  # a tuple, so that nothing is registered twice
        layers, name = self._layers
        plan.validate(len(layers))
        wanted = [index for index, layer in enumerate(plan.layers) if layer.mixer != KEEP]
        missing = [index for index in wanted if index not in mixers]
        views = read_attention(self.backbone) if missing else []
        for index in wanted:
            layer = plan.layers[index]
            mixer = mixers[index] if index in mixers else build_mixer(
                MIXERS.get(layer.mixer), views[index], layer.options
            )  # fmt: skip
            setattr(layers[index], name, MixerAdapter(mixer))

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        past_key_values: HybridCache | None = None,
        inputs_embeds: Tensor | None = None,
        labels: Tensor | None = None,
        use_cache: bool | None = None,
        logits_to_keep: int | Tensor = 0,
        **kwargs: Any,
    ) -> CausalLMOutputWithPast:
        """As any causal model of transformers; (B, T) ids to (B, T, vocabulary) logits.

        Args:
            attention_mask: (B, past + T), zeros at padding, which may stand on either side.
            position_ids: by default counted over real tokens.
            past_key_values: a cache from `new_cache()`, continued and updated.
            use_cache: make a cache and return it; by default only when one is given, for it costs memory.
        """
        engine = getattr(past_key_values, "engine", None)
        if engine is not None and engine.model is self:
            more = labels is not None or inputs_embeds is not None or isinstance(logits_to_keep, Tensor)
            more = more or any(x is not None and x is not (name == "return_dict") for name, x in kwargs.items())
            if not more and engine.continues(input_ids, attention_mask, position_ids):
                logits_BV = self._stepped(engine, input_ids)
                if logits_BV is not None:
                    return CausalLMOutputWithPast(logits=logits_BV[:, None], past_key_values=past_key_values)
        if kwargs.get("pixel_values") is not None and self.mixer_modules():
            raise UserError("pixel_values were given; a hybrid reads text alone, for its mixers know no images")
        batch = self._read(input_ids, inputs_embeds, attention_mask, position_ids, past_key_values, use_cache)
        return self.backbone(labels=labels, logits_to_keep=logits_to_keep, **batch, **kwargs)

    def final_hidden(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        past_key_values: HybridCache | None = None,
    ) -> Tensor:
        """Hidden states after the last norm, (B, T, D): what `unembed` turns into logits."""
        batch = self._read(input_ids, None, attention_mask, position_ids, past_key_values, None)
        return self.backbone.get_decoder()(**batch).last_hidden_state

    def unembed(self, hidden: Tensor) -> Tensor:
        """Logits of final hidden states, (..., D) to (..., vocabulary)."""
        return heads.unembed(self.backbone, hidden)

    def _read(
        self,
        input_ids: Tensor | None,
        inputs_embeds: Tensor | None,
        attention_mask: Tensor | None,
        position_ids: Tensor | None,
        cache: HybridCache | None,
        use_cache: bool | None,
    ) -> dict[str, Any]:
        """The arguments of the backbone's decoder for one call."""
        inputs = input_ids if input_ids is not None else inputs_embeds
        if inputs is None:
            raise UserError("give input_ids or inputs_embeds")
        if cache is None and use_cache:
            cache = self.new_cache()
        if isinstance(cache, HybridCache):
            cache.unpin()
        facts = BatchFacts(
            batch=inputs.shape[0], tokens=inputs.shape[1], device=inputs.device,
            attention_mask=attention_mask, position_ids=position_ids, cache=cache,
        )  # fmt: skip
        kept, mixed = self._kinds()
        return {
            "input_ids": input_ids,
            "inputs_embeds": inputs_embeds,
            "past_key_values": cache,
            "use_cache": cache is not None,
            **read_batch(facts, kept=kept, mixed=mixed),
        }

    def _kinds(self) -> tuple[bool, bool]:
        """Whether any layer has the source's own attention, and whether any has a mixer."""
        layers, name = self._layers
        adapted = [isinstance(getattr(layer, name), MixerAdapter) for layer in layers]
        return not all(adapted), any(adapted)

    def mixer_modules(self) -> dict[int, Mixer]:
        """The mixers in place, by layer; layers with the source's own attention are not among them."""
        layers, name = self._layers
        modules = ((index, getattr(layer, name)) for index, layer in enumerate(layers))
        return {index: module.mixer for index, module in modules if isinstance(module, MixerAdapter)}

    def set_logits_scale(self, base: float | None) -> None:
        """Sets `a` of s_t = log(t + a) / log(a) in every softmax mixer, here and in the config; None is no scaling."""
        for mixer in self.mixer_modules().values():
            if mixer.name == "softmax":
                mixer.set_options(logits_scale_base=base)
        plan = self.config.surgery_plan().to_dict()
        for layer in plan["layers"]:
            if layer["mixer"] == "softmax":
                layer["options"]["logits_scale_base"] = base
        self.config.plan = plan

    def new_cache(self, room: int = FIRST_ROOM) -> HybridCache:
        """An empty cache for this model; see HybridCache."""
        mixed = self.mixer_modules()
        windows = [None if i in mixed else window for i, window in enumerate(source_windows(self.backbone))]
        return HybridCache(len(windows), room, windows=windows)

    def _stepped(self, engine: Any, ids_B1: Tensor | None) -> Tensor | None:
        """The engine's logits (B, vocabulary) behind a token; None, said aloud, where it gives the model up."""
        from halobench.surgery.engine import NotTakenOverError

        try:
            return engine.step(ids_B1, heard=True).clone()
        except NotTakenOverError as error:
            engine.cache.engine = None
            say(f"generate() goes on without the decode engine: {error}")
            return None

    def generate(self, *args: Any, **kwargs: Any) -> Any:
        """As of any causal model of transformers; single tokens are the decode engine's, where it can run."""
        engines: list[Any] = []
        outer = _ENGINES.set(engines)
        try:
            return super().generate(*args, **kwargs)  # type: ignore[misc]
        finally:
            _ENGINES.reset(outer)
            for engine in engines:  # the cache may live on, and be continued with other weights
                engine.cache.engine = None
                engine.release()

    def _prepare_cache_for_generation(  # type: ignore[override]
        self, generation_config: Any, model_kwargs: dict[str, Any], mode: Any, batch: int, max_cache_length: int
    ) -> None:
        """generate()'s own choice of cache would know nothing of recurrent states."""
        if model_kwargs.get("past_key_values") is None and generation_config.use_cache is not False:
            if generation_config.cache_implementation not in (None, "dynamic"):
                raise UserError(
                    f"cache_implementation {generation_config.cache_implementation!r} cannot hold recurrent states; "
                    "leave it unset"
                )
            model_kwargs["past_key_values"] = self._cache_to_decode_with(generation_config, mode, max_cache_length)

    def _cache_to_decode_with(self, generation_config: Any, mode: Any, room: int) -> HybridCache:
        """An empty cache; while generate() runs the decode engine takes its single tokens, if it has what is asked."""
        from halobench.surgery.engine import DecodeEngine, refusal

        wants_more = generation_config.output_attentions or generation_config.output_hidden_states
        engines = _ENGINES.get()
        if engines is None or mode not in STEPPED or wants_more or refusal(self) is not None:
            return self.new_cache(room=room)
        engine = DecodeEngine(self, room=room)
        engines.append(engine)
        engine.cache.engine = engine
        return engine.cache

    def prepare_inputs_for_generation(self, *args: Any, **kwargs: Any) -> Any:
        """As the source does it: some families (Phi-3 with LongRoPE) begin a cache anew past a length."""
        source: Any = self.backbone
        if type(source).prepare_inputs_for_generation is GenerationMixin.prepare_inputs_for_generation:
            return super().prepare_inputs_for_generation(*args, **kwargs)  # type: ignore[misc]
        return source.prepare_inputs_for_generation(*args, **kwargs)

    def get_decoder(self) -> nn.Module:
        return self.backbone.get_decoder()

    def get_input_embeddings(self) -> nn.Module:
        return self.backbone.get_input_embeddings()

    def set_input_embeddings(self, value: nn.Module) -> None:
        self.backbone.set_input_embeddings(value)

    def get_output_embeddings(self) -> nn.Module:
        return self.backbone.get_output_embeddings()

    def set_output_embeddings(self, new_embeddings: nn.Module) -> None:
        self.backbone.set_output_embeddings(new_embeddings)

    def resize_token_embeddings(self, *args: Any, **kwargs: Any) -> Any:
        """As any model of transformers; the source's config goes along."""
        embeddings: Any = self.backbone.resize_token_embeddings(*args, **kwargs)
        self.config.take_source(self.backbone.config)
        return embeddings

    def save_pretrained(self, *args: Any, **kwargs: Any) -> Any:
        """As any model of transformers, with the source's config as it is now."""
        self.config.take_source(self.backbone.config)
        return super().save_pretrained(*args, **kwargs)


def backends_of(model: Any) -> dict[str, str]:
    """The form each kind of mixer ran in at its last call, such as "torch", "fla" or "sdpa"; no entry before it."""
    return used(model) if isinstance(model, HybridForCausalLM) else {}


AutoConfig.register(HybridConfig.model_type, HybridConfig, exist_ok=True)
AutoModelForCausalLM.register(HybridConfig, HybridForCausalLM, exist_ok=True)
