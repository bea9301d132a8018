"""Which layer gets which mixer, with which options: validated, printable, saved with the model."""

from __future__ import annotations

from dataclasses import dataclass, field
from numbers import Integral
from typing import Any, Literal

from halobench.config import from_dict, to_dict
from halobench.errors import UserError
from halobench.mixers import MIXERS

KEEP = "keep"  # the teacher's attention, untouched
ATTENTION = (KEEP, "softmax")  # the names of plans whose layers hold a key/value cache


@dataclass(frozen=True, kw_only=True)
class LayerPlan:
    """One layer: a mixer's name ("keep" leaves the teacher's attention untouched) and its options."""

    mixer: str
    options: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True, kw_only=True)
class SurgeryPlan:
    """A mixer for every layer, first layer first. Options are completed with the mixer's defaults, and checked."""

    layers: tuple[LayerPlan, ...]

    def __post_init__(self) -> None:
        if not self.layers:
            raise UserError("a plan needs at least one layer")
        object.__setattr__(self, "layers", tuple(_checked(layer, index) for index, layer in enumerate(self.layers)))

    @classmethod
    def for_model(
        cls,
        model_or_config: Any,
        mixer: str = "lightning",
        keep: Literal["all"] | int | float | list[int] = "all",
        hype: bool = True,
        mixer_options: dict[str, Any] | None = None,
        softmax_options: dict[str, Any] | None = None,
    ) -> SurgeryPlan:
        """A plan with `mixer` everywhere except in the layers kept.

        Args:
            model_or_config: a decoder, or its config.
            keep: "all" changes nothing; an int keeps that many layers, a float in [0, 1] that share (rounded down),
                evenly spaced with the last layer among them; a list names the layers (from 0).
            hype: the layers kept become softmax layers with HyPE (no RoPE, output gate); False leaves them untouched.
            mixer_options, softmax_options: options of the replaced and of the kept layers.
        """
        config = getattr(model_or_config, "config", model_or_config)
        layers = config.get_text_config(decoder=True).num_hidden_layers
        if isinstance(keep, str) and keep == "all":
            return cls(layers=(LayerPlan(mixer=KEEP),) * layers)
        if softmax_options and not hype:
            raise UserError("softmax_options need hype=True; with hype=False the layers kept are left untouched")
        kept = set(kept_layers(keep, layers))
        softmax = LayerPlan(mixer="softmax", options=softmax_options or {}) if hype else LayerPlan(mixer=KEEP)
        replaced = LayerPlan(mixer=mixer, options=mixer_options or {})
        return cls(layers=tuple(softmax if index in kept else replaced for index in range(layers)))

    def with_layer(self, index: int, mixer: str, **options: Any) -> SurgeryPlan:
        """The same plan but for one layer, which becomes `mixer` with these options."""
        if not 0 <= index < len(self.layers):
            raise UserError(f"the plan has no layer {index}; its layers are 0 to {len(self.layers) - 1}")
        layer = LayerPlan(mixer=mixer, options=options)
        return SurgeryPlan(layers=(*self.layers[:index], layer, *self.layers[index + 1 :]))

    @property
    def kept(self) -> tuple[int, ...]:
        """Indices of the layers that stay attention, "softmax" and "keep" alike."""
        return tuple(index for index, layer in enumerate(self.layers) if layer.mixer in ATTENTION)

    @property
    def changes_nothing(self) -> bool:
        """Whether every layer keeps the teacher's attention untouched."""
        return all(layer.mixer == KEEP for layer in self.layers)

    def to_dict(self) -> dict[str, Any]:
        """Plain data, fit for JSON."""
        return to_dict(self)

    @classmethod
    def from_dict(cls, data: Any) -> SurgeryPlan:
        """The plan that `to_dict` gave."""
        return from_dict(cls, data, "plan")

    def describe(self) -> str:
        """One line: the mixers, most used first, with their layers."""
        places: dict[str, list[int]] = {}
        for index, layer in enumerate(self.layers):
            places.setdefault(layer.mixer, []).append(index)
        ordered = sorted(places.items(), key=lambda item: -len(item[1]))
        parts = [f"{len(indices)} {name} ({_ranges(indices)})" for name, indices in ordered]
        return f"{len(self.layers)} layers: " + ", ".join(parts)

    def validate(self, layers: int) -> None:
        """Raises UserError unless the plan is for a model of `layers` layers."""
        if len(self.layers) != layers:
            raise UserError(f"the plan is for {len(self.layers)} layers, the model has {layers}; make a plan for it")


def kept_layers(keep: int | float | list[int], layers: int) -> list[int]:
    """The layer indices that `keep` means in a model of `layers` layers, ascending."""
    if isinstance(keep, list | tuple):
        named = [int(index) if isinstance(index, Integral) and not isinstance(index, bool) else index for index in keep]
        for index in named:
            if not isinstance(index, int) or isinstance(index, bool) or not 0 <= index < layers:
                raise UserError(f"keep names layer {index!r}; the model's layers are 0 to {layers - 1}")
        repeated = sorted({index for index in named if named.count(index) > 1})
        if repeated:
            raise UserError(f"keep names layers {repeated} more than once; name each layer once")
        return sorted(named)
    if isinstance(keep, bool) or not isinstance(keep, int | float):
        raise UserError(f"keep must be 'all', a number, a share or a list of layers, got {keep!r}")
    if isinstance(keep, float) and not 0 <= keep <= 1:
        raise UserError(f"keep={keep} is not a share between 0 and 1; write a whole number to keep that many layers")
    count = int(keep * layers + 1e-9) if isinstance(keep, float) else keep  # 0.29 of 100 is 29
    if not 0 <= count <= layers:
        raise UserError(f"keep={keep} layers of {layers}; keep between 0 and {layers}")
    return [(index + 1) * layers // count - 1 for index in range(count)]


def _checked(layer: LayerPlan, index: int) -> LayerPlan:
    """The layer's plan with its options completed."""
    if layer.mixer == KEEP:
        if layer.options:
            raise UserError(f"layer {index} is kept untouched and takes no options, got {', '.join(layer.options)}")
        return layer
    mixer = MIXERS.get(layer.mixer)
    options: Any = from_dict(mixer.Options, layer.options, f"options of mixer {layer.mixer!r}")
    return LayerPlan(mixer=layer.mixer, options=to_dict(options))


def _ranges(indices: list[int]) -> str:
    """[0, 1, 2, 5] -> "0-2 5"."""
    runs: list[list[int]] = []
    for index in indices:
        if runs and index == runs[-1][-1] + 1:
            runs[-1].append(index)
        else:
            runs.append([index])
    return " ".join(str(run[0]) if len(run) == 1 else f"{run[0]}-{run[-1]}" for run in runs)
