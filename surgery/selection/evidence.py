"""What layer selection is decided on: scores of the teacher with one layer changed, per layer and per sample.

The file form is that of published sweeps: `original` and `replaced` scores by task and metric. Ours adds `samples`, so
that every score has an uncertainty, and `restored` (KL of the all-linear student with one layer given back).
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path

import numpy as np

from halobench.config import from_dict, to_dict
from halobench.errors import UserError
from halobench.files import read_json, write_json

Scores = dict[str, dict[str, float]]
Samples = dict[str, dict[str, list[float]]]


@dataclass(frozen=True, kw_only=True)
class Changed:
    """Scores with one layer changed; `samples` are independent units (haystacks, items), alike for every layer."""

    layer: int
    scores: Scores
    samples: Samples | None = None


@dataclass(frozen=True, kw_only=True)
class Restored:
    """KL to the teacher (nats per token) of the all-linear student with softmax restored in one layer."""

    layer: int
    kl: float
    stderr: float | None = None


@dataclass(frozen=True, kw_only=True)
class Evidence:
    """A sweep over layers. `recall_metric` None: each recall task has one metric, whatever its name."""

    teacher: str
    mixer: str
    num_layers: int
    csr_metric: str
    csr_tasks: list[str]
    recall_tasks: list[str]
    original: Scores
    replaced: list[Changed]
    recall_metric: str | None = None
    original_samples: Samples | None = None
    restored: list[Restored] = field(default_factory=list)
    tokens: int = 0
    restored_tokens: int = 0
    released_attention_layers: list[int] | None = None
    source: str = ""

    def __post_init__(self) -> None:
        layers = [entry.layer for entry in self.replaced]
        if sorted(layers) != list(range(self.num_layers)):
            missing = sorted(set(range(self.num_layers)) - set(layers))
            raise UserError(
                f"the scores must hold each of {self.num_layers} layers once; got {len(layers)} entries"
                + (f", missing layers {missing}" if missing else ", some of them repeated or out of range")
            )

    @cached_property
    def recall(self) -> np.ndarray:
        """R_i, mean over the recall tasks with layer i replaced; (layers,)."""
        return np.array([self._mean(e.scores, self.recall_tasks, self.recall_metric, e.layer) for e in self._ordered])

    @cached_property
    def csr(self) -> np.ndarray:
        """C_i, mean over the commonsense tasks with layer i replaced; (layers,)."""
        return np.array([self._mean(e.scores, self.csr_tasks, self.csr_metric, e.layer) for e in self._ordered])

    @cached_property
    def teacher_recall(self) -> float:
        """R of the untouched teacher."""
        return self._mean(self.original, self.recall_tasks, self.recall_metric, None)

    @property
    def _ordered(self) -> list[Changed]:
        return sorted(self.replaced, key=lambda entry: entry.layer)

    def _mean(self, scores: Scores, tasks: list[str], metric: str | None, layer: int | None) -> float:
        where = "the original" if layer is None else f"layer {layer}"
        values = []
        for task in tasks:
            if task not in scores:
                raise UserError(f"the scores of {where} lack the task {task!r}")
            found = scores[task]
            if metric is None and len(found) != 1:
                raise UserError(f"{where}, task {task!r}: {len(found)} metrics and no `recall_metric` to choose one")
            name = metric if metric is not None else next(iter(found))
            if name not in found:
                raise UserError(f"{where}, task {task!r} lacks the metric {name!r} (it has {', '.join(found)})")
            if not math.isfinite(found[name]):
                raise UserError(f"{where}, task {task!r}: {name} is {found[name]}, not a number one can rank by")
            values.append(found[name])
        return float(np.mean(values))

    def resamples(self, count: int, seed: int = 0) -> tuple[np.ndarray, np.ndarray, np.ndarray] | None:
        """Bootstrap over samples: (recall (count, layers), csr (count, layers), teacher recall (count,)), or None.

        The same samples are drawn for every layer, since every layer saw the same questions.
        """
        if self.original_samples is None or any(e.samples is None for e in self.replaced):
            return None
        rng = np.random.default_rng(seed)
        entries = [e.samples for e in self._ordered if e.samples is not None]

        def draw(tasks: list[str], metric: str | None) -> tuple[np.ndarray, np.ndarray]:
            per_task = []
            for task in tasks:
                name = metric if metric is not None else next(iter(entries[0][task]))
                rows = np.array([[*(self.original_samples or {})[task][name]], *(s[task][name] for s in entries)])
                picks = rng.integers(rows.shape[1], size=(count, rows.shape[1]))
                per_task.append(rows[:, picks].mean(-1))
            mean = np.mean(per_task, axis=0)
            return mean[1:].T, mean[0]

        recall, teacher = draw(self.recall_tasks, self.recall_metric)
        csr, _ = draw(self.csr_tasks, self.csr_metric)
        return recall, csr, teacher

    def restored_kl(self) -> tuple[np.ndarray, np.ndarray | None]:
        """(KL per restored layer (layers,), its standard error or None); an error when they were not measured."""
        found = {entry.layer: entry for entry in self.restored}
        if sorted(found) != list(range(self.num_layers)):
            raise UserError("these scores hold no KL of restored layers; kl-ls needs a run with an aligned checkpoint")
        rows = [found[layer] for layer in range(self.num_layers)]
        errors = [row.stderr for row in rows]
        known = None if any(e is None for e in errors) else np.array(errors, dtype=float)
        return np.array([row.kl for row in rows]), known

    def save(self, path: Path) -> None:
        """Writes the evidence in the file form described above."""
        write_json(path, to_dict(self))


def read_evidence(path: Path) -> Evidence:
    """The evidence in a scores file; wrong or missing fields are named."""
    if not path.exists():
        raise UserError(f"scores file {path} does not exist")
    return from_dict(Evidence, read_json(path), str(path))
