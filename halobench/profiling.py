"""Profiles of models, each in a fresh process, or of models in turns in one; records that grow row by row."""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from multiprocessing import get_context
from multiprocessing.connection import Connection
from pathlib import Path
from typing import TYPE_CHECKING, Any

from halobench.config import to_dict
from halobench.crew import end_with_parent
from halobench.errors import HalobenchError, UserError, is_out_of_memory, unknown_name
from halobench.models import resolve
from halobench.profile_rows import MeasuredRows
from halobench.records import RunRecord, read_record
from halobench.shapes import preset_of

if TYPE_CHECKING:
    import torch

DTYPES = {"bf16": "bfloat16", "fp16": "float16", "fp32": "float32"}
_PATIENCE = 10.0  # seconds that a process may take to end when it is asked to


@dataclass(frozen=True, kw_only=True)
class ProfileRequest:
    """What to measure. contexts: tokens; batches: sequences at a time; others as in `Rounds`.

    dtype: one of DTYPES; None is bf16 on a GPU and fp32 on a CPU.
    kernels: the form of the mixers' operators, one of `kernels.backend.BACKENDS`.
    """

    contexts: tuple[int, ...]
    device: str
    batches: tuple[int, ...] = (1,)
    dtype: str | None = None
    new_tokens: int = 16
    repeats: int = 3
    chunk: int = 4096
    kernels: str = "auto"

    def check(self) -> None:
        """Raises UserError for what can be known to be wrong before any model is loaded."""
        if self.dtype is not None and self.dtype not in DTYPES:
            raise unknown_name("dtype", self.dtype, DTYPES)
        counts = {"--batch": min(self.batches), "--new-tokens": self.new_tokens, "--repeats": self.repeats}
        for option, value in counts.items():
            if value < 1:
                raise UserError(f"{option} {value} leaves nothing to measure; give 1 or more")

    def cells(self) -> list[tuple[int, int]]:
        """(context, batch), the smaller first, so that what runs out of memory comes last."""
        return [(context, batch) for batch in sorted(set(self.batches)) for context in sorted(set(self.contexts))]

    def torch_dtype(self) -> torch.dtype:
        """The dtype asked for."""
        import torch

        return getattr(torch, DTYPES[self.dtype or ("fp32" if self.device == "cpu" else "bf16")])


@dataclass(frozen=True, kw_only=True)
class Job:
    """What one process does: models in turns. With `paired` the first is what the others are held against."""

    names: tuple[str, ...]
    out: Path
    request: ProfileRequest
    paired: bool

    def settings(self) -> dict[str, Any]:
        """What decides the numbers beside the models, as plain data."""
        settings = asdict(self.request) | {"dtype": str(self.request.torch_dtype()).removeprefix("torch.")}
        return to_dict(settings | {"in_turns": self.names if len(self.names) > 1 else ()})


def profile_models(
    names: Sequence[str], out: Path, request: ProfileRequest, *, vs: str | None = None
) -> list[RunRecord]:
    """Speed and memory of each model, in a process of its own; what an earlier profile in `out` measured is taken.

    Args:
        names: model folders, runs, hub names, `tiny`, or presets (see `shapes.preset_of`).
        out: where the records go.
        vs: all models take turns with this one in one process, so that the machine's moods fall on all alike, and
            their ratios to it are in their records.

    Raises:
        UserError: an unknown model or setting, or a preset that does not fit into memory.
    """
    request.check()
    others = [name for name in dict.fromkeys(names) if name != vs]
    for name in [*others, *([] if vs is None else [vs])]:
        if preset_of(name) is None:
            resolve(name)
    if not others:
        raise UserError(f"--vs {vs} is the only model; name another to hold against it")
    teams = [(name,) for name in others] if vs is None else [(vs, *others)]
    jobs = [Job(names=team, out=out, request=request, paired=vs is not None) for team in teams]
    return [record for job in jobs for record in measure_apart(job)]


def measure_apart(job: Job) -> list[RunRecord]:
    """Does a job in a fresh process, and in another where the system ends one for lack of memory."""
    for _ in range(len(job.request.cells()) + 1):
        told, code = _run(job)
        if isinstance(told.get("error"), HalobenchError):
            raise told["error"]
        if "records" in told:
            return [read_record(path) for path in told["records"]]
        killed = code is not None and code < 0 and "rows" in told
        if not (killed and MeasuredRows(told["rows"]).note_killed()):
            what = f"was ended by signal {-code}" if code is not None and code < 0 else f"failed with code {code}"
            raise HalobenchError(f"the process that profiled {', '.join(job.names)} {what}; run again to resume")
    raise HalobenchError(f"the process that profiled {', '.join(job.names)} was ended again and again")


def _run(job: Job) -> tuple[dict[str, Any], int | None]:
    """One process: what it told, and its exit code."""
    spawn = get_context("spawn")
    receiver, sender = spawn.Pipe(duplex=False)
    process = spawn.Process(target=_work, args=(job, sender))
    with _interrupts_kept_from_children():
        process.start()
    sender.close()
    told: dict[str, Any] = {}
    try:
        while True:
            told |= receiver.recv()
    except EOFError:
        process.join()
        return told, process.exitcode
    except KeyboardInterrupt:
        process.terminate()
        process.join(_PATIENCE)
        process.kill()
        process.join()
        raise


@contextmanager
def _interrupts_kept_from_children() -> Iterator[None]:
    """Ctrl-C reaches all processes of a terminal; the parent alone is to act on it."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    own = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, own)


def _work(job: Job, sender: Connection) -> None:
    """The fresh process."""
    threading.Thread(target=end_with_parent, args=(os.getppid(),), daemon=True).start()
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        from halobench.profile_team import Team

        team = Team(job)
        sender.send({"rows": team.measured.folder})
        sender.send({"records": team.run()})
    except KeyboardInterrupt:
        return  # the parent asked, and what was measured is written
    except HalobenchError as error:
        sender.send({"error": error})
    except (MemoryError, RuntimeError) as error:
        if not is_out_of_memory(error):
            raise
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        sender.send({"error": HalobenchError(f"out of memory while loading {', '.join(job.names)}: {reason}")})
