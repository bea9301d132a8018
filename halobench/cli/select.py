"""`halobench select`: ranks layers, from an aligned run or from a file of scores."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from halobench.cli import options

if TYPE_CHECKING:
    from halobench.surgery.selection import Ranking


def select(
    run: Annotated[Path | None, typer.Argument(help="A run that has finished `align`.")] = None,
    scores: Annotated[Path | None, typer.Option(help="A file of layer scores instead of a run.")] = None,
    method: Annotated[list[str] | None, typer.Option(help="Selector; repeatable. All that fit by default.")] = None,
    keep: options.Keep = None,
    layers: options.Layers = None,
    seed: Annotated[int, typer.Option(help="Of `random` and of the bootstrap.")] = 0,
    device: options.Device = None,
    as_json: options.Json = False,
) -> None:
    """Rank layers by one or more methods; says which stay softmax and how sure that is."""
    from halobench.errors import UserError

    if (run is None) == (scores is None):
        raise UserError("select needs either a run with an aligned checkpoint or --scores FILE, and not both")
    given = options.parse_layers(layers)
    if scores is not None:
        count, rankings = _from_scores(scores, method, keep, seed, given)
    else:
        assert run is not None
        count, rankings = _from_run(run, method, keep, given, options.device_or_default(device))
    if as_json:
        print(json.dumps({"keep": count, "methods": {r.method: r.to_json() for r in rankings}}))
    else:
        _show(rankings)


def _from_scores(
    path: Path, method: list[str] | None, keep: float | None, seed: int, given: tuple[int, ...] | None
) -> tuple[int, list[Ranking]]:
    from halobench.surgery.selection import SELECTORS, Question
    from halobench.surgery.selection.evidence import read_evidence

    evidence = read_evidence(path)
    count = len(given) if given and keep is None else _count(keep, evidence.num_layers)
    names = method or [n for n in _fitting(given) if n != "kl-ls" or evidence.restored]
    question = Question(layers=evidence.num_layers, keep=count, seed=seed, evidence=evidence, given=given)
    return count, [SELECTORS.get(name)().rank(question) for name in names]


def _from_run(
    run: Path, method: list[str] | None, keep: float | None, given: tuple[int, ...] | None, device: str
) -> tuple[int, list[Ranking]]:
    from dataclasses import replace

    from halobench.config import from_dict
    from halobench.errors import UserError
    from halobench.files import read_json
    from halobench.pipeline import Conversion
    from halobench.recipe import Recipe

    if not (run / "align" / "stage.json").exists():
        raise UserError(
            f"{run} holds no aligned checkpoint; `halobench convert TEACHER -o {run} --until align` makes one"
        )
    begun = read_json(run / "run.json")
    recipe = from_dict(Recipe, begun["identity"]["recipe"], "recipe")
    conversion = Conversion(
        begun["teacher"], recipe, run, device=device, given=tuple(begun["identity"]["layers"] or ()) or None
    )
    conversion.given = given
    if keep is not None:
        conversion.recipe = replace(recipe, keep=int(keep) if float(keep).is_integer() else keep)
    return conversion.recipe.kept_count(conversion.layers), conversion.rank(method or _fitting(given))


def _fitting(given: tuple[int, ...] | None) -> list[str]:
    from halobench.surgery.selection import SELECTORS

    return [name for name in SELECTORS.names() if name != "given" or given]


def _count(keep: float | None, layers: int) -> int:
    share = 0.25 if keep is None else keep
    return int(share) if share >= 1 else int(share * layers)


def _show(rankings: list[Ranking]) -> None:
    from rich.console import Console
    from rich.table import Table

    table = Table("method", "kept layers", "certainty", "tokens", title=None)
    for r in rankings:
        sure = "–" if r.membership is None else ", ".join(f"{i}: {r.membership[i]:.0%}" for i in r.layers)
        table.add_row(r.label, ", ".join(map(str, r.layers)), sure, f"{r.cost_tokens:,}")
    Console().print(table)
    print("certainty: share of bootstrap resamples of the evidence in which the layer is kept")
