"""The whole story on the embedded teacher: one alignment, five ways to choose, conversions side by side, a report."""

from __future__ import annotations

import os
import signal
import socket
import threading
import time
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import dataclass, replace
from multiprocessing import get_context
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any

from halobench.evaluation import EvalRequest, evaluate_model, profile_models
from halobench.models import card_of
from halobench.progress import label_lines, say
from halobench.recipe import Recipe
from halobench.records import RunRecord
from halobench.units import format_seconds

if TYPE_CHECKING:
    from halobench.pipeline import Conversion
    from halobench.surgery.selection import Ranking

METHODS = ["halo", "kl-ls", "jet-nemotron", "even", "random"]
LENGTHS = (512, 1024, 2048, 4096, 8192)  # to sixteen times the teacher's training length
CONTEXTS = [512, 4096]
REQUEST = EvalRequest(suites=("csr", "niah", "ppl"), lengths=LENGTHS, limits=(("csr", 160), ("niah", 12), ("ppl", 8)))


@dataclass(frozen=True, kw_only=True)
class Variant:
    """One conversion of the demo: layers that some selectors chose, with or without HyPE."""

    name: str
    credit: tuple[Ranking, ...]
    hype: bool

    @property
    def layers(self) -> tuple[int, ...]:
        """The kept layers."""
        return tuple(self.credit[0].layers)


def run_demo(folder: Path, recipe: Recipe, workers: int | None) -> Path:
    """Runs everything in `folder`, resuming what is there; returns the leaderboard's path."""
    from halobench.reports import write_report

    started = time.monotonic()
    base = _base(folder, recipe)
    say(f"teacher: tiny, {base.layers} layers, {card_of('tiny', base.teacher).parameters:,} parameters")
    with Crew(workers or max(1, len(os.sched_getaffinity(0)))) as crew:
        if base.run.note("align") is None:
            port = _free_port()
            crew.do([(_align, folder, recipe, rank, crew.size, port) for rank in range(crew.size)])
        if not (folder / "base" / "select" / "evidence.json").exists():
            parts: list[list[int | None]] = [[] for _ in range(crew.size)]
            for place, layer in enumerate([None, *range(base.layers)]):
                parts[place % crew.size].append(layer)
            crew.do([(_measure, folder, recipe, part) for part in parts])
        rankings = base.rank(METHODS)
        _record_selection(base, rankings, folder)
        variants = plan_variants(rankings)
        say(f"convert: {len(variants)} students for {len(rankings)} selectors and the RoPE contrast")
        crew.do([*((_convert, v, recipe, folder) for v in variants), (_evaluate_teacher, folder)])
    say("profile: teacher and students take turns, the machine otherwise idle")
    profile_models(["tiny", *(str(folder / v.name) for v in variants)], CONTEXTS, folder / "profile", "cpu")
    paths = write_report([folder], folder)
    say(f"finished in {format_seconds(time.monotonic() - started)}; look at:")
    for path in paths:
        say(f"  {path}")
    return folder / "leaderboard.md"


def plan_variants(rankings: list[Ranking]) -> list[Variant]:
    """One variant for each different set of layers, and HALO's choice with RoPE kept in its softmax layers."""
    groups: dict[tuple[int, ...], list[Ranking]] = {}
    for ranking in rankings:
        groups.setdefault(tuple(ranking.layers), []).append(ranking)
    variants = [
        Variant(name="keep-" + "-".join(map(str, layers)), credit=tuple(credit), hype=True)
        for layers, credit in groups.items()
    ]
    halo = next(r for r in rankings if r.method == "halo")
    return [*variants, Variant(name="rope-" + "-".join(map(str, halo.layers)), credit=(halo,), hype=False)]


class Crew:
    """Processes of one thread that take jobs. Ctrl-C reaches the parent alone, which asks them to save and stop."""

    def __init__(self, size: int) -> None:
        self.size = size

    def __enter__(self) -> Crew:
        os.environ["OMP_NUM_THREADS"] = "1"  # read by the workers when they start
        self._pool = ProcessPoolExecutor(self.size, mp_context=get_context("spawn"), initializer=_start_worker)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        del os.environ["OMP_NUM_THREADS"]
        if kind is not None:
            for process in list((self._pool._processes or {}).values()):
                process.terminate()
        self._pool.shutdown(cancel_futures=True)

    def do(self, jobs: list[tuple[Any, ...]]) -> None:
        """Runs jobs (a function and its arguments each) and says what each has to say; the first failure ends all."""
        for future in as_completed([self._pool.submit(*job) for job in jobs]):
            said = future.result()
            if said:
                say(said)


def _start_worker() -> None:
    import torch

    threading.Thread(target=_end_with_parent, args=(os.getppid(),), daemon=True).start()
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    torch.set_num_threads(1)


def _end_with_parent(parent: int) -> None:
    """A parent that was killed cannot stop its workers; they notice."""
    while os.getppid() == parent:
        time.sleep(1.0)
    os._exit(1)


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def _base(folder: Path, recipe: Recipe) -> Conversion:
    """The run whose alignment and sweep all conversions share."""
    from halobench.pipeline import Conversion

    return Conversion("tiny", recipe, folder / "base", device="cpu")


def _align(folder: Path, recipe: Recipe, rank: int, size: int, port: int) -> None:
    """One process of those that share the alignment's batches."""
    import torch.distributed as dist

    place = {"RANK": rank, "WORLD_SIZE": size, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    os.environ.update({name: str(value) for name, value in place.items()})
    try:
        _base(folder, recipe).align()
    finally:
        for name in place:
            del os.environ[name]
        if dist.is_initialized():
            dist.destroy_process_group()


def _measure(folder: Path, recipe: Recipe, layers: list[int | None]) -> None:
    from halobench.evidence import measure

    measure(_base(folder, recipe), folder / "base" / "select", layers)


def _convert(variant: Variant, recipe: Recipe, folder: Path) -> str:
    from halobench.pipeline import Conversion

    label_lines(variant.name)
    run = folder / variant.name
    Conversion(
        "tiny",
        replace(recipe, hype=variant.hype, select="given"),
        run,
        device="cpu",
        given=variant.layers,
        aligned=folder / "base",
        credit=variant.credit,
    ).convert()
    return _headline(evaluate_model(str(run), folder / "eval", REQUEST, "cpu"))


def _evaluate_teacher(folder: Path) -> str:
    label_lines("teacher")
    return _headline(evaluate_model("tiny", folder / "eval", REQUEST, "cpu"))


def _record_selection(base: Conversion, rankings: list[Ranking], folder: Path) -> None:
    """Writes the record of all selectors' answers, and tells them."""
    keep = len(rankings[0].layers)
    RunRecord(
        kind="select",
        model=card_of(base.teacher_name, base.teacher),
        details={"selection": {"keep": keep, "methods": {r.method: r.to_json() for r in rankings}}},
        backends={"device": base.device},
    ).save(folder / "selection.record.json")
    for r in rankings:
        sure = (
            ""
            if r.membership is None
            else f" (in {', '.join(f'{r.membership[i]:.0%}' for i in r.layers)} of resamples)"
        )
        say(f"select: {r.label} keeps {r.layers}{sure}")


def _headline(record: RunRecord) -> str:
    """One line of a model's results for the story."""
    needles = [m for m in record.metrics if m.suite == "niah" and m.metric == "accuracy"]
    bits = [m for m in record.metrics if m.metric == "bits_per_byte"]
    shown = " ".join(f"{m.value:.2f}@{m.length}" for m in needles)
    return f"result: {record.model.name}: needles {shown}, bits per byte {' / '.join(f'{m.value:.3f}' for m in bits)}"
