"""`halobench tune-scale`: the scale of queries without positions, found anew for a finished hybrid."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from halobench.cli import options

if TYPE_CHECKING:
    from halobench.surgery.stages.scale import FoundScale

RECORD = "tune-scale.json"
CANDIDATES = "none,2,5,10,20,50,100,200,500,1k,2k,5k,10k"
BEYOND = (2, 4, 8)  # times the training length


def tune_scale(
    model: Annotated[str, typer.Argument(help="A finished run or a hybrid's folder.")],
    out: options.Out = Path("runs/tune-scale"),
    data: Annotated[
        str | None, typer.Option(help="Text to judge by, its held-out part; by default the run's own, else `sample`.")
    ] = None,
    lengths: Annotated[
        str | None, typer.Option(help="Of the sequences; by default 2, 4 and 8 times the training length.")
    ] = None,
    candidates: Annotated[
        str, typer.Option(help="Values of a, all tried; none is no scaling, 1k is a thousand.")
    ] = CANDIDATES,
    refine: Annotated[int, typer.Option(help="How many more values to try around the best.")] = 4,
    sequences: Annotated[int, typer.Option(help="Sequences at each length.")] = 8,
    planted: Annotated[float, typer.Option(help="Share of them with planted retrieval; the paper has text alone.")] = 0,
    write: Annotated[bool, typer.Option("--write", help="Set the best a in the model's config.json.")] = False,
    device: options.Device = None,
    as_json: options.Json = False,
) -> None:
    """Find a of s_t = log_a(t + a) by held-out loss at lengths beyond training, and say what cannot be told apart."""
    from halobench.errors import UserError
    from halobench.files import write_json
    from halobench.models import load, resolve
    from halobench.recipe import ScaleConfig
    from halobench.surgery.heads import check_head
    from halobench.surgery.stages.scale import scaled_layers, search_scale

    where, chosen = Path(resolve(model)), options.device_or_default(device)
    if write and not where.is_dir():
        raise UserError(f"--write sets the scale in a folder, and {model} is none here; leave --write out")
    values = parse_candidates(candidates)
    student, tokenizer = load(model, device=chosen)
    layers = scaled_layers(student)
    check_head(student)
    search = ScaleConfig(candidates=values, lengths=_lengths(lengths, where), sequences=sequences, refine=refine)
    before = student.mixer_modules()[layers[0]].options.logits_scale_base
    source = data or _own_data(model) or "sample"
    found = search_scale(student, _mixture(source, tokenizer, planted), search, chosen)
    if write:
        set_scale(where, found.best)
    settings = {"model": model, "data": source, "planted": planted, "seed": 0, "device": chosen, **vars(search)}
    record = _record(settings, found, before=before, written=write)
    write_json(out / RECORD, record)
    if as_json:
        print(json.dumps(record))
        return
    for line in describe(found, before):
        print(line)
    print(
        f"written to {where / 'config.json'}" if write else "nothing was changed; --write sets it in the model's config"
    )


def parse_candidates(text: str) -> list[float | None]:
    """ "none,50,1k" -> [None, 50.0, 1000.0]."""
    from halobench.errors import UserError

    found: list[float | None] = []
    for part in (p.strip().lower() for p in text.split(",")):
        number = re.fullmatch(r"(\d{1,9}(?:\.\d{1,9})?)(k?)", part)
        if part != "none" and number is None:
            raise UserError(f"candidate {part!r} is not a number; write none,50,1k")
        value = float(number[1]) * (1000 if number[2] else 1) if number else None
        if value is not None and value <= 1:
            raise UserError(f"candidate {part!r} is not above 1, as the base of a logarithm must be; write none,50,1k")
        if value not in found:
            found.append(value)
    return found


def _lengths(text: str | None, folder: Path) -> list[int]:
    """The lengths asked for, or those beyond what the model's card says of its training."""
    from halobench.config import from_dict
    from halobench.errors import UserError
    from halobench.files import read_json
    from halobench.models import CARD
    from halobench.records import ModelCard
    from halobench.units import parse_lengths

    if text is not None:
        return parse_lengths(text)
    card = folder / CARD
    trained = from_dict(ModelCard, read_json(card), str(card)).trained_length if card.is_file() else None
    if trained is None:
        raise UserError(f"{folder} has no card ({CARD}) that says its training length; give --lengths 32k,64k,128k")
    return [times * trained for times in BEYOND]


def _own_data(model: str) -> str | None:
    """The text that a run was trained on, whose held-out part it has not seen."""
    from halobench.files import read_json

    path = Path(model).expanduser() / "run.json"
    return read_json(path)["identity"]["recipe"]["data"] if path.is_file() else None


def _mixture(source: str, tokenizer: Any, share: float) -> Any:
    from halobench.errors import UserError
    from halobench.surgery.corpus import open_text
    from halobench.surgery.planted import Mixture, Planted

    if not 0 <= share <= 1:
        raise UserError(f"--planted {share:g} is not a share; give a number from 0 to 1")
    text = open_text(source, tokenizer, 0)
    return Mixture(text, Planted(tokenizer, text, 0) if share > 0 else None, share, 0)


def set_scale(folder: Path, a: float | None) -> None:
    """Sets a in every softmax layer of the plan in a hybrid's config.json, and in its card that it is another model."""
    from halobench.files import read_json, write_json
    from halobench.models import CARD
    from halobench.provenance import model_hash

    path, card = folder / "config.json", folder / CARD
    config = read_json(path)
    for layer in config["plan"]["layers"]:
        if layer["mixer"] == "softmax":
            layer["options"]["logits_scale_base"] = a
    write_json(path, config)
    if card.is_file():  # or what was measured before would pass for this model's
        write_json(card, {**read_json(card), "hash": model_hash(folder)})


def _record(settings: dict[str, Any], found: FoundScale, *, before: float | None, written: bool) -> dict[str, Any]:
    from halobench.provenance import command_line, environment, now

    return {
        "settings": settings,
        "before": before,
        "written": written,
        **vars(found),
        "command": command_line(),
        "created": now(),
        "environment": environment(),
    }


def describe(found: FoundScale, before: float | None) -> list[str]:
    """The losses as a table, best first, and the answer with what it is worth."""
    from halobench.surgery.stages.scale import scale_name
    from halobench.units import format_length

    lengths = next(iter(found.by_length.values()))
    lines = ["".join(f"{cell:>10}" for cell in ("a", *(format_length(int(n)) for n in lengths), "mean"))]
    for name in sorted(found.losses, key=lambda name: found.losses[name]):
        row = (*found.by_length[name].values(), found.losses[name])
        lines.append(f"{name:>10}" + "".join(f"{loss:>10.4f}" for loss in row))
    error = "" if found.stderr is None else f" +- {found.stderr:.4f}"
    lines.append(
        f"best: a = {scale_name(found.best)}, {found.difference:.4f}{error} nats per token below "
        f"{scale_name(found.runner_up)}; the model has {scale_name(before)}"
    )
    if len(found.alike) > 1:
        lines.append(f"cannot be told apart: {', '.join(map(scale_name, found.alike))}")
    return lines
