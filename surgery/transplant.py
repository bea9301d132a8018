"""The operation itself: a teacher and a plan make a student that shares no memory with the teacher."""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from transformers import MODEL_FOR_CAUSAL_LM_MAPPING, PreTrainedModel
from transformers.initialization import no_init_weights

from halobench.config import to_dict
from halobench.errors import UserError
from halobench.mixers import MIXERS
from halobench.mixers.contract import Mixer, build_mixer
from halobench.surgery.anatomy import attention_modules, decoder_layers, read_attention
from halobench.surgery.hybrid import HybridConfig, HybridForCausalLM, MixerAdapter
from halobench.surgery.plan import KEEP, SurgeryPlan


def transplant(
    teacher: PreTrainedModel, plan: SurgeryPlan, mixers: Mapping[int, Mixer] | None = None
) -> HybridForCausalLM:
    """A student after `plan`; the teacher is left as it is, and nothing is shared with it.

    Args:
        teacher: a decoder, or a hybrid whose plan changes nothing.
        mixers: aligned mixers by layer, copied in place of fresh ones. Each must be of the kind the plan has there;
            mixers of layers that the plan gives another kind are not used.

    New random weights come from torch's global generator: seed it for a student that can be made again.
    """
    source = _source(teacher)
    _check_class(source)
    layers = len(plan.layers)
    plan.validate(len(decoder_layers(source)[0]))
    given = mixers or {}
    _check_fit(given, source, layers)
    usable = {index: mixer for index, mixer in given.items() if mixer.name == plan.layers[index].mixer}
    for index, mixer in usable.items():
        if to_dict(mixer.options) != plan.layers[index].options:
            raise UserError(
                f"the mixer given for layer {index} has options {to_dict(mixer.options)}, "
                f"the plan has {plan.layers[index].options}; make the plan with the mixer's options"
            )
    wanted = [index for index, layer in enumerate(plan.layers) if layer.mixer != KEEP]
    fresh = [index for index in wanted if index not in usable]
    chosen = {index: copy.deepcopy(mixer) for index, mixer in usable.items()}
    if fresh:
        views = read_attention(source)
        for index in fresh:
            layer = plan.layers[index]
            chosen[index] = build_mixer(MIXERS.get(layer.mixer), views[index], layer.options)
    # Attention that is replaced is never copied: deepcopy takes the adapters for copies made already.
    originals = attention_modules(source)
    backbone = copy.deepcopy(source, {id(originals[index]): MixerAdapter(mixer) for index, mixer in chosen.items()})
    with no_init_weights():  # all weights are there already
        student = HybridForCausalLM(HybridConfig.of(source.config, plan), backbone=backbone, mixers=chosen)
    if source.generation_config is not None:
        student.generation_config = copy.deepcopy(source.generation_config)
    student.config.dtype = source.dtype
    return student.train(teacher.training)


def build_mixers(
    teacher: PreTrainedModel, plan_or_mixer: SurgeryPlan | str, options: dict[str, Any] | None = None
) -> dict[int, Mixer]:
    """Fresh mixers by layer: one kind for every layer, or for each layer of a plan that is not kept untouched.

    Args:
        plan_or_mixer: a plan, or the name of a mixer for all layers.
        options: the mixer's options; only with a name, for a plan has its own.
    """
    source = _source(teacher)
    views = read_attention(source)
    if isinstance(plan_or_mixer, str):
        mixer = MIXERS.get(plan_or_mixer)
        return {view.layer_index: build_mixer(mixer, view, options) for view in views}
    if options is not None:
        raise UserError("options are the plan's own; give them with a mixer's name only")
    plan_or_mixer.validate(len(views))
    layers = zip(views, plan_or_mixer.layers, strict=True)
    return {
        view.layer_index: build_mixer(MIXERS.get(layer.mixer), view, layer.options)
        for view, layer in layers
        if layer.mixer != KEEP
    }


@contextmanager
def swapped(model: HybridForCausalLM, mixers: Mapping[int, Mixer | None]) -> Iterator[HybridForCausalLM]:
    """Puts other mixers into layers of `model` for the length of a block, in place and without copies.

    Args:
        mixers: by layer; None leaves the layer as it is. They should be on the model's device and of its dtype.
    """
    layers, name = decoder_layers(model.backbone)
    _check_fit({index: mixer for index, mixer in mixers.items() if mixer is not None}, model.backbone, len(layers))
    originals = {index: getattr(layers[index], name) for index, mixer in mixers.items() if mixer is not None}
    modes = {index: mixer.training for index, mixer in mixers.items() if mixer is not None}
    try:
        for index, mixer in mixers.items():
            if mixer is not None:
                setattr(layers[index], name, MixerAdapter(mixer).train(model.training))
        yield model
    finally:
        for index, original in originals.items():
            getattr(layers[index], name).train(modes[index])
            setattr(layers[index], name, original)


def _check_fit(mixers: Mapping[int, Mixer], source: PreTrainedModel, layers: int) -> None:
    """Mixers must be for layers there are, each for its own: a mixer writes the cache of the layer it was made for."""
    beyond = [index for index in mixers if not 0 <= index < layers]
    if beyond:
        raise UserError(f"mixers are given for layers {beyond}; the model's layers are 0 to {layers - 1}")
    width = source.config.get_text_config(decoder=True).hidden_size
    for index, mixer in mixers.items():
        if mixer.layer_index != index:
            raise UserError(f"the mixer given for layer {index} was made for layer {mixer.layer_index}; make it anew")
        size = getattr(mixer, "hidden_size", width)
        if size != width:
            raise UserError(f"the mixer given for layer {index} takes {size} features, the model has {width}")


def _check_class(source: PreTrainedModel) -> None:
    """A student is built again from its source's config, by AutoModelForCausalLM: refuses what that would not build."""
    built: Any = MODEL_FOR_CAUSAL_LM_MAPPING.get(type(source.config), ())
    classes = built if isinstance(built, tuple) else (built,)
    if type(source) not in classes:
        names = ", ".join(known.__name__ for known in classes) or "nothing"
        raise UserError(
            f"the teacher is a {type(source).__name__}, but AutoModelForCausalLM builds {names} from its config: a "
            "saved student could not be loaded; load the teacher with AutoModelForCausalLM"
        )


def _source(teacher: PreTrainedModel) -> PreTrainedModel:
    """The plain decoder of a teacher; a hybrid that still is its source counts as one."""
    if not isinstance(teacher, HybridForCausalLM):
        return teacher
    if teacher.mixer_modules():
        raise UserError("the teacher is a hybrid already; operate on the model it was made from")
    return teacher.backbone
