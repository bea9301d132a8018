"""The scale a of s_t = log_a(t + a): found after training, on text longer than the training length (HyPE).

As a grows the scaling fades: s_t of a = infinity is 1, which is the candidate `None`. The loss of a candidate is the
mean over lengths of its mean loss at each, on the same held-out sequences for all, so that candidates are compared in
pairs: the standard error is of the difference of two losses over sequences, not of either.
"""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch

from halobench.errors import UserError
from halobench.kernels.chunked_loss import cross_entropy, tokens_per_chunk
from halobench.progress import Progress
from halobench.surgery.heads import final_hidden, unembed
from halobench.surgery.planted import Mixture

GOLDEN = (3 - math.sqrt(5)) / 2
TELLING = 2.0  # standard errors from which a difference counts


class ScaleSearch(Protocol):
    """What the search is told.

    candidates: values of a that are all tried; None is no scaling. refine: how many more are tried around the best.
    lengths: of the sequences, in tokens. sequences: at each length.
    """

    @property
    def candidates(self) -> Sequence[float | None]: ...

    @property
    def lengths(self) -> list[int]: ...

    @property
    def sequences(self) -> int: ...

    @property
    def refine(self) -> int: ...


@dataclass(frozen=True, kw_only=True)
class Tried:
    """One candidate. by_length: mean loss (nats per weighted token). loss: their mean over lengths.

    by_sequence: the loss of each sequence number over all lengths, weighted so that their mean is `loss`.
    """

    a: float | None
    loss: float
    by_length: dict[int, float]
    by_sequence: list[float]


@dataclass(frozen=True, kw_only=True)
class FoundScale:
    """The answer of a search.

    best: the candidate of the lowest loss. losses, by_length: of each candidate, by its name. tokens: read in all.
    runner_up: the next best. difference: its loss above that of the best. stderr: of this difference, over sequences;
    None for a single one. alike: candidates within two standard errors of the best, itself included; all of them
    when there is no standard error.
    """

    best: float | None
    losses: dict[str, float]
    tokens: int
    seconds: float
    by_length: dict[str, dict[str, float]]
    runner_up: float | None
    difference: float
    stderr: float | None
    alike: list[float | None]


def scale_name(a: float | None) -> str:
    """A candidate in results: "500", or "none" for no scaling."""
    return "none" if a is None else f"{a:g}"


def scaled_layers(model: Any) -> list[int]:
    """The layers whose queries s_t multiplies, of a hybrid.

    Raises:
        UserError: it has no softmax mixer, or positions are still in those it has, which leaves nothing to scale.
    """
    mixers = model.mixer_modules() if hasattr(model, "mixer_modules") else {}
    if not mixers:
        raise UserError("the model is no hybrid; log_a(t + a) scales the softmax layers of HALO students")
    softmax = {index: mixer for index, mixer in mixers.items() if mixer.name == "softmax"}
    untouched = [index for index in range(model.config.num_hidden_layers) if index not in mixers]
    turned = [index for index, mixer in softmax.items() if mixer.options.rope] if softmax else untouched
    if turned:
        raise UserError(
            f"softmax layers {', '.join(map(str, sorted(turned)))} keep their positions (RoPE); log_a(t + a) scales "
            "queries without, of models converted with `hype: true`"
        )
    if not softmax:
        raise UserError("the model has no softmax layers, so there are no queries to scale")
    return sorted(softmax)


@torch.inference_mode()
def search_scale(model: Any, data: Mixture, config: ScaleSearch, device: str, *, quiet: bool = False) -> FoundScale:
    """Tries each candidate on the same held-out sequences, then `refine` values around the best.

    The model leaves as it came; `quiet` shows no progress. Raises UserError for candidates that are no scales, and as
    `scaled_layers` does.
    """
    layers = scaled_layers(model)
    _check(config)
    before = model.mixer_modules()[layers[0]].options.logits_scale_base
    started = time.monotonic()
    sequences = [
        [data.held_out(index, length + 1) for index in range(config.sequences)]
        for length in sorted(set(config.lengths))
    ]
    tried: dict[str, Tried] = {}
    size = len(config.candidates) + config.refine
    with Progress("scale", size, unit="values", every=10.0, quiet=quiet) as progress:

        def attempt(a: float | None) -> Tried:
            if scale_name(a) not in tried:
                model.set_logits_scale(a)
                found = tried[scale_name(a)] = _measure(model, a, sequences, device)
                progress.advance(1, f"a = {scale_name(a)}: loss {found.loss:.4f}")
            return tried[scale_name(a)]

        try:
            for a in config.candidates:
                attempt(a)
            if config.refine:
                finite = [entry for entry in tried.values() if entry.a is not None]
                _refine(lambda a: attempt(a).loss, {entry.a: entry.loss for entry in finite if entry.a}, config.refine)
        finally:
            model.set_logits_scale(before)
    read = config.sequences * sum(set(config.lengths))
    return _judge(list(tried.values()), len(tried) * read, time.monotonic() - started)


def _check(config: ScaleSearch) -> None:
    wrong = [a for a in config.candidates if a is not None and not 1 < a < math.inf]
    if wrong or not config.candidates:
        raise UserError(f"candidates for a must be numbers above 1, or none for no scaling; got {wrong or 'nothing'}")
    if config.sequences < 1 or not config.lengths:
        raise UserError(
            f"a scale is judged on sequences: got {config.sequences} of {len(config.lengths)} lengths; give one or more"
        )


def _measure(model: Any, a: float | None, sequences: list[list[Any]], device: str) -> Tried:
    """The losses of the model as it is now; `sequences` by length."""
    by_length, parts = {}, []
    for group in sequences:
        sums = [_loss(model, sequence, device) for sequence in group]
        weight = sum(w for _, w in sums)
        by_length[len(group[0].tokens) - 1] = sum(total for total, _ in sums) / weight
        parts.append([total * len(group) / weight for total, _ in sums])
    by_sequence = [statistics.fmean(row) for row in zip(*parts, strict=True)]
    return Tried(a=a, loss=statistics.fmean(by_length.values()), by_length=by_length, by_sequence=by_sequence)


def _loss(model: Any, sequence: Any, device: str) -> tuple[float, float]:
    """(sum of weight * cross entropy in nats, sum of the weights) of one sequence."""
    tokens = torch.from_numpy(sequence.tokens).to(device)
    weights = torch.from_numpy(sequence.weights)[1:].float().to(device)
    hidden = final_hidden(model, tokens[None, :-1]).flatten(0, 1)
    chunk, total = tokens_per_chunk(model.config.vocab_size), 0.0
    for start in range(0, len(hidden), chunk):
        part = slice(start, start + chunk)
        total += float(cross_entropy(unembed(model, hidden[part]), tokens[1:][part], weights[part]))
    return total, float(weights.sum())


def _refine(loss: Callable[[float], float], known: dict[float, float], rounds: int) -> None:
    """Golden-section search in log a around the best known value, to three digits of a."""
    if not known:
        return
    values = sorted(known)
    best = min(known, key=lambda a: known[a])
    place = values.index(best)
    step = max((b / a for a, b in zip(values, values[1:], strict=False)), default=2.0)
    low = values[place - 1] if place > 0 else max(best / step, 1 + (best - 1) / 10)
    high = values[place + 1] if place + 1 < len(values) else best * step
    for _ in range(rounds):
        above = high / best > best / low
        ratio = (high if above else low) / best
        probe = float(f"{best * ratio**GOLDEN:.3g}")
        if probe in known or probe <= 1:
            return
        known[probe] = loss(probe)
        if known[probe] < known[best]:
            low, high, best = (best, high, probe) if above else (low, best, probe)
        elif above:
            high = probe
        else:
            low = probe


def _judge(tried: list[Tried], tokens: int, seconds: float) -> FoundScale:
    order = sorted(tried, key=lambda entry: entry.loss)
    best, second = order[0], order[min(1, len(order) - 1)]
    errors = [_stderr(entry, best) for entry in order]
    alike = [e.a for e, error in zip(order, errors, strict=True) if error is None or _near(e, best, error)]
    return FoundScale(
        best=best.a,
        losses={scale_name(entry.a): entry.loss for entry in tried},
        tokens=tokens,
        seconds=seconds,
        by_length={scale_name(e.a): {str(n): x for n, x in e.by_length.items()} for e in tried},
        runner_up=second.a,
        difference=second.loss - best.loss,
        stderr=errors[order.index(second)],
        alike=alike,
    )


def _near(entry: Tried, best: Tried, error: float) -> bool:
    return entry.loss - best.loss <= TELLING * error


def _stderr(entry: Tried, best: Tried) -> float | None:
    """Standard error of the difference of two candidates' losses, over the sequences they share."""
    differences = [a - b for a, b in zip(entry.by_sequence, best.by_sequence, strict=True)]
    if len(differences) < 2:
        return None
    return statistics.stdev(differences) / math.sqrt(len(differences))
