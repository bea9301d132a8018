"""What an evaluation will read and how long that will take on this machine: an estimate, made before it starts.

Tokens come from the tasks themselves. Seconds come from reading random tokens with the very model at a short and a
medium length: the time per token grows as a + b * length (b is what softmax layers cost), and so on to any length.
Answers that are said a token at a time are timed so, behind a short prompt, and the last token's share of b added.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import median
from typing import TYPE_CHECKING

from halobench.units import format_count, format_length, format_seconds

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel

SHORT, MEDIUM = 512, 4096  # tokens of the two probes
PROBE_SECONDS = 20.0  # the medium probe is made shorter when it would take longer
CHUNK = 4096
STEPS = 8  # tokens said one at a time


@dataclass(frozen=True, kw_only=True)
class Work:
    """Samples that a suite's task will read at a length, and their tokens; None where nothing is known beforehand.

    known: samples of them that were scored before and are not read again. answers: batches of answers that are said a
    token at a time; steps: those tokens, of a batch together.
    """

    suite: str
    task: str
    length: int | None
    samples: int | None
    tokens: int | None
    known: int = 0
    answers: int = 0
    steps: int = 0

    @property
    def share(self) -> float:
        """Of the work that is still to be done."""
        return 1 - self.known / self.samples if self.samples else 1.0

    @property
    def missing(self) -> int | None:
        """Tokens that are still to be read."""
        return 0 if self.share == 0 else None if self.tokens is None else round(self.tokens * self.share)

    @property
    def missing_steps(self) -> int:
        """Steps that are still to be taken."""
        return round(self.steps * self.share)

    @property
    def missing_answers(self) -> int:
        """Batches of answers that are still to be said."""
        return round(self.answers * self.share)


@dataclass(frozen=True, kw_only=True)
class Speed:
    """Seconds a token of a prompt of `length` tokens takes, on average over the prompt: base + slope * length.

    step: seconds that a token takes which is said, after a short prompt. Behind `length` tokens it takes what the last
    token of a prompt takes more than the first, 2 * slope * length, besides. begin: seconds that the first steps of a
    batch take more than later ones: the decode engine notes a step, or captures it, and tries it.
    """

    base: float
    slope: float
    step: float = 0.0
    begin: float = 0.0

    def seconds(self, tokens: int, length: int, steps: int = 0, answers: int = 0) -> float:
        """Of `tokens` in prompts of `length`, and `steps` behind them in so many batches of answers."""
        read, said = tokens * (self.base + self.slope * length), steps * (self.step + 2 * self.slope * length)
        return read + said + answers * self.begin


def measure_speed(
    model: PreTrainedModel, longest: int, device: str | torch.device | None = None, *, steps: bool = False
) -> Speed:
    """Times two prefills, neither longer than `longest`, and some steps if asked to; takes seconds."""
    short = min(SHORT, longest)
    _time_prefill(model, short, device)  # warms up
    first = _time_prefill(model, short, device)
    step, begin = _time_steps(model, short, device) if steps else (0.0, 0.0)
    medium = min(MEDIUM, longest)
    while medium > 2 * short and first * medium / short > PROBE_SECONDS:
        medium //= 2
    if medium < 2 * short:
        return Speed(base=first / short, slope=0.0, step=step, begin=begin)
    second = _time_prefill(model, medium, device)
    slope = max(0.0, (second / medium - first / short) / (medium - short))
    return Speed(base=max(0.0, second / medium - slope * medium), slope=slope, step=step, begin=begin)


def _time_prefill(model: PreTrainedModel, length: int, device: str | torch.device | None) -> float:
    from halobench.tasks.scoring import evaluating, prefill

    ids = _random_tokens(model, length, device)
    started = time.perf_counter()
    with evaluating(model):
        _, logits = prefill(model, ids, CHUNK)
        logits.sum().item()  # waits for a GPU
    return time.perf_counter() - started


def _time_steps(model: PreTrainedModel, length: int, device: str | torch.device | None) -> tuple[float, float]:
    """Seconds a token takes that is said, the last of `length` tokens, and what the first two take more together."""
    _time_answer(model, length, device)  # compiles what is to be compiled
    first, second, *later = _time_answer(model, length, device)
    step = median(later) if later else min(first, second)
    return step, max(0.0, first + second - 2 * step)


def _time_answer(model: PreTrainedModel, length: int, device: str | torch.device | None) -> list[float]:
    """Seconds of each of the last of `length` tokens, two or more, in steps."""
    from halobench.tasks.decoder import Decoder
    from halobench.tasks.scoring import evaluating

    behind, seconds = max(2, min(STEPS, length - 1)), []
    ids = _random_tokens(model, length + behind, device)[:, -max(length, behind + 1) :]
    with evaluating(model):
        decoder = Decoder(model, ids.shape[1])
        decoder.read(ids[:, :-behind], CHUNK).sum().item()
        for token in ids[:, -behind:].split(1, dim=1):
            started = time.perf_counter()
            decoder.step(token).argmax().item()  # waits for a GPU, as an answer does
            seconds.append(time.perf_counter() - started)
    return seconds


def _random_tokens(model: PreTrainedModel, length: int, device: str | torch.device | None) -> torch.Tensor:
    import torch

    vocabulary = model.config.get_text_config(decoder=True).vocab_size
    ids = torch.randint(vocabulary, (1, length), generator=torch.Generator().manual_seed(0))
    return ids.to(torch.device(device or model.device))


@dataclass(frozen=True, kw_only=True)
class Estimate:
    """The work of one model and its speed."""

    model: str
    work: list[Work]
    speed: Speed

    @property
    def tokens(self) -> int:
        """Tokens to read, as far as known."""
        return sum(w.missing or 0 for w in self.work)

    @property
    def seconds(self) -> float:
        """Time to take, as far as known."""
        return sum(self.seconds_of(w) for w in self.work)

    def seconds_of(self, work: Work) -> float:
        """Time for one piece of work."""
        return self.speed.seconds(work.missing or 0, work.length or SHORT, work.missing_steps, work.missing_answers)

    def lines(self) -> list[str]:
        """One line a suite and length, and the sum."""
        said = [f"estimate for {self.model} (from two short readings by this model on this machine):"]
        for w in self.work:
            where = f"{w.suite}/{w.task}" + (f" {format_length(w.length)}" if w.length else "")
            if w.missing is None:
                said.append(f"  {where:<32} not known beforehand")
                continue
            took = f"{format_count(w.missing)} tokens  about {format_seconds(self.seconds_of(w))}"
            said.append(f"  {where:<32} {took}" + (f"  ({w.known} of {w.samples} done before)" if w.known else ""))
        said.append(f"  {'together':<32} {format_count(self.tokens)} tokens  about {format_seconds(self.seconds)}")
        return said


def total(estimates: Sequence[Estimate]) -> tuple[int, float]:
    """Tokens and seconds of several models."""
    return sum(e.tokens for e in estimates), sum(e.seconds for e in estimates)
