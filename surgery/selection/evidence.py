"""What layer selection is decided on: scores of the teacher with one layer changed, per layer and per sample.

The file form is that of published sweeps: `original` and `replaced` scores by task and metric. Ours adds `samples`, so
that every score has an uncertainty, the all-linear student with one layer `restored`, and held-out `text`: the KL to
the teacher, the error of the layer's mixer (`hidden_error`) and how far its attention is local (`local_attention`).
"""

from __future__ import annotations

import math
from collections.abc import Collection
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Literal

import numpy as np

from halobench.config import to_dict
from halobench.errors import UserError, some
from halobench.files import write_json

Scores = dict[str, dict[str, float]]
Samples = dict[str, dict[str, list[float]]]
Part = Literal["replaced", "restored", "redistilled"]
TEXT = ["text"]  # the task of held-out text


@dataclass(frozen=True, kw_only=True)
class Changed:
    """Scores with one layer changed; `samples` are independent units (haystacks, items), alike for every layer."""

    layer: int
    scores: Scores
    samples: Samples | None = None


@dataclass(frozen=True, kw_only=True)
class Evidence:
    """A sweep over layers. `recall_metric` None: each recall task has one metric, whatever its name.

    original: the teacher. replaced: the teacher with one layer replaced by its aligned mixer. linear: the student with
    every layer replaced. restored: that student with softmax given back in one layer. redistilled: the same, after
    training it by KL. costs, seconds: by part ("replaced", "restored", "redistilled") and task, base models included.
    layer_forwards: token-layers computed ("run"), and what one model after another would have taken ("one_by_one").
    """

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
    linear: Scores = field(default_factory=dict)
    linear_samples: Samples | None = None
    restored: list[Changed] = field(default_factory=list)
    redistilled: list[Changed] = field(default_factory=list)
    costs: dict[str, dict[str, int]] = field(default_factory=dict)
    seconds: dict[str, dict[str, float]] = field(default_factory=dict)
    layer_forwards: dict[str, int] = field(default_factory=dict)
    released_attention_layers: list[int] | None = None
    source: str = ""

    def __post_init__(self) -> None:
        for part in ("replaced", "restored", "redistilled"):
            if getattr(self, part):
                self._check_layers(part, getattr(self, part))

    def _check_layers(self, part: str, entries: list[Changed]) -> None:
        layers = [entry.layer for entry in entries]
        if len(layers) == self.num_layers and sorted(layers) == list(range(self.num_layers)):
            return
        missing = [str(layer) for layer in range(min(self.num_layers, 10**4)) if layer not in set(layers)]
        raise UserError(
            f"the {part} scores must hold each of {self.num_layers} layers once; got {len(layers)} entries, "
            + (f"missing layers [{some(missing)}]" if missing else "some of them repeated or out of range")
        )

    @cached_property
    def recall(self) -> np.ndarray:
        """R_i, mean over the recall tasks with layer i replaced; (layers,)."""
        return self.scores("replaced", self.recall_tasks, self.recall_metric)

    @cached_property
    def csr(self) -> np.ndarray:
        """C_i, mean over the commonsense tasks with layer i replaced; (layers,)."""
        return self.scores("replaced", self.csr_tasks, self.csr_metric)

    @cached_property
    def teacher_recall(self) -> float:
        """R of the untouched teacher."""
        return self.base("replaced", self.recall_tasks, self.recall_metric)

    def base(self, part: Part, tasks: list[str], metric: str | None) -> float:
        """The mean over `tasks` of the model that layers were changed in: the teacher, or the all-linear student."""
        if part == "replaced":
            return self._mean(self.original, tasks, metric, "the original")
        return self._mean(self.linear, tasks, metric, "the all-linear student (`linear`)")

    def scores(self, part: Part, tasks: list[str], metric: str | None) -> np.ndarray:
        """Mean over `tasks` of `metric` with layer i changed, one entry a layer; an error names what is missing."""
        return np.array([self._mean(e.scores, tasks, metric, f"layer {e.layer}") for e in self._entries(part)])

    def _entries(self, part: Part) -> list[Changed]:
        entries: list[Changed] = getattr(self, part)
        if not entries:
            raise UserError(
                f"these scores hold no {part} layers; the sweep of a run with an aligned checkpoint measures them"
            )
        return sorted(entries, key=lambda entry: entry.layer)

    def _mean(self, scores: Scores, tasks: list[str], metric: str | None, where: str) -> float:
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

    def resamples(
        self, part: Part, tasks: list[str], metric: str | None, count: int, seed: int = 0
    ) -> tuple[np.ndarray, np.ndarray] | None:
        """Bootstrap over samples of `scores`: ((count, layers), the same of the base model (count,)), or None.

        The same samples are drawn for every layer, since every layer saw the same questions; and for every metric of a
        task, given the same seed. The base is the teacher, or the all-linear student of restored layers.
        """
        base = self.original_samples if part == "replaced" else self.linear_samples
        entries = self._entries(part)
        means = []
        for place, task in enumerate(tasks):
            name = metric if metric is not None else next(iter(entries[0].scores[task]))
            rows = [((entry.samples or {}).get(task) or {}).get(name) or [] for entry in entries]
            start = ((base or {}).get(task) or {}).get(name) or [0.0] * len(rows[0])
            if not rows[0] or any(len(row) != len(rows[0]) for row in (start, *rows)):
                return None
            size = len(rows[0])
            picks = np.random.default_rng((seed, place)).integers(size, size=(count, size))
            times = np.stack([np.bincount(pick, minlength=size) for pick in picks])  # each sample was drawn
            means.append(np.array([start, *rows], dtype=float) @ times.T / size)
        mean = np.mean(means, axis=0)
        return mean[1:].T, mean[0]

    def spent(self, needs: Collection[str], tokens: int) -> float:
        """Seconds that `tokens` of what was measured for these needs took, at the mean speed of those measurements."""
        replaced = {"recall": self.recall_tasks, "csr": self.csr_tasks, "text": TEXT}
        read = [("replaced", task) for need in replaced if need in needs for task in replaced[need]]
        read += [(part, task) for part in ("restored", "redistilled") if part in needs for task in TEXT]
        total = sum(self.cost(part, [task]) for part, task in read)
        taken = sum(self.seconds.get(part, {}).get(task, 0.0) for part, task in read)
        return taken * min(1.0, tokens / total) if total else 0.0

    def cost(self, part: str, tasks: list[str]) -> int:
        """Tokens spent on `tasks` in one part of the evidence; 0 for scores that do not say."""
        return sum(self.costs.get(part, {}).get(task, 0) for task in tasks)

    def save(self, path: Path) -> None:
        """Writes the evidence in the file form described above."""
        write_json(path, to_dict(self))
