"""The oracle: every set of kept layers is converted and measured, so that the true best choice is known.

Seed 0 converts all sets. The sets that selectors chose, and the best of seed 0, are then judged: converted again with
other seeds, which had no say in who was called best. What a selector lost against the best judged set is its regret.
"""

from __future__ import annotations

import math
import os
import shutil
from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import combinations
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from halobench.config import from_dict, to_dict
from halobench.crew import Crew
from halobench.errors import DivergedError, UserError
from halobench.files import read_json, write_json
from halobench.groundwork import Ground, prepare
from halobench.models import default_device
from halobench.planning import teacher_config
from halobench.progress import label_lines, say
from halobench.provenance import versions
from halobench.recipe import Recipe
from halobench.records import Metric, RunRecord
from halobench.surgery.selection import Ranking
from halobench.surgery.selection.sweep import sweep_folder

if TYPE_CHECKING:
    from halobench.pipeline import Conversion


@dataclass(frozen=True, kw_only=True)
class OracleSettings:
    """What the study converts and measures.

    keep: softmax layers of every set. judges: seeds beyond 0 with which chosen and leading sets are converted again.
    leaders: how many of the best sets of seed 0 are judged. lengths: of the needle prompts, as multiples of the length
    the student was distilled at. haystacks: at each length. text_limit: of the perplexity suite.
    most: sets beyond which the study is refused, for every one is a training run.
    """

    keep: int
    judges: int = 3
    leaders: int = 4
    lengths: tuple[int, ...] = (1, 2, 4, 8)
    haystacks: int = 12
    text_limit: int = 8
    most: int = 500

    def __post_init__(self) -> None:
        if self.judges < 2 or self.leaders < 0 or min(self.haystacks, self.text_limit, self.most) < 1:
            raise UserError(
                f"the oracle was given judges={self.judges}, leaders={self.leaders}, haystacks={self.haystacks}, "
                f"most={self.most}; judges must be 2 or more (their spread is the noise), leaders not negative, the "
                "others 1 or more"
            )

    def sets(self, layers: int) -> list[tuple[int, ...]]:
        """Every set of `keep` of `layers` layers; UserError when they are too many to convert."""
        if not 0 < self.keep < layers:
            raise UserError(f"--keep {self.keep} leaves no choice among {layers} layers; keep 1 to {layers - 1}")
        count = math.comb(layers, self.keep)
        if count > self.most:
            raise UserError(
                f"keeping {self.keep} of {layers} layers can be done in {count:,} ways and each is a training run; "
                f"the oracle converts at most {self.most} (--most)"
            )
        return list(combinations(range(layers), self.keep))


@dataclass(frozen=True)
class Cell:
    """One conversion of the study."""

    kept: tuple[int, ...]
    seed: int

    @property
    def name(self) -> str:
        """Its file name, such as 2-7-s0."""
        return f"{'-'.join(map(str, self.kept))}-s{self.seed}"


def run_oracle(
    teacher: str, recipe: Recipe, methods: Sequence[str], settings: OracleSettings, folder: Path, workers: int | None
) -> Path:
    """Converts and measures everything, resuming what is there; returns the path of the record."""
    recipe = replace(recipe, keep=settings.keep)
    sets = settings.sets(teacher_config(teacher).num_hidden_layers)
    ground = Ground(teacher=teacher, recipe=recipe, folder=folder / "base", device=default_device())
    base = ground.open()
    cells = _cells(folder, settings)
    with Crew(workers or max(1, len(os.sched_getaffinity(0)))) as crew:
        unranked = [method for method in methods if not _ranking(folder, method).exists()]
        prepare(ground, crew, unranked)
        crew.do([(_rank, ground, folder, method) for method in unranked])
        rankings = [from_dict(Ranking, read_json(_ranking(folder, method)), method) for method in methods]
        chosen = list(dict.fromkeys(tuple(r.layers) for r in rankings))
        say(f"oracle: {len(sets)} sets of {settings.keep} of {base.layers} layers, {len(chosen)} of them chosen")
        rest = [kept for kept in sets if kept not in chosen]
        np.random.default_rng(0).shuffle(rest)  # what is done first is a fair sample of all
        _convert(crew, ground, settings, cells, [Cell(tuple(kept), 0) for kept in [*chosen, *rest]])
        judged = sorted({*chosen, *_leaders(cells, sets, settings.leaders)})
        say(f"oracle: {len(judged)} sets are judged with {settings.judges} more seeds")
        seeds = range(1, settings.judges + 1)
        _convert(crew, ground, settings, cells, [Cell(kept, seed) for seed in seeds for kept in judged])
    return write_record(base, rankings, settings, folder)


def _ranking(folder: Path, method: str) -> Path:
    return folder / "rankings" / f"{method}.json"


def _rank(ground: Ground, folder: Path, method: str) -> str:
    """One selector's answer, left in its file."""
    label_lines(method)
    answer = ground.open().rank([method])[0]
    write_json(_ranking(folder, method), to_dict(answer))
    return f"{answer.label} keeps {answer.layers}, {answer.cost_tokens:,} tokens"


def write_record(base: Conversion, rankings: Sequence[Ranking], settings: OracleSettings, folder: Path) -> Path:
    """Writes what has been measured so far as one record; returns its path."""
    from halobench.models import card_of
    from halobench.surgery.selection.uncertainty import summary

    cells = [cell for cell in read_cells(folder, settings) if cell["seed"] <= settings.judges]
    record = RunRecord(
        kind="oracle",
        model=card_of(base.teacher_name, base.teacher),
        settings={"recipe": to_dict(base.recipe), "oracle": to_dict(settings)},
        lineage={"align": base.align().hash},
        details={
            "oracle": {
                "keep": settings.keep,
                "layers": base.layers,
                "tokens": base.recipe.distil.tokens + base.recipe.finetune.tokens,
                **summary(list(rankings)),
                "cells": cells,
            }
        },
        backends={"device": base.device},
    )
    return record.save(folder / "oracle.record.json")


def _cells(folder: Path, settings: OracleSettings) -> Path:
    """Where finished conversions are kept; measured in another way they have another place."""
    measured = {name: to_dict(getattr(settings, name)) for name in ("lengths", "haystacks", "text_limit")}
    return sweep_folder(folder, "cells", {**measured, "halobench": versions()["halobench"]})


def read_cells(folder: Path, settings: OracleSettings) -> list[dict[str, Any]]:
    """The finished conversions, in the order of their sets and seeds."""
    cells = [read_json(path) for path in _cells(folder, settings).glob("*-s*.json")]
    return sorted(cells, key=lambda cell: (cell["seed"], cell["kept"]))


def _convert(crew: Crew, ground: Ground, settings: OracleSettings, folder: Path, cells: Sequence[Cell]) -> None:
    missing = [cell for cell in cells if not _file(folder, cell).exists()]
    crew.do([(_convert_one, ground, settings, folder, cell) for cell in missing])


def _file(folder: Path, cell: Cell) -> Path:
    return folder / f"{cell.name}.json"


def _convert_one(ground: Ground, settings: OracleSettings, folder: Path, cell: Cell) -> str:
    """One conversion from the common alignment to a row of numbers; the weights are not kept."""
    from halobench.evaluation import EvalRequest, evaluate_model
    from halobench.pipeline import Conversion

    label_lines(cell.name)
    run = folder / "running" / cell.name
    row: dict[str, Any] = {"kept": list(cell.kept), "seed": cell.seed}
    try:
        conversion = Conversion(
            ground.teacher,
            replace(ground.recipe, seed=cell.seed, select="given"),
            run,
            device=ground.device,
            given=cell.kept,
            aligned=ground.folder,
        )
        conversion.convert()
        trained = max(conversion.recipe.distil.lengths)
        lengths = tuple(trained * times for times in settings.lengths)
        request = EvalRequest(
            suites=("niah", "ppl"),
            lengths=lengths,
            limits=(("niah", settings.haystacks), ("ppl", settings.text_limit)),
        )
        record = evaluate_model(str(run), run / "eval", request, conversion.device)
        row |= {"ledger": [to_dict(line) for line in record.model.ledger], "metrics": _brief(record.metrics, settings)}
        said = _headline(cell, record.metrics)
    except DivergedError as error:  # a conversion that diverges is a result
        row |= {"error": str(error), "metrics": []}
        said = f"{cell.name}: {error}"
    write_json(_file(folder, cell), row)
    shutil.rmtree(run, ignore_errors=True)
    return said


def _brief(metrics: Sequence[Metric], settings: OracleSettings) -> list[dict[str, Any]]:
    """The metrics a verdict rests on. A sample is a haystack (the mean over its questions) or a document."""
    rows = []
    for m in metrics:
        samples = np.array(m.samples or [m.value])
        if m.suite == "niah":
            samples = samples.reshape(settings.haystacks, -1).mean(1)
        row = {"suite": m.suite, "task": m.task, "metric": m.metric, "length": m.length, "value": round(m.value, 5)}
        rows.append({**row, "samples": [round(float(x), 4) for x in samples]})
    return rows


def _headline(cell: Cell, metrics: Sequence[Metric]) -> str:
    def values(suite: str, metric: str) -> str:
        return " ".join(f"{m.value:.2f}" for m in metrics if (m.suite, m.metric) == (suite, metric))

    return f"needles {values('niah', 'accuracy')}, bits per byte {values('ppl', 'bits_per_byte').split()[0]}"


def _leaders(folder: Path, sets: Sequence[tuple[int, ...]], count: int) -> list[tuple[int, ...]]:
    """The sets with the highest answer log-likelihood, averaged over lengths, in seed 0."""
    scores = {kept: _recall(read_json(_file(folder, Cell(kept, 0)))["metrics"]) for kept in sets}
    return sorted(scores, key=lambda kept: -scores[kept])[:count]


def _recall(metrics: Sequence[dict[str, Any]]) -> float:
    found = [m["value"] for m in metrics if m["metric"] == "answer_logprob"]
    return float(np.mean(found)) if found else -math.inf
