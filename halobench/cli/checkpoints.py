"""`halobench import` and `halobench export`: released HypeNet checkpoints to hybrids of ours, and back."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from halobench.cli import options

if TYPE_CHECKING:
    from halobench.records import ModelCard

FORMATS = ("hypenet",)
TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json", "tokenizer.model", "vocab.json")
UNKNOWN_TEACHER = "unknown"


def import_checkpoint(
    checkpoint: Annotated[Path, typer.Argument(help="A folder in the released HypeNet layout.", show_default=False)],
    out: options.Out,
    teacher: Annotated[str, typer.Option(help="The model it was made from, as reports name it.")] = UNKNOWN_TEACHER,
) -> None:
    """Read a released HypeNet as a model folder that eval, profile and from_pretrained take."""
    _check_new(out)
    from halobench.config import to_dict
    from halobench.files import atomic_path, write_json
    from halobench.models import CARD
    from halobench.surgery.checkpoint import save_model
    from halobench.surgery.hypenet import import_hypenet

    _quiet()
    model = import_hypenet(checkpoint)
    tokenizer = _tokenizer(checkpoint)
    with atomic_path(out) as temporary:
        save_model(temporary, model, tokenizer)
        write_json(temporary / CARD, to_dict(_card(model, temporary, checkpoint, out, teacher)))
    print(f"{out}: {model.config.surgery_plan().describe()}; {str(model.dtype).removeprefix('torch.')}")
    if tokenizer is None:
        print(f"{checkpoint} has no tokenizer; put the teacher's tokenizer files into {out} before `halobench eval`")


def export_checkpoint(
    model: Annotated[str, typer.Argument(help="A run, or a model folder of halobench.", show_default=False)],
    out: options.Out,
    layout: Annotated[str, typer.Option("--format", help="hypenet: what the released code reads.")] = "hypenet",
) -> None:
    """Write a hybrid in the released HypeNet layout."""
    from halobench.errors import unknown_name
    from halobench.models import resolve

    if layout not in FORMATS:
        raise unknown_name("format", layout, FORMATS)
    _check_new(out)
    where = resolve(model)
    from halobench.surgery.checkpoint import load_model
    from halobench.surgery.hypenet import export_hypenet

    _quiet()
    loaded: Any = load_model(where)
    tokenizer = _tokenizer(Path(where))
    export_hypenet(loaded, out, tokenizer)
    print(f"{out}: {loaded.config.surgery_plan().describe()}; {str(loaded.dtype).removeprefix('torch.')}")


def _check_new(out: Path) -> None:
    """Refuses a place where something is already."""
    from halobench.errors import UserError

    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise UserError(f"{out} exists and is not an empty folder; choose another -o")


def _quiet() -> None:
    from transformers.utils import logging

    logging.disable_progress_bar()


def _tokenizer(folder: Path) -> Any | None:
    """The tokenizer in `folder`, or None when there are no files of one."""
    from halobench.surgery.checkpoint import load_tokenizer

    return load_tokenizer(folder) if any((folder / name).is_file() for name in TOKENIZER_FILES) else None


def _card(model: Any, written: Path, checkpoint: Path, out: Path, teacher: str) -> ModelCard:
    """What is known of a checkpoint that others trained; tokens spent on it are not."""
    from halobench.provenance import model_hash
    from halobench.records import ModelCard

    plan = model.config.surgery_plan()
    mixers = sorted({layer.mixer for layer in plan.layers} - {"softmax"})
    rotated = any(layer.mixer == "softmax" and layer.options["rope"] for layer in plan.layers)
    return ModelCard(
        name=checkpoint.resolve().name,
        path=out.name,
        hash=model_hash(written),
        layers=len(plan.layers),
        parameters=sum(p.numel() for p in model.parameters()),
        teacher=teacher,
        mixer=", ".join(mixers) or None,
        kept=list(plan.kept),
        positions="rope" if rotated else "hype",
    )
