"""Speed and memory of prefill and decode, by context length, with the spread beside each number.

Prefill gives tokens per second and the time to the first token (TTFT); decoding on from its cache gives the time per
output token (TPOT). Running out of memory is a row, not an end. Two models are measured in turns, so that what else the
machine does falls on both.
"""

from __future__ import annotations

import ctypes
import gc
import resource
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import torch

from halobench.config import to_dict
from halobench.errors import is_out_of_memory
from halobench.progress import say
from halobench.records import Metric
from halobench.tasks.scoring import check_context, evaluating, prefill
from halobench.tasks.statistics import median_stderr
from halobench.units import format_bytes, format_length

if TYPE_CHECKING:
    from transformers import PreTrainedModel

CHUNK = 4096
_REPEAT_PREFILL_BELOW = 2.0  # seconds; a longer prefill is timed once a round and not warmed up at its full length


@dataclass(frozen=True, kw_only=True)
class ProfileRow:
    """One model at one context. Times are medians with their standard error; None where there was no memory.

    context: tokens prefilled, per sequence. ttft_s: seconds from the prompt to the first token. tpot_ms: of a
    decode step for the whole batch. peak_bytes: above what the process held before (weights included). cache_bytes:
    allocated after prefill; kv_bytes and state_bytes: what of it grows with the context and what does not, in use.
    backend: device, dtype and attention that ran. chunk: tokens of the prompt read in one forward.
    """

    model: str
    context: int
    batch: int
    status: Literal["ok", "oom"] = "ok"
    error: str | None = None
    ttft_s: float | None = None
    ttft_stderr: float | None = None
    prefill_tokens_per_s: float | None = None
    prefill_stderr: float | None = None
    prefill_n: int = 0
    tpot_ms: float | None = None
    tpot_stderr: float | None = None
    tpot_n: int = 0
    peak_bytes: int | None = None
    cache_bytes: int | None = None
    kv_bytes: int | None = None
    state_bytes: int | None = None
    parameter_bytes: int
    parameters: int
    backend: str
    chunk: int

    def to_dict(self) -> dict[str, Any]:
        """Plain data, for a record's details."""
        return to_dict(self)


@dataclass(frozen=True, kw_only=True)
class PairRow:
    """Teacher and hybrid at one context, with ratios that are above 1 where the hybrid is better.

    The teacher's figure over the hybrid's, the other way round for speed; None where either has no figure.
    """

    teacher: ProfileRow
    hybrid: ProfileRow
    prefill_ratio: float | None
    tpot_ratio: float | None
    cache_ratio: float | None
    peak_ratio: float | None


@dataclass
class _Measured:
    """What the rounds of one model at one context gave."""

    ttft: list[float] = field(default_factory=list)
    steps: list[float] = field(default_factory=list)
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
    """One row a context, ascending.

    Args:
        batch: sequences at a time.
        new_tokens: decode steps timed in each round.
        repeats: rounds; each prefills anew and decodes on from there.
        chunk: tokens of the prompt read in one forward.
        name: of the model in the rows; its class by default.
    """
    label = name or type(model).__name__
    return [
        _rows([(label, model)], context, batch, new_tokens, repeats, chunk)[0]
        for context in _checked([model], contexts, new_tokens)
    ]


def profile_pair(
    teacher: PreTrainedModel,
    hybrid: PreTrainedModel,
    contexts: Sequence[int],
    *,
    batch: int = 1,
    new_tokens: int = 16,
    repeats: int = 3,
    chunk: int = CHUNK,
    names: tuple[str, str] = ("teacher", "hybrid"),
) -> list[PairRow]:
    """Both models in one process, round by round in turns; see `profile_model`."""
    models = list(zip(names, (teacher, hybrid), strict=True))
    rows = profile_together(models, contexts, batch=batch, new_tokens=new_tokens, repeats=repeats, chunk=chunk)
    return [_pair(*of_context) for of_context in rows]


def profile_together(
    models: Sequence[tuple[str, PreTrainedModel]],
    contexts: Sequence[int],
    *,
    batch: int = 1,
    new_tokens: int = 16,
    repeats: int = 3,
    chunk: int = CHUNK,
) -> list[list[ProfileRow]]:
    """Named models in one process, round by round in turns: for each context, ascending, a row a model."""
    checked = _checked([model for _, model in models], contexts, new_tokens)
    return [_rows(models, context, batch, new_tokens, repeats, chunk) for context in checked]


def _checked(models: Sequence[PreTrainedModel], contexts: Sequence[int], new_tokens: int) -> list[int]:
    for model in models:
        check_context(model, max(contexts) + new_tokens)
    return sorted(contexts)


def _pair(teacher: ProfileRow, hybrid: ProfileRow) -> PairRow:
    def ratio(over: float | None, under: float | None) -> float | None:
        return over / under if over and under else None

    return PairRow(
        teacher=teacher,
        hybrid=hybrid,
        prefill_ratio=ratio(hybrid.prefill_tokens_per_s, teacher.prefill_tokens_per_s),
        tpot_ratio=ratio(teacher.tpot_ms, hybrid.tpot_ms),
        cache_ratio=ratio(teacher.cache_bytes, hybrid.cache_bytes),
        peak_ratio=ratio(teacher.peak_bytes, hybrid.peak_bytes),
    )


def _rows(
    models: Sequence[tuple[str, PreTrainedModel]], context: int, batch: int, new_tokens: int, repeats: int, chunk: int
) -> list[ProfileRow]:
    """A row of each model, measured in turns."""
    measured = [_Measured() for _ in models]
    for turn in range(repeats):
        for (_, model), result in zip(models, measured, strict=True):
            if result.error is None:
                _round(model, result, context, batch, new_tokens, chunk, warm=turn == 0)
    rows = []
    for (name, model), result in zip(models, measured, strict=True):
        rows.append(_row(name, model, result, context, batch, chunk))
        say(_line(rows[-1]))
    return rows


def _round(
    model: PreTrainedModel, result: _Measured, context: int, batch: int, new_tokens: int, chunk: int, *, warm: bool
) -> None:
    """One prefill and `new_tokens` decode steps, added to `result`; with `warm` an untimed one comes first."""
    ids = torch.randint(
        0,
        model.config.get_text_config(decoder=True).vocab_size,
        (batch, context),
        generator=torch.Generator().manual_seed(0),
    ).to(model.device)
    try:
        with evaluating(model):
            if warm:
                short = ids[:, : min(context, 512)]
                started = time.perf_counter()
                _prefill_and_decode(model, short, 2, chunk, _Measured())
                if (time.perf_counter() - started) * context / short.shape[1] < _REPEAT_PREFILL_BELOW:
                    _prefill_and_decode(model, ids, 1, chunk, _Measured())
            before = _reset_peak(model.device)
            _prefill_and_decode(model, ids, new_tokens, chunk, result)
            result.peak = max(result.peak, _peak(model.device) - before)
    except (torch.OutOfMemoryError, MemoryError, RuntimeError) as error:
        if not is_out_of_memory(error):
            raise
        result.error = str(error).splitlines()[0][:200] or type(error).__name__
    if model.device.type == "cuda":
        torch.cuda.empty_cache()


def _prefill_and_decode(model: PreTrainedModel, ids: torch.Tensor, steps: int, chunk: int, result: _Measured) -> None:
    _wait(model.device)
    started = time.perf_counter()
    cache, logits = prefill(model, ids, chunk, room=steps)
    token = logits.argmax(-1, keepdim=True)
    _wait(model.device)
    result.ttft.append(time.perf_counter() - started)
    result.cache = cache_sizes(cache, ids.shape[1])
    for _ in range(steps):
        started = time.perf_counter()
        output = model(input_ids=token, past_key_values=cache, use_cache=True)
        cache, token = output.past_key_values, output.logits[:, -1:].argmax(-1)
        _wait(model.device)
        result.steps.append(time.perf_counter() - started)


def cache_sizes(cache: Any, context: int) -> tuple[int, int, int]:
    """Bytes of a cache of `context` tokens: allocated, of keys and values in use, and of states.

    Keys and values are the tensors of that name in each layer, (batch, heads, room, size); all others are states.
    A window keeps fewer keys than the context: what it keeps is counted.
    """
    allocated = keys = states = 0
    for layer in cache.layers:
        for name, value in vars(layer).items():
            for tensor in _tensors(value):
                size = tensor.nbytes if tensor.numel() > 1 else 0
                allocated += size
                if name in ("keys", "values"):
                    keys += size * min(context, tensor.shape[-2]) // tensor.shape[-2] if size else 0
                else:
                    states += size
    return allocated, keys, states


def _tensors(value: Any) -> list[torch.Tensor]:
    if isinstance(value, torch.Tensor):
        return [value]
    if isinstance(value, dict):
        value = list(value.values())
    return [tensor for item in value for tensor in _tensors(item)] if isinstance(value, list | tuple) else []


def _forms(model: PreTrainedModel) -> str:
    """What ran in the mixers of a hybrid, as ", lightning in torch"."""
    from halobench.surgery.hybrid import backends_of

    return "".join(f", {name} in {form}" for name, form in backends_of(model).items())


def _row(name: str, model: PreTrainedModel, result: _Measured, context: int, batch: int, chunk: int) -> ProfileRow:
    parameters = list(model.parameters())
    attention = getattr(model.config, "_attn_implementation", None) or "default"
    facts: dict[str, Any] = {
        "model": name,
        "context": context,
        "batch": batch,
        "parameter_bytes": sum(p.nbytes for p in parameters),
        "parameters": sum(p.numel() for p in parameters),
        "backend": f"{model.device.type} {str(model.dtype).removeprefix('torch.')} {attention}{_forms(model)}",
        "chunk": min(chunk, context),
    }
    if result.error is not None:
        return ProfileRow(status="oom", error=result.error, **facts)
    ttft, ttft_error = median_stderr(result.ttft)
    step, step_error = median_stderr(result.steps)
    speed, speed_error = median_stderr([batch * context / seconds for seconds in result.ttft])
    return ProfileRow(
        ttft_s=ttft,
        ttft_stderr=ttft_error,
        prefill_tokens_per_s=speed,
        prefill_stderr=speed_error,
        prefill_n=len(result.ttft),
        tpot_ms=1000 * step,
        tpot_stderr=None if step_error is None else 1000 * step_error,
        tpot_n=len(result.steps),
        peak_bytes=result.peak,
        cache_bytes=result.cache[0],
        kv_bytes=result.cache[1],
        state_bytes=result.cache[2],
        **facts,
    )


def profile_metrics(rows: Sequence[ProfileRow]) -> list[Metric]:
    """The rows as metrics of the suite "profile", one a figure and context; a row without figures gives none."""
    metrics = []
    for row in rows:
        for task, value, stderr, n, higher in (
            ("ttft_s", row.ttft_s, row.ttft_stderr, row.prefill_n, False),
            ("tpot_ms", row.tpot_ms, row.tpot_stderr, row.tpot_n, False),
            ("prefill_tokens_per_s", row.prefill_tokens_per_s, row.prefill_stderr, row.prefill_n, True),
            ("cache_bytes", row.cache_bytes, None, 1, False),
            ("peak_bytes", row.peak_bytes, None, row.prefill_n, False),
        ):
            if value is not None:
                metrics.append(
                    Metric(
                        suite="profile",
                        task=task,
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
    start = f"  {row.model:<10} {format_length(row.context):>6}"
    if row.status != "ok":
        return f"{start}  out of memory"
    return (
        f"{start}  prefill {row.prefill_tokens_per_s:,.0f} tokens/s  {row.tpot_ms:.2f} ms a token  "
        f"cache {format_bytes(row.cache_bytes or 0)}  peak {format_bytes(row.peak_bytes or 0)}"
    )


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def _reset_peak(device: torch.device) -> int:
    """Forgets the highest memory use so far and returns the present one, in bytes."""
    gc.collect()
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        return torch.cuda.memory_allocated(device)
    if sys.platform == "linux":
        ctypes.CDLL(None).malloc_trim(0)  # give back what freed tensors left, or the next peak hides in it
        try:
            Path("/proc/self/clear_refs").write_text("5")
        except OSError:
            return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
        return _status_bytes("VmRSS")
    return _peak(device)


def _peak(device: torch.device) -> int:
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    if sys.platform == "linux":
        return _status_bytes("VmHWM")
    size = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return size if sys.platform == "darwin" else size * 1024


def _status_bytes(name: str) -> int:
    """A memory figure of this process from the kernel, in bytes."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(f"{name}:"):
            return int(line.split()[1]) * 1024
    raise OSError(f"/proc/self/status has no {name}")
