"""The workbench of a conversion: measures the untrained student of any set of kept layers, for searching selectors."""

from __future__ import annotations

import copy
import hashlib
import json
from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from halobench.errors import UserError
from halobench.evidence import carrier, identity
from halobench.files import read_json, write_json
from halobench.probes import layout, make_probe
from halobench.surgery.anatomy import decoder_layers
from halobench.surgery.selection.contract import Measured
from halobench.surgery.selection.replay import Tape
from halobench.surgery.selection.sweep import (
    Place,
    State,
    Unit,
    Values,
    checked,
    cut,
    extend,
    sweep_folder,
    weights_hash,
)
from halobench.surgery.transplant import build_mixers, swapped

if TYPE_CHECKING:
    from halobench.mixers.contract import Mixer
    from halobench.pipeline import Conversion
    from halobench.surgery.planted import Mixture

TAPE_BYTES = 2**30  # hidden states of at most this size are kept from one set of layers to the next
KEPT = "attention"


@dataclass
class _Table:
    """A task laid out: its units, and the hidden states of the last student that read them.

    tapes: None where they would take too much. bytes: what they take. student: the names of what stood in each layer of
    that student; empty while there is none.
    """

    places: list[Place]
    units: list[Unit]
    tapes: list[Tape] | None
    bytes: int
    student: list[str] = field(default_factory=list)


class Bench:
    """See Workbench.

    It has a folder of its own in `folder`, named by all that decides what it finds. A result is a file in its
    `measured`, so an interrupted search repeats nothing. Students that agree below some layer share the hidden states
    below it, as candidates of a greedy search do.
    """

    def __init__(self, conversion: Conversion, folder: Path) -> None:
        self.conversion = conversion
        self.layers, self.device, self.seed = conversion.layers, conversion.device, conversion.recipe.seed
        self.prompt, self.hype = conversion.recipe.selection.length, conversion.recipe.hype
        self.teacher: Any = conversion.teacher
        self.mixers: dict[int, Mixer] = {i: m.requires_grad_(False) for i, m in conversion.mixers().items()}
        self.folder = sweep_folder(folder, "workbench", identity(conversion, self.mixers))
        self._foreign: dict[int, tuple[Mixer, list[int], str]] = {}
        self._tables: dict[tuple[str, int | None, int | None], _Table] = {}

    def measure(
        self,
        kept: Sequence[int],
        task: str,
        *,
        length: int | None = None,
        samples: int | None = None,
        hype: bool = False,
        mixers: dict[int, Mixer] | None = None,
    ) -> Measured:
        """See Workbench. Tokens are those the student reads; that the teacher reads a text once is not among them."""
        beyond = [layer for layer in kept if not 0 <= layer < self.layers]
        if beyond:
            raise UserError(f"layers {beyond} are to be kept; the model's layers are 0 to {self.layers - 1}")
        tokens, count = layout(self.conversion, task, length, samples)
        chosen = self._student(frozenset(kept), mixers or {}, self._scale(tokens), hype)
        names = [name for name, _ in chosen]
        key = {"task": task, "length": tokens, "samples": count, "student": names}
        digest = hashlib.sha256(json.dumps(key, sort_keys=True).encode()).hexdigest()[:16]
        path = self.folder / "measured" / f"{digest}.json"
        if not path.exists():
            values, read = self._run(self._table(task, tokens, count), chosen)
            write_json(path, {"kept": sorted(kept), "hype": hype, **key, "values": values, "tokens": read})
        found = read_json(path)
        return Measured(found["values"], found["tokens"])

    def data(self, planted: float) -> Mixture:
        """See Workbench."""
        return self.conversion.data(replace(self.conversion.recipe.distil, planted=planted))

    def training_mixers(self) -> dict[int, Mixer]:
        """See Workbench."""
        return {i: copy.deepcopy(m).float().train().requires_grad_(True) for i, m in self.mixers.items()}

    @cached_property
    def carrier(self) -> Any:
        """The hybrid whose layers are changed."""
        return carrier(self.conversion)

    @cached_property
    def _names(self) -> dict[int, str]:
        return {i: weights_hash({i: mixer}) for i, mixer in self.mixers.items()}

    @cached_property
    def _without_positions(self) -> dict[int, tuple[str, Mixer]]:
        """Each layer's attention as the conversion keeps it, with its hash."""
        with torch.random.fork_rng():
            torch.manual_seed(self.seed)  # of gates that start at random
            built = build_mixers(self.teacher, "softmax", {**self.conversion.recipe.softmax_options, "rope": False})
        return {i: (weights_hash({i: mixer}), mixer.eval().requires_grad_(False)) for i, mixer in built.items()}

    def _scale(self, length: int | None) -> float | None:
        """a of the scaling of queries without positions, beyond the lengths that distillation will train."""
        recipe = self.conversion.recipe
        if recipe.scale is None or length is None or length <= max(recipe.distil.lengths):
            return None
        return recipe.scale.candidates[len(recipe.scale.candidates) // 2]

    def _student(
        self, kept: frozenset[int], mixers: dict[int, Mixer], scale: float | None, hype: bool
    ) -> list[tuple[str, Mixer | None]]:
        """What stands in each layer, and a name that says all of it; None is the teacher's own attention."""
        chosen: list[tuple[str, Mixer | None]] = []
        for layer in range(self.layers):
            if layer in kept and hype:
                name, mixer = self._without_positions[layer]
                mixer.set_options(logits_scale_base=scale)
                chosen.append((f"{name} {scale}", mixer))
            elif layer in kept:
                chosen.append((KEPT, None))
            elif layer in mixers:
                chosen.append((self._name(layer, mixers[layer]), self._fitting(mixers[layer])))
            else:
                chosen.append((self._names[layer], self.mixers[layer]))
        return chosen

    def _name(self, layer: int, mixer: Mixer) -> str:
        """The hash of a mixer that is not the workbench's own, remembered until the mixer is another or is changed."""
        versions = [tensor._version for tensor in (*mixer.parameters(), *mixer.buffers())]
        known = self._foreign.get(layer)
        if known is None or known[0] is not mixer or known[1] != versions:
            self._foreign[layer] = known = (mixer, versions, weights_hash({layer: mixer}))
        return known[2]

    def _fitting(self, mixer: Mixer) -> Mixer:
        """The mixer in the carrier's dtype; what trains does so in fp32."""
        dtype = self.carrier.dtype
        return mixer if next(mixer.parameters()).dtype == dtype else copy.deepcopy(mixer).to(dtype)

    def _table(self, task: str, length: int | None, samples: int) -> _Table:
        key = (task, length, samples)
        if key not in self._tables:
            probe = make_probe(self.conversion, task, length, samples)
            places = list(cut(probe, self.conversion.recipe.selection.unit_tokens))
            units = [probe.unit(place.first, place.stop) for place in places]
            weight = self.carrier.get_input_embeddings().weight
            size = sum(probe.sizes) * self.layers * weight.shape[1] * weight.element_size()
            taken = sum(table.bytes for table in self._tables.values())
            fits = taken + size <= TAPE_BYTES
            layers = decoder_layers(self.carrier.backbone)[0]
            tapes = [Tape(layers) for _ in places] if fits else None
            self._tables[key] = _Table(places, units, tapes, size if fits else 0)
        return self._tables[key]

    def _run(self, table: _Table, chosen: list[tuple[str, Mixer | None]]) -> tuple[Values, int]:
        """The student's values on every sample of a task, and the tokens that it read."""
        names = [name for name, _ in chosen]
        before, table.student = table.student, []  # until all is measured, the tapes belong to no one student
        shared = [mine == theirs for mine, theirs in zip(names, before, strict=False)]
        first = next((layer for layer, same in enumerate(shared) if not same), self.layers - 1)
        values: Values = {}
        with swapped(self.carrier, {layer: mixer for layer, (_, mixer) in enumerate(chosen)}):
            for index, (place, unit) in enumerate(zip(table.places, table.units, strict=True)):
                with _tape(table, index, first if before else None):
                    extend(values, checked(place.probe.name, unit, self.carrier, State("set")))
        table.student = names if table.tapes is not None else []
        return values, sum(place.tokens for place in table.places)


def _tape(table: _Table, index: int, first: int | None) -> AbstractContextManager[None]:
    """How a unit is run: with what the last student left below layer `first`, or (None) wholly."""
    if table.tapes is None:
        return nullcontext()
    tape = table.tapes[index]
    return tape.recording() if first is None else tape.replaying(first, record=True)
