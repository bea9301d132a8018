"""The whole story on the embedded teacher: one alignment, four ways to choose, conversions side by side, a report."""

from __future__ import annotations

import os
import time
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

from halobench.crew import Crew
from halobench.evaluation import EvalRequest, evaluate_model
from halobench.groundwork import Ground, prepare
from halobench.models import card_of
from halobench.profiling import ProfileRequest, profile_models
from halobench.progress import label_lines, say
from halobench.recipe import Recipe
from halobench.records import RunRecord
from halobench.units import format_seconds

if TYPE_CHECKING:
    from halobench.pipeline import Conversion
    from halobench.surgery.selection import Ranking

METHODS = ["halo", "jet-nemotron", "joint", "even"]
LENGTHS = (512, 1024, 2048, 4096, 8192)  # to sixteen times the teacher's training length
CONTEXTS = (512, 4096)
REQUESTS = (
    EvalRequest(suites=("continuation", "niah"), lengths=LENGTHS, limits=(("continuation", 160), ("niah", 12))),
    EvalRequest(suites=("ppl",), lengths=LENGTHS[::2], limits=(("ppl", 8),)),  # the same novels at each
)


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
    ground = Ground(teacher="tiny", recipe=recipe, folder=folder / "base", device="cpu")
    base = ground.open()
    say(f"teacher: tiny, {base.layers} layers, {card_of('tiny', base.teacher).parameters:,} parameters")
    with Crew(workers or max(1, len(os.sched_getaffinity(0)))) as crew:
        prepare(ground, crew, METHODS)
        rankings = base.rank(METHODS)
        _record_selection(base, rankings, folder)
        variants = plan_variants(rankings)
        say(f"convert: {len(variants)} students for {len(rankings)} selectors and the RoPE contrast")
        crew.do([*((_convert, v, recipe, folder) for v in variants), (_evaluate_teacher, folder)])
    say("profile: teacher and students take turns, the machine otherwise idle")
    request = ProfileRequest(contexts=CONTEXTS, device="cpu")
    profile_models([str(folder / v.name) for v in variants], folder / "profile", request, vs="tiny")
    write_report([folder], folder)
    say(f"finished in {format_seconds(time.monotonic() - started)}; the plots and tables are beside these two:")
    for name in ("leaderboard.md", "report.html"):
        say(f"  {folder / name}")
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
    return _evaluate(str(run), folder)


def _evaluate_teacher(folder: Path) -> str:
    label_lines("teacher")
    return _evaluate("tiny", folder)


def _evaluate(model: str, folder: Path) -> str:
    records = [evaluate_model(model, folder / "eval", request, "cpu") for request in REQUESTS]
    return _headline(records[-1])  # which has what the first had


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
