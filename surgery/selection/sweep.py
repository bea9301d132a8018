"""The sweep over layers, in one process or several and without writing a model: change one layer, and measure.

One carrier holds the teacher's weights; aligned mixers are put into its layers and taken out again. A model with one
layer changed is its base model below that layer, so the base's hidden states are kept and the layers below are not
computed again: with L layers (L + 3) / (2 (L + 1)) of the work of one model after another.

The work is cut into units, a few samples of one task each, so that the hidden states of one unit are all that is kept.
A finished unit is a file: an interrupted sweep goes on where it stopped, and processes take units each.
"""

from __future__ import annotations

import hashlib
import json
import time
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, Protocol

import numpy as np
import torch

from halobench.errors import HalobenchError, UserError, is_out_of_memory
from halobench.files import read_json, write_json
from halobench.mixers.contract import Mixer
from halobench.progress import Progress, say
from halobench.surgery.anatomy import decoder_layers
from halobench.surgery.selection.evidence import Changed, Samples, Scores
from halobench.surgery.selection.replay import Meter, Tape
from halobench.surgery.transplant import swapped

Kind = Literal["original", "replaced", "linear", "restored", "redistilled", "set"]
SweptPart = Literal["replaced", "restored"]
Values = dict[str, list[float]]  # of one task: by metric, one value a sample
_SHOWN = {
    "original": "the teacher",
    "replaced": "the teacher with layer {} replaced",
    "linear": "the student with every layer replaced",
    "restored": "the student with softmax in layer {} alone",
    "redistilled": "the re-distilled student with softmax in layer {} alone",
    "set": "the student",
}


@dataclass(frozen=True)
class State:
    """Which model is being measured; `layer` where one layer sets it apart."""

    kind: Kind
    layer: int | None = None

    def __str__(self) -> str:
        return _SHOWN[self.kind].format(self.layer)


class Unit(Protocol):
    """A few samples of a task."""

    def measure(self, model: Any, state: State) -> Values:
        """One value a sample, by metric.

        The forward calls depend on the samples alone, never on the model. Where there is padding they give
        `position_ids`: left to itself, a model counts it as its source did unless it has a mixer.
        """
        ...


class Probe(Protocol):
    """A task cut down to what the sweep needs. The same samples every time it is made.

    Attributes:
        sizes: tokens that a model reads for each sample.
        compares: a unit must see the teacher ("original") before any other model.
    """

    name: str
    sizes: list[int]
    compares: bool

    def unit(self, first: int, stop: int) -> Unit:
        """The samples from `first` up to `stop`."""
        ...


@dataclass(frozen=True)
class Place:
    """Where a unit stands: samples `first` to `stop` of a probe."""

    probe: Probe
    first: int
    stop: int

    @property
    def tokens(self) -> int:
        """Read by one model."""
        return sum(self.probe.sizes[self.first : self.stop])


def cut(probe: Probe, unit_tokens: int) -> Iterator[Place]:
    """The units of a probe: as many samples as `unit_tokens` hold, one at least."""
    first, held = 0, 0
    for index, size in enumerate(probe.sizes):
        if index > first and held + size > unit_tokens:
            yield Place(probe, first, index)
            first, held = index, 0
        held += size
    if first < len(probe.sizes):
        yield Place(probe, first, len(probe.sizes))


def sweep_folder(parent: Path, kind: str, identity: dict[str, Any]) -> Path:
    """The folder in `parent` of the sweep that `identity` (plain data) decides; another identity has another folder.

    Two sweeps are never mixed: after a new alignment, or with other settings, all is measured anew.
    """
    digest = hashlib.sha256(json.dumps(identity, sort_keys=True).encode()).hexdigest()[:12]
    folder = parent / f"{kind}-{digest}"
    if not (folder / "identity.json").exists():
        write_json(folder / "identity.json", identity)
    return folder


def weights_hash(modules: dict[int, Mixer]) -> str:
    """One hash over the weights and options of mixers, by layer."""
    digest = hashlib.sha256()
    for layer, module in sorted(modules.items()):
        digest.update(f"{layer} {module.name} {module.options}".encode())
        for name, tensor in module.state_dict().items():
            digest.update(name.encode())
            digest.update(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()[:16]


@dataclass(frozen=True, kw_only=True)
class Found:
    """One part of a sweep, complete.

    tokens: by task, read by the base and all changed models; that the teacher reads a text too, for what others are
    compared to, is in the meter alone. seconds: by task, summed over processes.
    """

    base: Scores
    base_samples: Samples
    entries: list[Changed]
    tokens: dict[str, int]
    seconds: dict[str, float] = field(compare=False)
    meter: Meter


class Sweep:
    """Measures a model and the same with each layer changed.

    Args:
        carrier: a hybrid that changes nothing, in evaluation mode; back in that state after every unit.
        mixers: the aligned mixer of every layer, on the carrier's device and of its dtype.
        probes: the tasks of each part, of which `measure` does those it is asked for.
        folder: of this sweep alone; see `sweep_folder`.
        unit_tokens: tokens of a unit, of which every layer's hidden states are kept at a time.
    """

    def __init__(
        self,
        carrier: Any,
        mixers: dict[int, Mixer],
        probes: Mapping[SweptPart, Sequence[Probe]],
        folder: Path,
        unit_tokens: int,
    ) -> None:
        self.carrier, self.mixers, self.folder = carrier, mixers, folder
        self.layers = decoder_layers(carrier.backbone)[0]
        if sorted(mixers) != list(range(len(self.layers))):
            raise UserError(f"mixers are given for layers {sorted(mixers)}; a sweep needs one for each of the model's")
        self.places = {part: [p for probe in some for p in cut(probe, unit_tokens)] for part, some in probes.items()}
        self._fits: dict[str, int] = {}  # samples of a task that fit the memory, once more did not

    def measure(self, tasks: Mapping[SweptPart, Collection[str]], rank: int = 0, size: int = 1) -> None:
        """Measures what is missing of these tasks of each part, of every `size`-th unit from the `rank`-th on."""
        units = [(part, p) for part, names in tasks.items() for p in self.places[part] if p.probe.name in names]
        missing = [(part, place) for part, place in units[rank::size] if not self._file(part, place).exists()]
        models = len(self.layers) + 1
        total = sum(place.tokens * (models + _sees_teacher(part, place.probe)) for part, place in missing)
        with Progress("sweep", total, every=10.0, quiet=rank > 0) as progress:
            for part, place in missing:
                started = time.monotonic()
                rows, meter = self._fitting(part, place, progress)
                answer = {"rows": rows, "tokens": place.tokens * models, "meter": vars(meter)}
                answer["seconds"] = round(time.monotonic() - started, 3)
                write_json(self._file(part, place), answer)

    def collect(self, part: SweptPart) -> Found | None:
        """The tasks of a part whose units are all there, whenever they were measured; None when there are none."""
        lacking = {place.probe.name for place in self.places[part] if not self._file(part, place).exists()}
        complete = [place for place in self.places[part] if place.probe.name not in lacking]
        if not complete:
            return None
        rows: list[Samples] = [{} for _ in range(len(self.layers) + 1)]
        tokens: dict[str, int] = {}
        seconds: dict[str, float] = {}
        meter = Meter()
        for place in complete:
            found, task = read_json(self._file(part, place)), place.probe.name
            tokens[task] = tokens.get(task, 0) + found["tokens"]
            seconds[task] = seconds.get(task, 0.0) + found["seconds"]
            meter.run += found["meter"]["run"]
            meter.one_by_one += found["meter"]["one_by_one"]
            for row, values in zip(rows, found["rows"], strict=True):
                extend(row.setdefault(task, {}), values)
        entries = [Changed(layer=i, scores=means(row), samples=row) for i, row in enumerate(rows[1:])]
        return Found(
            base=means(rows[0]), base_samples=rows[0], entries=entries, tokens=tokens, seconds=seconds, meter=meter
        )

    def _file(self, part: SweptPart, place: Place) -> Path:
        return self.folder / part / f"{place.probe.name}-{place.first}-{place.stop}.json"

    def _fitting(self, part: SweptPart, place: Place, progress: Progress) -> tuple[list[Values], Meter]:
        """A unit's samples by model, base first; in smaller pieces when the memory does not hold it."""
        count, name = place.stop - place.first, place.probe.name
        if count <= self._fits.get(name, count):
            try:
                return self._once(part, place, progress)
            except Exception as error:
                if not is_out_of_memory(error):
                    raise
                if count == 1:
                    raise HalobenchError(
                        f"out of memory on one sample of {name} ({place.tokens} tokens); lower its length in the "
                        "recipe's selection, or use a machine with more memory"
                    ) from error
                reason = str(error).partition("\n")[0]
            if name not in self._fits:
                say(f"sweep: out of memory on {count} samples of {name} ({reason}); going on with fewer at a time")
            self._fits[name] = count // 2
            if torch.cuda.is_available():
                torch.cuda.empty_cache()
        rows: list[Values] = [{} for _ in range(len(self.layers) + 1)]
        meter = Meter()
        step = self._fits[name]
        for first in range(place.first, place.stop, step):
            piece = Place(place.probe, first, min(first + step, place.stop))
            found, taken = self._fitting(part, piece, progress)
            meter = Meter(meter.run + taken.run, meter.one_by_one + taken.one_by_one)
            for row, values in zip(rows, found, strict=True):
                extend(row, values)
        return rows, meter

    def _once(self, part: SweptPart, place: Place, progress: Progress) -> tuple[list[Values], Meter]:
        unit, tape = place.probe.unit(place.first, place.stop), Tape(self.layers)

        def row(state: State) -> Values:
            values = checked(place.probe.name, unit, self.carrier, state)
            progress.advance(place.tokens, f"{place.probe.name}, {state}")
            return values

        if _sees_teacher(part, place.probe):
            with tape.counting():
                row(State("original"))
        base = State("original") if part == "replaced" else State("linear")
        with swapped(self.carrier, {} if part == "replaced" else self.mixers), tape.recording():
            rows = [row(base)]
        for layer, mixer in self.mixers.items():
            others = {i: m for i, m in self.mixers.items() if i != layer}
            with swapped(self.carrier, {layer: mixer} if part == "replaced" else others), tape.replaying(layer):
                rows.append(row(State(part, layer)))
        return rows, tape.meter


def _sees_teacher(part: SweptPart, probe: Probe) -> bool:
    """Whether the teacher must read a unit beside the base and the changed models."""
    return part == "restored" and probe.compares


def checked(task: str, unit: Unit, model: Any, state: State) -> Values:
    """What `unit` measures; an error names the task and the model, and numbers that are none are one."""
    try:
        values = unit.measure(model, state)
    except UserError:
        raise
    except HalobenchError as error:
        raise HalobenchError(f"{task}, {state}: {error}") from error
    for metric, samples in values.items():
        if not np.isfinite(samples).all():
            raise HalobenchError(f"{task}, {state}: {metric} is not finite; the layer's mixer or its dtype is at fault")
    return values


def means(samples: Samples) -> Scores:
    """The scores of samples."""
    return {task: {m: float(np.mean(v)) for m, v in by_metric.items()} for task, by_metric in samples.items()}


def extend(row: Values, more: Values) -> None:
    """Puts further samples behind those of a row."""
    for metric, samples in more.items():
        row.setdefault(metric, []).extend(samples)
