"""The suites by name, and running them: model, tokenizer and lengths in, metrics out, one suite at a time.

csr   commonsense and continuation through lm-eval; takes limit, data_dir
niah  needles; takes lengths, limit (haystacks a length)
kv    key-value lists; takes lengths, limit (lists a length)
ppl   bits per byte of held-out text; takes lengths (windows), limit (thousands of tokens)
lm:X  the lm-eval task X; takes limit, data_dir
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from halobench.errors import UserError, unknown_name
from halobench.progress import say
from halobench.records import Metric
from halobench.registry import Registry
from halobench.units import format_count, format_seconds

if TYPE_CHECKING:
    import numpy as np
    from lm_eval.tasks import TaskManager
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

LM_PREFIX = "lm:"
CSR_TASKS = ("arc_easy", "arc_challenge", "hellaswag", "piqa", "winogrande", "lambada_openai")
DEFAULT_HAYSTACKS = 25
DEFAULT_TEXT_TOKENS = 65_536
PROMPT_TOKENS = 4096  # at least; lm-eval would cut longer prompts


@dataclass(kw_only=True)
class Request:
    """What a suite is asked to do. `manager` is lm-eval's index of tasks, built when first needed and kept."""

    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    lengths: Sequence[int]
    limit: int | None
    seed: int
    data_dir: Path | None
    device: str | None
    batch_size: int = 16
    manager: TaskManager | None = field(default=None, repr=False)


Suite = Callable[[Request], list[Metric]]
SUITES: Registry[Suite] = Registry(
    "suite",
    {name: f"halobench.tasks.suites:run_{name}" for name in ("csr", "niah", "kv", "ppl")},
    group="halobench.suites",
)


@dataclass(frozen=True, kw_only=True)
class SuiteOutcome:
    """Metrics of one suite, the tokens the model read for them, and the seconds."""

    suite: str
    metrics: list[Metric]
    tokens: int
    seconds: float


@dataclass(frozen=True, kw_only=True)
class EvalOutcome:
    """All suites together; `suites` has them one by one, `settings` what decides the numbers."""

    metrics: list[Metric]
    settings: dict[str, Any]
    tokens: int
    seconds: float
    suites: list[SuiteOutcome]


def parse_suites(names: Sequence[str]) -> list[str]:
    """The names, each once; raises UserError for one that is neither a suite nor of the form lm:TASK."""
    for name in names:
        is_task = name.startswith(LM_PREFIX) and len(name) > len(LM_PREFIX)
        if not is_task and name not in SUITES.names():
            raise unknown_name("suite", name, [*SUITES.names(), f"{LM_PREFIX}TASK"])
    return list(dict.fromkeys(names))


def evaluate(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    suites: Sequence[str],
    lengths: Sequence[int],
    limit: int | None,
    *,
    seed: int = 0,
    data_dir: Path | None = None,
    device: str | None = None,
    batch_size: int = 16,
    on_suite: Callable[[SuiteOutcome], None] | None = None,
) -> EvalOutcome:
    """Runs `suites` one after another.

    Args:
        suites: names of SUITES, or lm:TASK for a task of lm-eval.
        lengths: context lengths in tokens for niah and ppl.
        limit: items of each task, haystacks of each length, thousands of tokens of text; None for each suite's own.
        data_dir: folder with `eval/*.jsonl.gz` that lm-eval tasks are read from.
        device: where inputs go; the model's own by default.
        batch_size: sequences in one forward of lm-eval.
        on_suite: called with each suite as it is finished, so that a caller can save it.
    """
    from halobench.tasks.scoring import TokenCount, check_context

    names = parse_suites(suites)
    if {"niah", "kv", "ppl"} & set(names):
        if not lengths:
            raise UserError("suites niah, kv and ppl need context lengths; give --lengths, e.g. 512,2k")
        check_context(model, max(lengths))
    request = Request(
        model=model, tokenizer=tokenizer, lengths=sorted(lengths), limit=limit, seed=seed,
        data_dir=data_dir, device=device, batch_size=batch_size,
    )  # fmt: skip
    outcomes = []
    for name in names:
        say(f"suite {name}")
        started = time.monotonic()
        with TokenCount(model) as count:
            metrics = _run(name, request)
        outcome = SuiteOutcome(suite=name, metrics=metrics, tokens=count.tokens, seconds=time.monotonic() - started)
        say(f"suite {name}: {format_count(outcome.tokens)} tokens in {format_seconds(outcome.seconds)}")
        outcomes.append(outcome)
        if on_suite is not None:
            on_suite(outcome)
    return EvalOutcome(
        metrics=[metric for outcome in outcomes for metric in outcome.metrics],
        settings={
            "suites": names,
            "lengths": list(request.lengths),
            "limit": limit,
            "seed": seed,
            "data_dir": str(data_dir) if data_dir else None,
            "batch_size": batch_size,
            "dtype": str(model.dtype).removeprefix("torch."),
        },
        tokens=sum(outcome.tokens for outcome in outcomes),
        seconds=sum(outcome.seconds for outcome in outcomes),
        suites=outcomes,
    )


def _run(name: str, request: Request) -> list[Metric]:
    if name.startswith(LM_PREFIX):
        return _lm_eval(request, [name.removeprefix(LM_PREFIX)], "lm")
    return SUITES.get(name)(request)


def _lm_eval(request: Request, tasks: list[str], suite: str) -> list[Metric]:
    from halobench.tasks.csr import LOCAL_TASKS, OFFLINE_TASK, default_manager, run_lm_eval

    local = [OFFLINE_TASK, *(LOCAL_TASKS if request.data_dir else ())]
    if request.manager is None and not set(tasks) <= set(local):
        request.manager = default_manager()
    return run_lm_eval(
        request.model, request.tokenizer, tasks, limit=request.limit, batch_size=request.batch_size,
        max_length=max([PROMPT_TOKENS, *request.lengths]), data_dir=request.data_dir, seed=request.seed,
        suite=suite, manager=request.manager,
    )  # fmt: skip


def run_csr(request: Request) -> list[Metric]:
    """Our offline continuation task; with a data folder the six commonsense tasks too."""
    from halobench.tasks.csr import OFFLINE_TASK

    return _lm_eval(request, [OFFLINE_TASK, *(CSR_TASKS if request.data_dir else ())], "csr")


def run_niah(request: Request) -> list[Metric]:
    """Four needles in a haystack, at every length."""
    from halobench.tasks.needle import needle_metrics

    return _planted(needle_metrics, request)


def run_kv(request: Request) -> list[Metric]:
    """Key-value lists, at every length."""
    from halobench.tasks.needle import list_metrics

    return _planted(list_metrics, request)


def _planted(measure: Callable[..., list[Metric]], request: Request) -> list[Metric]:
    filler = held_out_filler(request.tokenizer)
    count = request.limit or DEFAULT_HAYSTACKS
    arguments = (request.model, request.tokenizer, filler, request.lengths, count, request.seed)
    return measure(*arguments, device=request.device)


def run_ppl(request: Request) -> list[Metric]:
    """Bits per byte: long novels in windows of every length, and short modern documents in windows of the shortest."""
    from halobench.assets import TEXT_HELDOUT, TEXT_LONG
    from halobench.tasks.perplexity import bits_per_byte
    from halobench.tasks.text import read_jsonl

    budget = request.limit * 1024 if request.limit else DEFAULT_TEXT_TOKENS
    novels = [document.text for document in read_jsonl(TEXT_LONG)]
    modern = [document.text for document in read_jsonl(TEXT_HELDOUT) if document.kind == "modern"]
    texts = [("modern", modern, request.lengths[0]), *(("novels", novels, length) for length in request.lengths)]
    metrics = []
    for name, documents, window in texts:
        metrics += bits_per_byte(
            request.model, request.tokenizer, documents,
            window=window, max_tokens=max(budget, window), name=name, device=request.device,
        )  # fmt: skip
    return metrics


def held_out_filler(tokenizer: PreTrainedTokenizerBase) -> np.ndarray:
    """Tokens of the held-out sample without the ends of documents, for haystacks."""
    from halobench.assets import TEXT_HELDOUT, TEXT_LONG
    from halobench.surgery.corpus import encode_corpus

    tokens = encode_corpus([TEXT_LONG, TEXT_HELDOUT], tokenizer)
    return tokens[tokens != tokenizer.eos_token_id]
