"""The least a model must hold, read and compute at a context and batch, and how long a machine takes for it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from halobench.costs import CACHE_BYTES, DecoderCosts, MixerCosts, attention_costs, backbone_of, mixer_costs
from halobench.tasks.profile import ProfileRow, Theory

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from halobench.mixers.contract import Mixer
    from halobench.mixers.view import AttentionView
    from halobench.tasks.machine import Machine


@dataclass(frozen=True, kw_only=True, eq=False)
class Sizes:
    """A model by its shapes, at its own dtype.

    costs: with caches in that dtype. softmax: the layers that hold keys and values of the whole context. weight_bytes:
    of all parameters. number_bytes: of one number. width: numbers that the widest step of a layer holds for each token.
    vocabulary: logits of a position.
    """

    costs: DecoderCosts
    softmax: tuple[int, ...]
    weight_bytes: int
    number_bytes: int
    width: int
    vocabulary: int

    def cache(self, context: int, batch: int = 1) -> int:
        """Bytes of keys, values and states after `context` tokens."""
        return batch * self.costs.cache(context)


def sizes_of(model: PreTrainedModel) -> Sizes:
    """Reads the shapes; UserError for a family whose attention cannot be read."""
    from halobench.surgery.anatomy import empty_model, read_attention
    from halobench.surgery.hybrid import HybridForCausalLM

    hybrid = model if isinstance(model, HybridForCausalLM) else None
    source = empty_model(model.config if hybrid is None else hybrid.config.source_config())
    views = read_attention(source)
    mixers = {} if hybrid is None else hybrid.mixer_modules()
    number = model.dtype.itemsize
    layers = [
        _mixer_costs(mixers[index], number) if index in mixers else _attention_costs(view, number)
        for index, view in enumerate(views)
    ]
    text = source.config.get_text_config(decoder=True)
    heads = max(2 * (view.num_heads + view.num_kv_heads) * view.head_dim for view in views)
    return Sizes(
        costs=DecoderCosts(backbone=backbone_of(source, views), layers=layers),
        softmax=tuple(range(len(views))) if hybrid is None else hybrid.config.surgery_plan().kept,
        weight_bytes=sum(parameter.nbytes for parameter in model.parameters()),
        number_bytes=number,
        width=2 * text.hidden_size + max(heads, 3 * (getattr(text, "intermediate_size", None) or 4 * text.hidden_size)),
        vocabulary=text.vocab_size,
    )


def _mixer_costs(mixer: Mixer, number: int) -> MixerCosts:
    return replace(mixer_costs(mixer), cache=lambda length: mixer.state_bytes(1, length, number))


def _attention_costs(view: AttentionView, number: int) -> MixerCosts:
    costs = attention_costs(view)
    in_bf16: Callable[[int], int] = costs.cache
    return replace(costs, cache=lambda length: in_bf16(length) * number // CACHE_BYTES)


def theory_of(sizes: Sizes, machine: Machine, context: int, batch: int, chunk: int) -> Theory:
    """See `Theory`. Of experts only those that one token visits are counted as read."""
    others = [index for index in range(len(sizes.costs.layers)) if index not in sizes.softmax]
    keys = batch * sizes.costs.cache(context, sizes.softmax)
    states = batch * sizes.costs.cache(context, others)
    activations = batch * (min(chunk, context) * sizes.width + sizes.vocabulary) * sizes.number_bytes
    weights_read = sizes.costs.active * sizes.number_bytes
    operations = batch * sizes.costs.prompt(context)
    return Theory(
        weight_bytes=sizes.weight_bytes,
        kv_bytes=keys,
        state_bytes=states,
        activation_bytes=activations,
        peak_bytes=sizes.weight_bytes + keys + states + activations,
        read_bytes=weights_read + keys + states,
        prompt_flops=operations,
        tpot_floor_ms=1000 * (weights_read + keys + states) / machine.bytes_per_s,
        ttft_floor_s=max(operations / machine.flops_per_s, weights_read / machine.bytes_per_s),
    )


def with_theory(row: ProfileRow, theory: Theory) -> ProfileRow:
    """The row with its floors beside its times."""
    return replace(
        row,
        theory=theory,
        tpot_over_floor=None if row.tpot_ms is None else row.tpot_ms / theory.tpot_floor_ms,
        ttft_over_floor=None if row.ttft_s is None else row.ttft_s / theory.ttft_floor_s,
    )
