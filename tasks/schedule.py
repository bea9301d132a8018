"""Running a sampled task at one length: in small groups, from where it was left, until the count or the precision.

Early stop is looked at after fixed numbers of samples (16, 24, 32, 48, ...), whatever was scored in one go, so the
samples that count do not depend on interruptions. Looking several times makes an interval a little optimistic: a run
that happens to look certain early stops there, and its 95% interval then holds the truth somewhat less often (in nine
of ten runs or more, see the tests). Wilson's floor keeps the first looks from being certain of anything, and every
record says which results were stopped by it.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

import numpy as np

from halobench.errors import HalobenchError, UserError
from halobench.progress import Progress, say
from halobench.records import Metric
from halobench.tasks.journal import Entry, Journal
from halobench.tasks.sampled import SampledTask, Scored
from halobench.tasks.statistics import half_width, mean_stderr
from halobench.units import format_length

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel

GROUP_TOKENS = 32_768  # of context scored in one go: enough to fill batches, little to lose
FIRST_LOOK = 16  # samples; fewer clusters say little about how they vary


@dataclass(frozen=True, kw_only=True)
class Reading:
    """What one task at one length was read from.

    samples: contexts; questions: about them. stopped: by the count asked for, or because the interval was narrow
    enough. tokens: read by the model for these samples; tokens_plain: what separate prompts would have taken.
    truncated: prompts that were not read whole. prompt_tokens: the longest prompt with its answer. seconds: spent on
    these samples, an interrupted run's included; peak_bytes: the highest memory use meanwhile, in the same way.
    """

    suite: str
    task: str
    length: int
    samples: int
    questions: int
    stopped: Literal["count", "precision"]
    tokens: int
    tokens_plain: int
    truncated: int
    prompt_tokens: int
    seconds: float
    peak_bytes: int


def check_precision(precision: float | None) -> None:
    """Refuses a half-width that no interval of a share can have."""
    if precision is not None and not 0 < precision < 0.5:
        raise UserError(
            f"precision {precision:g} is not the half-width of a 95% interval of a share; give one between 0 and 0.5, "
            "such as 0.05"
        )


def measure(
    task: SampledTask,
    model: PreTrainedModel,
    length: int,
    count: int,
    *,
    device: torch.device,
    precision: float | None = None,
    journal: Journal | None = None,
) -> tuple[list[Metric], Reading]:
    """Scores samples 0, 1, ... of `task` at `length` tokens.

    Args:
        count: samples at most.
        device: where the model runs, whose highest memory use is noted.
        precision: stop when the 95% interval of the headline metric (see `Scored`) is narrower than this to each side.
        journal: where finished samples are kept, and found when work is taken up again.

    Raises:
        HalobenchError: numbers that are not finite, naming the task and the length.
    """
    entries: dict[int, Entry] = {}
    if journal is not None:
        journal.mend()
        entries = journal.read()
    looks = [count] if precision is None else _looks(count)
    each = task.sample_tokens(length)
    known = sum(index in entries for index in range(count))
    if known:
        say(f"{task.name} {format_length(length)}: {known} samples done before, taken as they are")
    samples: list[Entry] = []
    with Progress(f"{task.name} {format_length(length)}", count * each, done=known * each) as progress:
        for look in looks:
            missing = [index for index in range(look) if index not in entries]
            for group in _groups(missing, length):
                for entry in _score(task, model, length, group, device):
                    entries[entry.index] = entry
                    if journal is not None:
                        journal.add(entry)
                progress.advance(len(group) * each)
            samples = [entries[index] for index in range(look)]
            value, width = _headline(samples)
            progress.note = f"{value:.0%}"
            if precision is not None and width < precision:
                progress.note += f" ±{width:.0%} after {look} samples"
                break
    return _metrics(task, length, samples), _reading(task, length, samples, count)


def _looks(count: int) -> list[int]:
    """16, 24, 32, 48, ... below `count`, and `count`."""
    looks, size = [], FIRST_LOOK
    while size < count:
        looks += [n for n in (size, size + size // 2) if n < count]
        size *= 2
    return [*looks, count]


def _groups(indices: Sequence[int], length: int) -> Iterator[Sequence[int]]:
    size = max(1, GROUP_TOKENS // length)
    return (indices[start : start + size] for start in range(0, len(indices), size))


def _score(
    task: SampledTask, model: PreTrainedModel, length: int, group: Sequence[int], device: torch.device
) -> list[Entry]:
    from halobench.tasks.memory import peak

    started = time.monotonic()
    where = f"{task.suite}/{task.name} at {length} tokens"
    try:
        scored = task.score(model, length, group)
    except UserError:
        raise
    except HalobenchError as error:
        raise HalobenchError(f"{where}: {error}") from error
    for sample in scored:
        for name, values in sample.values.items():
            if not np.isfinite(values).all():
                raise HalobenchError(f"{where}: {name} is not finite; the model's weights or its dtype are at fault")
    seconds = (time.monotonic() - started) / len(group)
    highest = peak(device)
    return [
        Entry(index=i, scored=s, seconds=round(seconds, 4), peak_bytes=highest)
        for i, s in zip(group, scored, strict=True)
    ]


def _by_question(samples: Sequence[Entry]) -> tuple[Mapping[str, list[float]], list[int]]:
    """Values of each metric over all questions, and the sample that each question belongs to."""
    values: dict[str, list[float]] = {}
    clusters: list[int] = []
    for entry in samples:
        for name, some in entry.scored.values.items():
            values.setdefault(name, []).extend(some)
        clusters += [entry.index] * len(_first(entry.scored))
    return values, clusters


def _first(scored: Scored) -> list[float]:
    return next(iter(scored.values.values()))


def _headline(samples: Sequence[Entry]) -> tuple[float, float]:
    """Mean of the headline metric and the half-width of its interval."""
    values, clusters = _by_question(samples)
    first = next(iter(values.values()))
    return float(np.mean(first)), half_width(first, clusters)


def _metrics(task: SampledTask, length: int, samples: Sequence[Entry]) -> list[Metric]:
    values, clusters = _by_question(samples)
    depths = [depth for entry in samples for depth in entry.scored.depths or []]
    metrics = []
    for name, some in values.items():
        value, stderr = mean_stderr(some, clusters)
        metrics.append(
            Metric(
                suite=task.suite, task=task.name, metric=name, value=value, stderr=stderr, n=len(some), length=length,
                samples=[round(v, 4) for v in some], clusters=clusters,
                depths=[round(depth, 4) for depth in depths] if len(depths) == len(some) else None,
            )
        )  # fmt: skip
    return metrics


def _reading(task: SampledTask, length: int, samples: Sequence[Entry], count: int) -> Reading:
    scored = [entry.scored for entry in samples]
    return Reading(
        suite=task.suite,
        task=task.name,
        length=length,
        samples=len(samples),
        questions=sum(len(_first(s)) for s in scored),
        stopped="count" if len(samples) == count else "precision",
        tokens=sum(s.tokens for s in scored),
        tokens_plain=sum(s.tokens_plain for s in scored),
        truncated=sum(s.truncated for s in scored),
        prompt_tokens=max(s.prompt_tokens for s in scored),
        seconds=round(sum(entry.seconds for entry in samples), 2),
        peak_bytes=max(entry.peak_bytes for entry in samples),
    )
