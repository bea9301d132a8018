"""What a suite is asked to do, and what it says beside its metrics: readings, finished parts, failures."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from halobench.config import from_dict, to_dict
from halobench.errors import is_out_of_memory
from halobench.files import read_json, write_json
from halobench.progress import say
from halobench.records import Metric
from halobench.tasks.schedule import Reading
from halobench.units import format_length

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from halobench.tasks.journal import Journals

OUT_OF_MEMORY = "out of memory"


@dataclass(frozen=True, kw_only=True)
class Part:
    """A finished piece of a suite whose samples are not kept one by one: a task of lm-eval, a text in its windows.

    details: what the suite says of it. peak_bytes: the highest memory use up to its end.
    """

    metrics: list[Metric]
    details: dict[str, Any]
    tokens: int
    seconds: float
    peak_bytes: int


@dataclass(frozen=True, kw_only=True)
class Failure:
    """A task (at a length, where it has one) that could not be measured, and why."""

    suite: str
    task: str
    length: int | None
    error: str


@dataclass(kw_only=True)
class Request:
    """What a suite is asked to do.

    lengths: context lengths in tokens, ascending. limit: samples; None for the suite's own. precision: half-width of
    the 95% interval that ends a sampled task early. journals: where finished samples and parts are kept. readings,
    details, parts, failed: what suites say beside their metrics.
    """

    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    lengths: Sequence[int]
    limit: int | None = None
    seed: int = 0
    data_dir: Path | None = None
    device: str | None = None
    batch_size: int = 16
    precision: float | None = None
    journals: Journals | None = None
    readings: list[Reading] = field(default_factory=list)
    details: dict[str, Any] = field(default_factory=dict)
    parts: list[Part] = field(default_factory=list)
    failed: list[Failure] = field(default_factory=list)

    @property
    def torch_device(self) -> torch.device:
        """Where the model runs."""
        import torch

        return torch.device(self.device or self.model.device)

    @contextmanager
    def surviving(self, suite: str, task: str, length: int | None) -> Iterator[None]:
        """Notes that memory ran out within the block, frees it and goes on: a result, and not the end of all others."""
        from halobench.tasks.memory import release

        ran_out = False
        try:
            yield
        except Exception as error:
            if not is_out_of_memory(error):
                raise
            ran_out = True
        if ran_out:  # out here nothing holds on to the tensors of the call that failed
            release()
            self.failed.append(Failure(suite=suite, task=task, length=length, error=OUT_OF_MEMORY))
            say(f"{suite}/{task}" + (f" at {format_length(length)}" if length else "") + f": {OUT_OF_MEMORY}; going on")

    def kept(self, suite: str, task: str, settings: dict[str, Any]) -> Part | None:
        """The part that an earlier run finished with these settings."""
        path = self.journals.part(suite, task, settings) if self.journals is not None else None
        return from_dict(Part, read_json(path), str(path)) if path is not None and path.exists() else None

    def part(
        self,
        suite: str,
        task: str,
        length: int | None,
        settings: dict[str, Any],
        make: Callable[[], tuple[list[Metric], dict[str, Any]]],
    ) -> Part | None:
        """What `make` gives (metrics, details), or an earlier run gave; None where memory ran out.

        Args:
            settings: what decides the numbers, beside the model and all else that the journals know.
        """
        found = self.kept(suite, task, settings)
        if found is not None:
            say(
                f"{suite}/{task}" + (f" at {format_length(length)}" if length else "") + ": done before, taken as it is"
            )
        else:
            with self.surviving(suite, task, length):
                found = self._made(make)
                if self.journals is not None:
                    write_json(self.journals.part(suite, task, settings), to_dict(found))
        if found is not None:
            self.parts.append(found)
        return found

    def _made(self, make: Callable[[], tuple[list[Metric], dict[str, Any]]]) -> Part:
        from halobench.tasks.memory import peak
        from halobench.tasks.scoring import TokenCount

        started = time.monotonic()
        with TokenCount(self.model) as count:
            metrics, details = make()
        seconds = round(time.monotonic() - started, 2)
        return Part(
            metrics=metrics, details=details, tokens=count.tokens, seconds=seconds, peak_bytes=peak(self.torch_device)
        )


class Suite(Protocol):
    """Anything that turns a request into metrics; a function will do.

    Optional attributes: `needs_lengths`, true where it is refused without lengths; `takes`, which of "lengths",
    "data_dir" and "precision" decide its numbers (without it, the first two); `version`, raised when its samples
    change; `files(data_dir)`, the local files it reads, by task; `work(request)`, a list of `Work` for the estimate.
    """

    def __call__(self, request: Request) -> list[Metric]: ...
