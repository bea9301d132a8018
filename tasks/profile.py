"""Speed and memory of prefill and decode, by context and batch, with the spread beside each number.

Prefill gives tokens per second and the time to the first token (TTFT); decoding on from its cache gives the time per
output token (TPOT). Running out of memory is a row, not an end. Several models are measured in turns, so that what else
the machine does falls on all.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal

import torch

from halobench.config import to_dict
from halobench.errors import is_out_of_memory
from halobench.mixers.cache import HybridCache
from halobench.progress import say
from halobench.records import Metric
from halobench.surgery.hybrid import backends_of
from halobench.tasks.decoder import Decoder
from halobench.tasks.kernels_seen import attention_kernels
from halobench.tasks.machine import wait_for
from halobench.tasks.memory import peak, reset_peak
from halobench.tasks.paired import Ratio, paired_ratio
from halobench.tasks.scoring import check_context, evaluating
from halobench.tasks.statistics import median_stderr
from halobench.units import format_bytes, format_length

if TYPE_CHECKING:
    from transformers import PreTrainedModel

CHUNK = 4096
_REPEAT_PREFILL_BELOW = 2.0  # seconds; a longer prefill is timed once a round and not warmed up at its full length
_WARM_TOKENS = 512


@dataclass(frozen=True, kw_only=True)
class Rounds:
    """How to measure: decode steps timed in each round, rounds (each prefills anew), tokens read in one forward."""

    new_tokens: int = 16
    repeats: int = 3
    chunk: int = CHUNK


@dataclass(frozen=True, kw_only=True)
class Theory:
    """What a model at one context and batch must hold, read and compute at least, from shapes alone; bytes.

    weight_bytes: of all parameters. kv_bytes, state_bytes: of the cache after the context. activation_bytes: an
    estimate of what a chunk's widest step holds at once. peak_bytes: all of these. read_bytes: read for a decode step,
    the weights that multiply once and the whole cache. prompt_flops: operations of reading the prompt.
    tpot_floor_ms: read_bytes at the machine's measured bandwidth. ttft_floor_s: prompt_flops at its measured rate of
    matrix products, or the reading of the weights where that takes longer.
    """

    weight_bytes: int
    kv_bytes: int
    state_bytes: int
    activation_bytes: int
    peak_bytes: int
    read_bytes: int
    prompt_flops: float
    tpot_floor_ms: float
    ttft_floor_s: float


@dataclass(frozen=True, kw_only=True)
class ProfileRow:
    """One model at one context and batch. Times are medians with their standard error; None where memory ran out.

    context: tokens prefilled, per sequence. ttft_s: seconds from the prompt to the first token. tpot_ms: of a decode
    step for the whole batch, which gives `decode_tokens_per_s`. ttft_rounds, tpot_rounds: of each round, the latter its
    median. peak_bytes: above what the process held before, which is the weights. cache_bytes: allocated after prefill;
    kv_bytes and state_bytes: what of it grows with the context and what does not, in use. backend: device, dtype and
    attention that ran; kernels: the attention kernels that torch ran in "prefill" and "decode"; mixers: the form each
    kind of mixer ran in; decode: the decode engine's backends, or why it did not run. chunk: tokens of the prompt read
    in one forward. theory: the floors; tpot_over_floor and ttft_over_floor: the times over them.
    """

    model: str
    context: int
    batch: int
    status: Literal["ok", "oom"] = "ok"
    error: str | None = None
    ttft_s: float | None = None
    ttft_stderr: float | None = None
    ttft_rounds: list[float] = field(default_factory=list)
    prefill_tokens_per_s: float | None = None
    prefill_stderr: float | None = None
    prefill_n: int = 0
    tpot_ms: float | None = None
    tpot_stderr: float | None = None
    tpot_rounds: list[float] = field(default_factory=list)
    tpot_n: int = 0
    decode_tokens_per_s: float | None = None
    peak_bytes: int | None = None
    cache_bytes: int | None = None
    kv_bytes: int | None = None
    state_bytes: int | None = None
    parameter_bytes: int
    parameters: int
    backend: str
    kernels: dict[str, list[str]] = field(default_factory=dict)
    mixers: dict[str, str] = field(default_factory=dict)
    decode: dict[str, str] = field(default_factory=dict)
    chunk: int
    theory: Theory | None = None
    tpot_over_floor: float | None = None
    ttft_over_floor: float | None = None

    @property
    def memory_bytes(self) -> int | None:
        """Weights and the peak above them: what a device needs."""
        return None if self.peak_bytes is None else self.parameter_bytes + self.peak_bytes

    def to_dict(self) -> dict[str, Any]:
        """Plain data, for a record's details."""
        return to_dict(self)


@dataclass(frozen=True, kw_only=True)
class PairRow:
    """Teacher and hybrid at one context, with ratios that are above 1 where the hybrid is better.

    The teacher's figure over the hybrid's; None where either has none. prefill (the time to the first token) and tpot
    are of paired rounds; cache_ratio is of the bytes allocated, memory_ratio of weights and peak together.
    """

    teacher: ProfileRow
    hybrid: ProfileRow
    prefill: Ratio | None
    tpot: Ratio | None
    cache_ratio: float | None
    memory_ratio: float | None


@dataclass
class _Measured:
    """What the rounds of one model at one context gave; `steps` has a list a round."""

    ttft: list[float] = field(default_factory=list)
    steps: list[list[float]] = field(default_factory=list)
    kernels: dict[str, list[str]] = field(default_factory=dict)
    decode: dict[str, str] = field(default_factory=dict)
    peak: int = 0
    cache: tuple[int, int, int] = (0, 0, 0)
    error: str | None = None


def profile_model(
    model: PreTrainedModel,
    contexts: Sequence[int],
    *,
    batch: int = 1,
    new_tokens: int = 16,
    repeats: int = 3,
    chunk: int = CHUNK,
    name: str | None = None,
) -> list[ProfileRow]:
    """One row a context, ascending; `batch` sequences at a time. Other arguments as in `Rounds`.

    Args:
        name: of the model in the rows; its class by default.
    """
    rounds = Rounds(new_tokens=new_tokens, repeats=repeats, chunk=chunk)
    named = [(name or type(model).__name__, model)]
    check_context(model, max(contexts) + new_tokens)
    return [profile_at(named, context, batch=batch, rounds=rounds)[0] for context in sorted(contexts)]


def profile_at(
    models: Sequence[tuple[str, PreTrainedModel]], context: int, *, batch: int, rounds: Rounds
) -> list[ProfileRow]:
    """A row of each named model at one context, measured in turns."""
    measured = [_Measured() for _ in models]
    for turn in range(rounds.repeats):
        for (_, model), result in zip(models, measured, strict=True):
            if result.error is None:
                _round(model, result, context, batch, rounds, warm=turn == 0)
    rows = []
    for (name, model), result in zip(models, measured, strict=True):
        rows.append(_row(name, model, result, context, batch, rounds.chunk))
        say(_line(rows[-1]))
    return rows


def pair_of(teacher: ProfileRow, hybrid: ProfileRow) -> PairRow:
    """The ratios of two rows that were measured in turns."""

    def rounds(name: str) -> Ratio | None:
        over, under = getattr(teacher, name), getattr(hybrid, name)
        return paired_ratio(over, under) if over and under else None

    def ratio(over: float | None, under: float | None) -> float | None:
        return over / under if over and under else None

    return PairRow(
        teacher=teacher,
        hybrid=hybrid,
        prefill=rounds("ttft_rounds"),
        tpot=rounds("tpot_rounds"),
        cache_ratio=ratio(teacher.cache_bytes, hybrid.cache_bytes),
        memory_ratio=ratio(teacher.memory_bytes, hybrid.memory_bytes),
    )


def out_of_memory_row(
    name: str, model: PreTrainedModel, context: int, batch: int, chunk: int, error: str
) -> ProfileRow:
    """The row of a measurement that memory did not suffice for."""
    return _row(name, model, _Measured(error=error), context, batch, chunk)


def _round(model: PreTrainedModel, result: _Measured, context: int, batch: int, rounds: Rounds, *, warm: bool) -> None:
    """One prefill and the decode steps, added to `result`; with `warm` untimed ones come first."""
    ids = torch.randint(
        0,
        model.config.get_text_config(decoder=True).vocab_size,
        (batch, context),
        generator=torch.Generator().manual_seed(0),
    ).to(model.device)
    with _noting_lost_memory(result), evaluating(model):
        if warm:
            _warm_up(model, result, ids, rounds.chunk)
        before = reset_peak(model.device)
        _prefill_and_decode(model, ids, rounds.new_tokens, rounds.chunk, result)
        result.peak = max(result.peak, peak(model.device) - before)
    if model.device.type == "cuda":
        torch.cuda.empty_cache()


@contextmanager
def _noting_lost_memory(result: _Measured) -> Iterator[None]:
    try:
        yield
    except (torch.OutOfMemoryError, MemoryError, RuntimeError) as error:
        if not is_out_of_memory(error):
            raise
        result.error = (str(error).splitlines() or [type(error).__name__])[0][:200]


def _warm_up(model: PreTrainedModel, result: _Measured, ids: torch.Tensor, chunk: int) -> None:
    """Untimed work that notes which attention kernels run, in as many kinds of chunks as the prompt will have."""
    short = ids[:, : min(ids.shape[1], _WARM_TOKENS)]
    piece = short.shape[1] if ids.shape[1] <= chunk else -(-short.shape[1] // 2)
    with attention_kernels() as reading:
        decoder = Decoder(model, short.shape[1] + 2, replay=False)
        decoder.read(short, piece)
    with attention_kernels() as decoding:
        decoder.step(decoder.token)
    result.kernels = {"prefill": sorted(reading), "decode": sorted(decoding)}
    trial = _Measured()
    _prefill_and_decode(model, short, 1, chunk, trial)
    if trial.ttft[0] * ids.shape[1] / short.shape[1] < _REPEAT_PREFILL_BELOW:
        _prefill_and_decode(model, ids, 1, chunk, trial)


def _prefill_and_decode(model: PreTrainedModel, ids: torch.Tensor, steps: int, chunk: int, result: _Measured) -> None:
    wait_for(model.device)
    started = time.perf_counter()
    decoder = Decoder(model, ids.shape[1] + steps)
    decoder.read(ids, chunk)
    token = decoder.token
    wait_for(model.device)
    result.ttft.append(time.perf_counter() - started)
    result.cache = cache_sizes(decoder.cache, ids.shape[1])
    result.steps.append([])
    decoder.prepare()
    for _ in range(steps):
        started = time.perf_counter()
        decoder.step(token)
        token = decoder.token
        wait_for(model.device)
        result.steps[-1].append(time.perf_counter() - started)
    result.decode = decoder.backends


def cache_sizes(cache: Any, context: int) -> tuple[int, int, int]:
    """Bytes of a cache of `context` tokens: allocated for them, of keys and values in use, and of states.

    Keys and values are the tensors of that name in each layer, (batch, heads, room, size); all others are states. Room
    for tokens to come is not counted. A window keeps fewer keys than the context: what it keeps is counted.
    """
    allocated = keys = states = 0
    for layer in cache.layers:
        for name, value in vars(layer).items():
            for tensor in _tensors(value):
                size = tensor.nbytes if tensor.numel() > 1 else 0
                if size and name in ("keys", "values"):
                    size = size * min(context, tensor.shape[-2]) // tensor.shape[-2]
                    kept = layer.kept(context) if isinstance(cache, HybridCache) else tensor.shape[-2]
                    keys += tensor.nbytes * min(context, kept) // tensor.shape[-2]
                else:
                    states += size
                allocated += size
    return allocated, keys, states


def _tensors(value: Any) -> list[torch.Tensor]:
    if isinstance(value, torch.Tensor):
        return [value]
    if isinstance(value, dict):
        value = list(value.values())
    return [tensor for item in value for tensor in _tensors(item)] if isinstance(value, list | tuple) else []


def _row(name: str, model: PreTrainedModel, result: _Measured, context: int, batch: int, chunk: int) -> ProfileRow:
    parameters = list(model.parameters())
    attention = getattr(model.config, "_attn_implementation", None) or "default"
    mixers = backends_of(model)
    forms = "".join(f", {mixer} in {form}" for mixer, form in mixers.items())
    facts: dict[str, Any] = {
        "model": name,
        "context": context,
        "batch": batch,
        "parameter_bytes": sum(p.nbytes for p in parameters),
        "parameters": sum(p.numel() for p in parameters),
        "backend": f"{model.device.type} {str(model.dtype).removeprefix('torch.')} {attention}{forms}",
        "kernels": result.kernels,
        "mixers": mixers,
        "decode": result.decode,
        "chunk": min(chunk, context),
    }
    if result.error is not None:
        return ProfileRow(status="oom", error=result.error, **facts)
    steps = [step for of_round in result.steps for step in of_round]
    ttft, ttft_error = median_stderr(result.ttft)
    step, step_error = median_stderr(steps)
    speed, speed_error = median_stderr([batch * context / seconds for seconds in result.ttft])
    return ProfileRow(
        ttft_s=ttft,
        ttft_stderr=ttft_error,
        ttft_rounds=result.ttft,
        prefill_tokens_per_s=speed,
        prefill_stderr=speed_error,
        prefill_n=len(result.ttft),
        tpot_ms=1000 * step,
        tpot_stderr=None if step_error is None else 1000 * step_error,
        tpot_rounds=[1000 * median_stderr(of_round)[0] for of_round in result.steps],
        tpot_n=len(steps),
        decode_tokens_per_s=batch / step,
        peak_bytes=result.peak,
        cache_bytes=result.cache[0],
        kv_bytes=result.cache[1],
        state_bytes=result.cache[2],
        **facts,
    )


def profile_metrics(rows: Sequence[ProfileRow]) -> list[Metric]:
    """The rows as metrics of the suite "profile", one a figure and context; a row without figures gives none.

    A figure of a larger batch is another task ("tpot_ms_batch_4"), so that a column of a table never mixes batches.
    """
    metrics = []
    for row in rows:
        for task, value, stderr, n, higher in (
            ("ttft_s", row.ttft_s, row.ttft_stderr, row.prefill_n, False),
            ("tpot_ms", row.tpot_ms, row.tpot_stderr, row.tpot_n, False),
            ("prefill_tokens_per_s", row.prefill_tokens_per_s, row.prefill_stderr, row.prefill_n, True),
            ("cache_bytes", row.cache_bytes, None, 1, False),
            ("peak_bytes", row.peak_bytes, None, row.prefill_n, False),
            ("memory_bytes", row.memory_bytes, None, row.prefill_n, False),
            ("tpot_over_floor", row.tpot_over_floor, None, row.tpot_n, False),
        ):
            if value is not None:
                metrics.append(
                    Metric(
                        suite="profile",
                        task=task if row.batch == 1 else f"{task}_batch_{row.batch}",
                        metric=f"batch-{row.batch}",
                        value=float(value),
                        stderr=stderr,
                        n=n,
                        length=row.context,
                        higher_is_better=higher,
                    )
                )
    return metrics


def _line(row: ProfileRow) -> str:
    start = f"  {row.model:<10} {format_length(row.context):>6}" + (f" x {row.batch}" if row.batch > 1 else "")
    if row.status != "ok":
        return f"{start}  out of memory"
    return (
        f"{start}  prefill {row.prefill_tokens_per_s:,.0f} tokens/s  {row.tpot_ms:.2f} ms a token  "
        f"cache {format_bytes(row.cache_bytes or 0)}  peak {format_bytes(row.peak_bytes or 0)}"
    )
