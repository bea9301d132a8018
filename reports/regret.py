"""What an oracle record says of selectors: how much each lost against the best set of layers, and how sure that is.

Values come from the judges' seeds alone, except the mean over all sets (a random choice), which seed 0 measured.
A resample draws haystacks anew, the same for every set, and adds each set's training noise: an error of Student's form
with the spread between seeds, pooled over the judged sets, over the root of the number of seeds.
"""

from __future__ import annotations

import zlib
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np

from halobench.errors import HalobenchError
from halobench.records import RunRecord
from halobench.reports.table import clean

RESAMPLES = 4000
Set = tuple[int, ...]


@dataclass(frozen=True)
class Goal:
    """One number that a conversion is judged by: which metrics are averaged, and whether more is better."""

    name: str
    title: str
    unit: str
    suite: str
    metric: str
    sign: int
    task: str | None = None

    def samples(self, metrics: Sequence[dict[str, Any]]) -> list[np.ndarray] | None:
        """Samples of each length, more being better; None when the conversion has none."""
        found = [
            self.sign * np.array(m["samples"] or [m["value"]], dtype=float)
            for m in metrics
            if m["suite"] == self.suite and m["metric"] == self.metric and self.task in (None, m["task"])
        ]
        return found or None


RECALL = Goal("recall", "answer log-likelihood", "nats an answer, mean over lengths", "niah", "answer_logprob", 1)
ACCURACY = Goal("accuracy", "needles found", "share, mean over lengths", "niah", "accuracy", 1)
TEXT = Goal("text", "held-out text", "bits per byte", "ppl", "bits_per_byte", -1, "modern")
GOALS = (RECALL, ACCURACY, TEXT)


@dataclass(frozen=True)
class Regret:
    """What a choice lost: value (about 0 for the best, or below by what is luck of its lead), and its 95% interval.

    best: share of resamples in which no judged set is better.
    """

    value: float
    low: float
    high: float
    best: float


class Oracle:
    """The study of one teacher, read from its record, for one goal."""

    def __init__(self, record: RunRecord, goal: Goal, resamples: int = RESAMPLES) -> None:
        found = record.details.get("oracle")
        if record.kind != "oracle" or not isinstance(found, dict):
            raise HalobenchError(f"the record of {clean(record.model.name)} is no oracle's; run `halobench oracle`")
        self.record, self.goal, self.resamples = record, goal, resamples
        self.teacher = record.model.name
        self.layers, self.keep = int(found["layers"]), int(found["keep"])
        self.methods: dict[str, dict[str, Any]] = found["methods"]
        self.agreement = found["agreement"]
        cells = found["cells"]
        self.failed = [c for c in cells if "error" in c]
        self._cells = {(tuple(c["kept"]), int(c["seed"])): c["metrics"] for c in cells if "error" not in c}

    def chosen(self, method: str) -> Set | None:
        """The set a selector chose; None for one that this study did not ask."""
        return tuple(self.methods[method]["layers"]) if method in self.methods else None

    @cached_property
    def screened(self) -> dict[Set, float]:
        """The value of every set with seed 0."""
        return {kept: _mean(s) for (kept, seed), m in self._cells.items() if seed == 0 and (s := self.goal.samples(m))}

    @cached_property
    def judged(self) -> dict[Set, list[list[np.ndarray]]]:
        """Of each set that was judged, the samples of each judge's seed; HalobenchError when there is none yet."""
        found: dict[Set, list[list[np.ndarray]]] = {}
        for (kept, seed), metrics in sorted(self._cells.items(), key=lambda item: item[0]):
            samples = self.goal.samples(metrics)
            if seed > 0 and samples is not None:
                found.setdefault(kept, []).append(samples)
        if not found:
            raise HalobenchError(f"no set of {clean(self.teacher)} has been judged yet; let the oracle finish")
        return found

    def values(self, kept: Set) -> list[float]:
        """The value with each judge's seed."""
        return [_mean(samples) for samples in self.judged[kept]]

    @cached_property
    def noise(self) -> float:
        """Standard deviation between seeds of one set, pooled over the judged sets; in the goal's unit."""
        spreads = [np.var(self.values(kept), ddof=1) for kept, runs in self.judged.items() if len(runs) > 1]
        if not spreads:
            raise HalobenchError(
                f"every set of {clean(self.teacher)} was judged by one seed, so the noise of training is not known; "
                "use --judges 2 or more"
            )
        return float(np.sqrt(np.mean(spreads)))

    @cached_property
    def best(self) -> Set:
        """The judged set with the highest mean."""
        return max(self.judged, key=lambda kept: float(np.mean(self.values(kept))))

    @cached_property
    def luck(self) -> float:
        """By how much the highest mean is too high: the highest of several noisy means owes part of its lead to luck.

        Over resamples, the mean of how far the set that comes first there lies above its own mean, more than all do.
        """
        drawn = np.stack(list(self.drawn.values()))
        means = np.array([np.mean(self.values(kept)) for kept in self.drawn])
        raised = (drawn - means[:, None]).mean(0)  # easy haystacks are easy for all sets
        return float((drawn.max(0) - means[drawn.argmax(0)] - raised).mean())

    @cached_property
    def top(self) -> float:
        """What the best set is worth: the highest mean, less its luck."""
        return float(np.mean(self.values(self.best))) - self.luck

    @cached_property
    def chance(self) -> float:
        """The mean value over all sets: what a random choice gives."""
        return float(np.mean(list(self.screened.values())))

    @cached_property
    def drawn(self) -> dict[Set, np.ndarray]:
        """Resampled values of the judged sets, (resamples,) each, all from the same haystacks."""
        rng = np.random.default_rng(0)  # of the haystacks, which all teachers share
        own = np.random.default_rng([1, zlib.crc32(f"{self.teacher} {self.record.model.hash}".encode())])
        freedom = sum(len(runs) - 1 for runs in self.judged.values())  # the spread is an estimate as well
        spread = self.noise * np.sqrt(freedom / own.chisquare(freedom, self.resamples)) if freedom else 0.0
        first = next(iter(self.judged.values()))[0]
        picks = [rng.integers(len(part), size=(self.resamples, len(part))) for part in first]
        drawn = {}
        for kept, runs in self.judged.items():
            strata = [np.mean([run[i] for run in runs], axis=0) for i in range(len(first))]
            means = np.mean([part[pick].mean(-1) for part, pick in zip(strata, picks, strict=True)], axis=0)
            drawn[kept] = means + spread * own.normal(size=self.resamples) / np.sqrt(len(runs))
        return drawn

    def regret(self, kept: Set) -> Regret:
        """What keeping `kept` lost against `top`."""
        everything = np.stack(list(self.drawn.values()))
        low, high = (float(x) for x in np.quantile(self.lost(kept), [0.025, 0.975]))
        return Regret(
            self.top - float(np.mean(self.values(kept))), low, high,
            float((self.drawn[kept] >= everything.max(0)).mean()),
        )  # fmt: skip

    def lost(self, kept: Set) -> np.ndarray:
        """Resampled regret, (resamples,): against the set that is best there, less luck (the data's and the draw's)."""
        first = np.stack(list(self.drawn.values())).max(0)
        return first - 2 * self.luck - self.drawn[kept]

    def screening_agrees(self) -> float:
        """Correlation over the judged sets between seed 0 and the mean of the judges."""
        both = [kept for kept in self.judged if kept in self.screened]
        if len(both) < 3:
            return float("nan")
        pair = np.corrcoef([self.screened[k] for k in both], [np.mean(self.values(k)) for k in both])
        return float(pair[0, 1])


def _mean(samples: Sequence[np.ndarray]) -> float:
    """Mean over lengths of the mean over samples."""
    return float(np.mean([part.mean() for part in samples]))
