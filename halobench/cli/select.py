"""`halobench select`: ranks layers by many methods, from an aligned run or from a file of scores."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from halobench.cli import options

if TYPE_CHECKING:
    from halobench.pipeline import Conversion
    from halobench.surgery.selection import Ranking, Selector

Method = Annotated[list[str] | None, typer.Option(help="Selector; repeatable. See `halobench selectors`.")]
Setting = Annotated[
    list[str] | None, typer.Option("--option", help="Of a selector: halo.denominator=floored. Repeatable.")
]
COLUMNS = """certainty: share of bootstrap resamples of the measured samples in which the layer is kept
stability: how far the order of all layers is that of the resamples: 1 the same, 0 unrelated (Kendall's tau)
cannot be told apart: layers on both sides of the cut that the samples do not separate (95%)
tokens: what the scores took to measure; – where nothing was measured, or the scores do not say"""
AGREEMENT = """upper right: Kendall's tau of two orders of all layers: 1 the same, 0 unrelated, -1 reversed
lower left: how many kept layers two methods share"""


def select(
    run: Annotated[Path | None, typer.Argument(help="A run that has finished `align`.")] = None,
    scores: Annotated[Path | None, typer.Option(help="A file of layer scores instead of a run.")] = None,
    method: Method = None,
    option: Setting = None,
    keep: options.Keep = None,
    layers: options.Layers = None,
    seed: Annotated[int | None, typer.Option(help="Of `random` and of the bootstrap. The run's, or 0.")] = None,
    device: options.Device = None,
    as_json: options.Json = False,
) -> None:
    """Rank layers by one or more methods; says which stay softmax and how sure that is.

    Without --method: of a file, every method that it has scores for; of a run, every method that trains nothing.
    """
    from halobench.errors import UserError
    from halobench.surgery.selection.uncertainty import summary

    if (run is None) == (scores is None):
        raise UserError("select needs either a run with an aligned checkpoint or --scores FILE, and not both")
    if seed is not None and seed < 0:
        raise UserError(f"--seed {seed} is below 0; give 0 or more")
    given = options.parse_layers(layers)
    methods = list(dict.fromkeys(method)) if method else None
    if given is not None and methods is not None and "given" not in methods:
        raise UserError(f"--layers is for the method `given`, not for {', '.join(methods)}; add --method given")
    settings = _settings(option, methods)
    if scores is not None:
        count, rankings = _from_scores(scores, methods, settings, keep, given, seed or 0)
    else:
        assert run is not None
        count, rankings = _from_run(run, methods, settings, keep, given, seed, options.device_or_default(device))
    if as_json:
        print(json.dumps({"keep": count, **summary(rankings)}, allow_nan=False))
    else:
        _show(count, rankings)


def _settings(option: list[str] | None, methods: list[str] | None) -> dict[str, dict[str, Any]]:
    """--option NAME.FIELD=VALUE, by name and field; the value is read as YAML."""
    import yaml

    from halobench.errors import UserError
    from halobench.surgery.selection import SELECTORS

    found: dict[str, dict[str, Any]] = {}
    for text in option or []:
        path, equals, value = text.partition("=")
        name, dot, field = path.partition(".")
        if not (equals and dot and name and field):
            raise UserError(f"--option {text!r} is not of the form method.option=value, as halo.cap=50 is")
        if name not in SELECTORS.names():
            SELECTORS.get(name)
        if methods is not None and name not in methods:
            raise UserError(f"--option {text!r}: {name} is not among the methods asked for ({', '.join(methods)})")
        try:
            found.setdefault(name, {})[field] = yaml.safe_load(value)
        except yaml.YAMLError as error:
            raise UserError(f"--option {text!r}: {value!r} is not a value that YAML can read") from error
    return found


def _count(keep: float | None, given: tuple[int, ...] | None, layers: int, default: int) -> int:
    """How many layers to keep: --keep, a number or a share below 1; or as many as --layers names."""
    from halobench.errors import UserError

    if keep is None:
        return default if given is None else len(given)
    if not math.isfinite(keep) or keep < 0 or (keep > 1 and not keep.is_integer()):
        raise UserError(f"--keep {keep:g} is neither a number of layers nor a share below 1; write 7 or 0.25")
    count = int(keep) if keep >= 1 else int(keep * layers + 1e-9)  # 0.29 of 100 is 29
    if keep and not count:
        raise UserError(f"--keep {keep:g} of {layers} layers is less than one; write --keep 1, or --keep 0 for none")
    if given is not None and count != len(given):
        raise UserError(f"--keep {keep:g} means {count} layers and --layers names {len(given)}; leave out one of them")
    return count


def _from_scores(
    path: Path,
    methods: list[str] | None,
    settings: dict[str, dict[str, Any]],
    keep: float | None,
    given: tuple[int, ...] | None,
    seed: int,
) -> tuple[int, list[Ranking]]:
    """The rankings that a file of scores allows; without `methods`, what it does not allow is said and left out."""
    from halobench.errors import UserError
    from halobench.progress import say
    from halobench.surgery.selection import Question
    from halobench.surgery.selection.scores_file import read_scores

    evidence = read_scores(path)
    layers = evidence.num_layers
    count = _count(keep, given, layers, max(1, layers // 4))
    question = Question(layers=layers, keep=count, seed=seed, evidence=evidence, given=given)
    rankings = []
    for selector in _selectors(methods or _all(given), settings):
        try:
            rankings.append(selector.rank(question))
        except UserError as error:
            if methods is not None:
                raise
            say(f"{selector.name} is left out: {error}")
            continue
        if selector.needs and rankings[-1].stderr is None:
            say(f"{selector.name}: no uncertainty, for it needs two or more samples a task, as many for every layer")
    return count, rankings


def _from_run(
    run: Path,
    methods: list[str] | None,
    settings: dict[str, dict[str, Any]],
    keep: float | None,
    given: tuple[int, ...] | None,
    seed: int | None,
    device: str,
) -> tuple[int, list[Ranking]]:
    """The rankings of an aligned run; what they need is measured, and its price said before."""
    from dataclasses import replace

    from halobench.evidence import prices, question
    from halobench.progress import say
    from halobench.surgery.selection import Question
    from halobench.units import format_count

    conversion = _conversion(run, device)
    count = _count(keep, given, conversion.layers, conversion.recipe.kept_count(conversion.layers))
    Question(layers=conversion.layers, keep=count)  # refuses what cannot be, before anything is measured
    stored = conversion.recipe.selector_options
    names = methods or _all(given)
    selectors = _selectors(names, {n: {**stored.get(n, {}), **settings.get(n, {})} for n in names})
    if any(s.needs for s in selectors):
        cost = replace(prices(conversion), keep=count)
        for s in selectors:
            left_out = methods is None and s.needs & {"redistilled", "workbench"}
            if s.needs:
                ending = f"; not run unless named, for it trains or searches: --method {s.name}" if left_out else ""
                say(f"{s.name}: about {format_count(s.price(cost))} tokens{ending}")
    if methods is None:
        selectors = [s for s in selectors if not s.needs & {"redistilled", "workbench"}]
    asked = question(conversion, frozenset().union(*(s.needs for s in selectors)), count, given)
    asked = asked if seed is None else replace(asked, seed=seed)
    return count, [conversion.timed(selector, asked) for selector in selectors]


def _conversion(run: Path, device: str) -> Conversion:
    """The conversion that `run` holds, as it was begun."""
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
    layers = tuple(begun["identity"]["layers"] or ()) or None
    return Conversion(begun["teacher"], recipe, run, device=device, given=layers)


def _all(given: tuple[int, ...] | None) -> list[str]:
    from halobench.surgery.selection import SELECTORS

    return [name for name in SELECTORS.names() if name != "given" or given is not None]


def _selectors(names: list[str], settings: dict[str, dict[str, Any]]) -> list[Selector]:
    from halobench.surgery.selection import make_selector

    return [make_selector(name, settings.get(name)) for name in names]


def _show(count: int, rankings: list[Ranking]) -> None:
    """The same for people."""
    from rich.console import Console
    from rich.table import Table

    from halobench.surgery.selection.uncertainty import agreement

    console = Console()
    if not console.is_terminal:
        console = Console(width=120)
    table = Table("method", "kept layers", "certainty", "stability", "cannot be told apart", "tokens")
    for r in rankings:
        share = r.membership
        table.add_row(
            r.label,
            ", ".join(map(str, r.layers)) or "none",
            "–" if share is None else ", ".join(f"{i}: {share[i]:.0%}" for i in r.layers),
            "–" if r.stability is None else f"{r.stability:.2f}",
            "–" if r.tied is None else ", ".join(map(str, r.tied)) or "none",
            f"{r.cost_tokens:,}" if r.cost_tokens else "–",
        )
    console.print(table)
    print(COLUMNS)
    if len(rankings) < 2:
        return
    found = agreement(rankings)
    matrix = Table("", *(str(i + 1) for i in range(len(rankings))))
    for i, r in enumerate(rankings):
        cells = [
            f"{round(found['tau'][i][j], 2) + 0.0:.2f}" if j > i else f"{found['overlap'][i][j]:.0f}" if j < i else "·"
            for j in range(len(rankings))
        ]
        matrix.add_row(f"{i + 1} {r.label}", *cells)
    console.print(matrix)
    print(f"{AGREEMENT}, of {count}")
