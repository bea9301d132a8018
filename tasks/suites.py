"""The suites by name, and running them: a model, a tokenizer and lengths in, metrics out.

csr        commonsense and continuation through lm-eval; takes limit, data_dir
csr-small  the three tasks that HALO selects layers by; takes limit, data_dir
continuation  the shipped part of csr alone: continuations of held-out text, for which no data is needed; takes limit
recall     answers copied out of documents, through lm-eval; takes limit, data_dir
niah       needles; takes lengths, limit (haystacks a length), precision
kv         key-value lists; takes lengths, limit (lists a length), precision
grid       thirteen needles at exactly spaced depths; takes lengths, limit (haystacks a length), precision
ruler      the tasks of RULER, or one of them as ruler:TASK; takes lengths, limit (samples), precision, data_dir
ppl        bits per byte of the same held-out text at every length; takes lengths (windows), limit (1024 tokens)
lm:X       the lm-eval task X; takes limit, data_dir
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from halobench.errors import UserError, unknown_name
from halobench.progress import say
from halobench.records import Metric
from halobench.registry import Registry
from halobench.surgery.documents import content_hash
from halobench.tasks.estimate import Work
from halobench.tasks.lm_eval_suite import LmEvalSuite
from halobench.tasks.perplexity_suite import PerplexitySuite
from halobench.tasks.request import Failure, Request, Suite
from halobench.tasks.sampled_suite import SampledSuite
from halobench.tasks.schedule import Reading
from halobench.units import format_count, format_length, format_seconds

if TYPE_CHECKING:
    import numpy as np
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from halobench.tasks.retrieval import RetrievalTask
    from halobench.tasks.sampled import SampledTask

LM_PREFIX = "lm:"
DEFAULT_HAYSTACKS = 25
DEFAULT_RULER_SAMPLES = 100


def _planted(kind: str) -> Callable[[Request, str], SampledTask]:
    """Builds the retrieval task of class `kind`."""

    def make(request: Request, _: str) -> SampledTask:
        from halobench.tasks import retrieval

        task: type[RetrievalTask] = getattr(retrieval, kind)
        filler = held_out_filler(request.tokenizer)
        return task(request.tokenizer, filler, seed=request.seed, device=request.device)

    return make


def _ruler_names() -> Sequence[str]:
    from halobench.tasks.ruler import RULER_TASKS

    return RULER_TASKS.names()


def _ruler_left_out(data_dir: Path | None) -> dict[str, str]:
    from halobench.tasks.ruler import available

    return available(data_dir)[1]


def _ruler_files(data_dir: Path | None) -> Mapping[str, Path]:
    from halobench.tasks.ruler.questions import HOTPOT_FILES, SQUAD_FILES, find_file

    found = {name: find_file(files, data_dir) for name, files in (("qa_1", SQUAD_FILES), ("qa_2", HOTPOT_FILES))}
    return {name: path for name, path in found.items() if path is not None}


def _ruler_task(request: Request, name: str) -> SampledTask:
    from halobench.tasks.ruler import make_ruler_task

    return make_ruler_task(name, request.tokenizer, seed=request.seed, data_dir=request.data_dir, device=request.device)


csr, csr_small, recall = (LmEvalSuite(name=name) for name in ("csr", "csr-small", "recall"))
continuation = LmEvalSuite(name="csr", given=("tiny_continuation",))
niah = SampledSuite(names=lambda: ["multikey-4"], make=_planted("NeedleTask"), count=DEFAULT_HAYSTACKS, version=1)
kv = SampledSuite(names=lambda: ["keyvalue"], make=_planted("ListTask"), count=DEFAULT_HAYSTACKS, version=1)
grid = SampledSuite(names=lambda: ["depths-13"], make=_planted("GridTask"), count=DEFAULT_HAYSTACKS, version=1)
ruler = SampledSuite(
    names=_ruler_names, left_out=_ruler_left_out, make=_ruler_task, files=_ruler_files, count=DEFAULT_RULER_SAMPLES,
    version=2,  # 2: RULER's own wording and layout throughout
)  # fmt: skip
ppl = PerplexitySuite()

SUITES: Registry[Suite] = Registry(
    "suite",
    {
        name: f"halobench.tasks.suites:{name.replace('-', '_')}"
        for name in ("csr", "csr-small", "continuation", "recall", "niah", "kv", "grid", "ruler", "ppl")
    },
    group="halobench.suites",
)


def resolve_suite(name: str) -> Suite:
    """The suite called NAME, lm:TASK, or SUITE:TASK for one task of a sampled suite; UserError for an unknown one."""
    first, _, task = name.partition(":")
    if name.startswith(LM_PREFIX) and task:
        return LmEvalSuite(name="lm", given=(task,))
    if first not in SUITES.names() or (":" in name and not task):
        raise unknown_name("suite", name, [*SUITES.names(), f"{LM_PREFIX}TASK"])
    suite = SUITES.get(first)
    if not task:
        return suite
    if not isinstance(suite, SampledSuite):
        raise UserError(f"suite {name!r}: {first} is run as a whole; for a task of lm-eval write {LM_PREFIX}{task}")
    if task not in suite.names():
        raise unknown_name(f"task of suite {first}", task, suite.names())
    return replace(suite, only=task)


def parse_suites(names: Sequence[str]) -> list[str]:
    """The names, each once; raises UserError for one that is no suite, and for two that measure the same."""
    unique = list(dict.fromkeys(names))
    suites = {name: resolve_suite(name) for name in unique}
    for name in unique:
        whole = name.partition(":")[0]
        if whole != name and whole in names:
            raise UserError(f"suites {whole} and {name} measure {name} twice; give one of them")
    lm = [(name, suite) for name, suite in suites.items() if isinstance(suite, LmEvalSuite)]
    for place, (name, suite) in enumerate(lm):
        for other, second in lm[:place]:
            both = set(suite.tasks) & set(second.tasks) if suite.name == second.name else set()
            if both:
                raise UserError(f"suites {other} and {name} measure {min(both)} twice; give one of them")
    return unique


def settings_of(
    name: str,
    *,
    lengths: Sequence[int],
    limit: int | None,
    data_dir: Path | None,
    seed: int,
    precision: float | None,
) -> dict[str, Any]:
    """What decides the numbers of suite `name`, as plain data; of the arguments, those that it takes.

    version: of its samples. data: the local files it reads, by task, as hashes.
    """
    suite = resolve_suite(name)
    takes = getattr(suite, "takes", frozenset({"lengths", "data_dir"}))
    settings: dict[str, Any] = {"limit": limit, "seed": seed, "version": getattr(suite, "version", 1)}
    if "lengths" in takes:
        settings["lengths"] = sorted(lengths)
    if "precision" in takes:
        settings["precision"] = precision
    if "data_dir" in takes:
        files: Callable[[Path | None], Mapping[str, Path]] | None = getattr(suite, "files", None)
        settings["data_dir"] = str(data_dir.resolve()) if data_dir is not None else None
        settings["data"] = {task: content_hash(path) for task, path in files(data_dir).items()} if files else {}
    return settings


@dataclass(frozen=True, kw_only=True)
class SuiteOutcome:
    """Metrics of one suite, the tokens that the model read for them, and the seconds.

    readings: of sampled tasks; what an earlier run that was interrupted read for them is in all figures. details: what
    else the suite says. failed: what found no memory. peak_bytes: the highest memory use of the process (on a GPU: of
    the GPU), weights included, an earlier run's for the same numbers among them.
    """

    suite: str
    metrics: list[Metric]
    tokens: int
    seconds: float
    readings: list[Reading] = field(default_factory=list)
    details: dict[str, Any] = field(default_factory=dict)
    failed: list[Failure] = field(default_factory=list)
    peak_bytes: int = 0


def run_suite(name: str, request: Request) -> SuiteOutcome:
    """Runs one suite.

    Raises:
        UserError: no lengths where they are needed, or one that the model's positions cannot express.
    """
    from halobench.tasks.memory import peak, reset_peak
    from halobench.tasks.scoring import TokenCount

    suite = resolve_suite(name)
    check_lengths(name, suite, request)
    request = replace(request, readings=[], details={}, parts=[], failed=[])
    say(f"suite {name}")
    _say_beyond_window(suite, request)
    reset_peak(request.torch_device)
    started = time.monotonic()
    with TokenCount(request.model) as count:
        metrics = suite(request)
    pieces: list[Any] = [*request.readings, *request.parts]
    outcome = SuiteOutcome(
        suite=name, metrics=metrics, readings=request.readings, details=request.details, failed=request.failed,
        tokens=sum(piece.tokens for piece in pieces) if pieces else count.tokens,
        seconds=sum(piece.seconds for piece in pieces) if pieces else time.monotonic() - started,
        peak_bytes=max(peak(request.torch_device), *(piece.peak_bytes for piece in pieces), 0),
    )  # fmt: skip
    say(f"suite {name}: {format_count(outcome.tokens)} tokens in {format_seconds(outcome.seconds)}")
    return outcome


def _say_beyond_window(suite: Suite, request: Request) -> None:
    """Says which lengths are beyond what the model's config names, aloud and in the details; prompts are read whole."""
    from halobench.tasks.scoring import window_of

    window = window_of(request.model)
    beyond = [length for length in request.lengths if window is not None and length > window]
    if beyond and getattr(suite, "needs_lengths", False):
        request.details["beyond_window"] = {"window": window, "lengths": beyond}
        said = ", ".join(format_length(length) for length in beyond)
        say(f"{said}: beyond the model's window of {window} tokens; prompts are read whole, and not cut")


def check_lengths(name: str, suite: Suite, request: Request) -> None:
    """Refuses lengths that are missing where they matter, or beyond a model's table of positions."""
    from halobench.tasks.scoring import check_context

    if getattr(suite, "needs_lengths", False):
        if not request.lengths:
            raise UserError(f"suite {name} needs context lengths; give --lengths, e.g. 512,2k")
        check_context(request.model, max(request.lengths))


def work_of(name: str, request: Request) -> list[Work]:
    """What a suite will read, for an estimate; a suite that cannot say has one row without tokens."""
    suite = resolve_suite(name)
    check_lengths(name, suite, request)
    plan: Callable[[Request], list[Work]] | None = getattr(suite, "work", None)
    return plan(request) if plan else [Work(suite=name, task="all", length=None, samples=None, tokens=None)]


def probe_length(model: PreTrainedModel, work: Sequence[Work]) -> int:
    """The longest length at which the model is to be timed for this work; 0 when nothing is to be read."""
    from halobench.tasks.estimate import SHORT
    from halobench.tasks.scoring import most_positions

    longest = max((row.length or SHORT for row in work if row.missing), default=0)
    return min(longest, most_positions(model) or longest)


def held_out_filler(tokenizer: PreTrainedTokenizerBase) -> np.ndarray:
    """Tokens of the held-out sample without the ends of documents, for haystacks."""
    from halobench.assets import TEXT_HELDOUT, TEXT_LONG
    from halobench.surgery.corpus import encode_corpus

    tokens = encode_corpus([TEXT_LONG, TEXT_HELDOUT], tokenizer)
    return tokens[tokens != tokenizer.eos_token_id]
