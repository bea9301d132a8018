"""The sweep over layers, in one process and without writing a model: replace one layer, or restore one, and measure.

One carrier model holds the teacher's weights; aligned mixers are put into its layers and taken out again.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor

from halobench.files import read_json, write_json
from halobench.kernels.chunked_loss import forward_kl
from halobench.mixers.contract import Mixer
from halobench.progress import Progress
from halobench.surgery.heads import final_hidden, unembed
from halobench.surgery.planted import Mixture
from halobench.surgery.selection.evidence import Changed, Restored, Samples, Scores
from halobench.surgery.transplant import swapped


@dataclass(frozen=True)
class Measured:
    """What a probe found: per metric the values of independent samples, and the tokens it took."""

    samples: dict[str, list[float]]
    tokens: int


class Probe(Protocol):
    """A task cut down to what the sweep needs. The same samples every time it is asked."""

    name: str

    def measure(self, model: Any) -> Measured:
        """Scores `model`."""
        ...


def measure_replacements(
    carrier: Any, mixers: dict[int, Mixer], probes: list[Probe], folder: Path, layers: list[int | None]
) -> None:
    """Measures the teacher (None) or the teacher with one layer replaced, for each of `layers`, into `folder`.

    What is there already is not measured again: an interrupted sweep goes on where it stopped, and several processes
    can take layers each.
    """
    folder.mkdir(parents=True, exist_ok=True)
    missing = [layer for layer in layers if not _measured_file(folder, layer).exists()]
    with Progress("sweep", len(missing), unit="models", every=10.0) as progress:
        for layer in missing:
            with swapped(carrier, {} if layer is None else {layer: mixers[layer]}):
                measured = {probe.name: probe.measure(carrier) for probe in probes}
            write_json(_measured_file(folder, layer), {name: vars(entry) for name, entry in measured.items()})
            progress.advance(1, _brief("teacher" if layer is None else f"layer {layer}", measured))


def collect_replacements(folder: Path, layers: int) -> tuple[Scores, Samples, list[Changed], int]:
    """(scores of the teacher, its samples, one entry per layer, tokens processed) of a finished sweep."""
    found = [
        {name: Measured(**entry) for name, entry in read_json(_measured_file(folder, layer)).items()}
        for layer in [None, *range(layers)]
    ]
    tokens = sum(entry.tokens for measured in found for entry in measured.values())
    entries = [Changed(layer=i, scores=_means(m), samples=_samples(m)) for i, m in enumerate(found[1:])]
    return _means(found[0]), _samples(found[0]), entries, tokens


def _measured_file(folder: Path, layer: int | None) -> Path:
    return folder / ("teacher.json" if layer is None else f"layer-{layer}.json")


def _means(measured: dict[str, Measured]) -> Scores:
    return {name: {m: float(np.mean(v)) for m, v in entry.samples.items()} for name, entry in measured.items()}


def _samples(measured: dict[str, Measured]) -> Samples:
    return {name: entry.samples for name, entry in measured.items()}


def _brief(what: str, measured: dict[str, Measured]) -> str:
    firsts = [(name, *next(iter(entry.samples.items()))) for name, entry in measured.items()]
    return f"{what}: " + ", ".join(f"{name} {metric} {np.mean(values):.3f}" for name, metric, values in firsts)


@torch.inference_mode()
def sequence_kl(student: Any, targets: list[tuple[Tensor, Tensor]], teacher: Any, chunk: int = 1024) -> list[float]:
    """KL(teacher || student) in nats per token of each sequence; `targets`: (tokens (1, T), teacher hidden (T, D))."""
    values = []
    for tokens, target in targets:
        hidden = final_hidden(student, tokens).flatten(0, 1)
        ones = torch.ones(len(hidden), device=hidden.device)
        total = 0.0
        for start in range(0, len(hidden), chunk):
            part = slice(start, start + chunk)
            total += float(forward_kl(unembed(student, hidden[part]), unembed(teacher, target[part]), ones[part]))
        values.append(total / len(hidden))
    return values


def sweep_restorations(
    teacher: Any,
    layers: list[int],
    restored: Callable[[int], AbstractContextManager[Any]],
    data: Mixture,
    *,
    sequences: int,
    length: int,
    first: int,
) -> tuple[list[Restored], int]:
    """KL to the teacher of the all-linear student with softmax given back in one layer at a time.

    Args:
        restored: gives, for a layer, the student with softmax there: swapped in place, or re-distilled.
        first: place in the data stream of the sequences that KL is measured on.

    Returns:
        (one entry per layer, tokens processed in measuring)
    """
    device = next(teacher.parameters()).device
    targets = []
    with torch.inference_mode():
        for index in range(sequences):
            tokens = torch.from_numpy(data.sequence(first + index, length).tokens)[None].to(device)
            targets.append((tokens, final_hidden(teacher, tokens).flatten(0, 1)))
    rows = []
    with Progress("restore", len(layers), unit="models", every=10.0) as progress:
        for layer in layers:
            with restored(layer) as student:
                values = sequence_kl(student, targets, teacher)
            kl, stderr = float(np.mean(values)), float(np.std(values, ddof=1) / np.sqrt(len(values)))
            rows.append(Restored(layer=layer, kl=kl, stderr=stderr))
            progress.advance(1, f"layer {layer}: KL {kl:.3f} ±{stderr:.3f}")
    return rows, sequences * length * (len(layers) + 1)
