"""Options that several commands share, so that each is described once."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

Device = Annotated[str | None, typer.Option(help="cpu or cuda; by default cuda where a GPU is.")]
Kernels = Annotated[
    str,
    typer.Option(help="Form of the mixers' operators: auto, torch, triton, fla; what cannot run is an error."),
]
Out = Annotated[Path, typer.Option("--out", "-o", help="Where results go.")]
Json = Annotated[bool, typer.Option("--json", help="Print one JSON document on stdout; everything else on stderr.")]
Recipe = Annotated[str, typer.Option(help="A recipe's name or a YAML file; see `halobench recipes`.")]
Sets = Annotated[list[str] | None, typer.Option("--set", help="Change a field of the recipe: a.b=value. Repeatable.")]
Mixer = Annotated[str | None, typer.Option(help="The RNN mixer; see `halobench mixers`.")]
Keep = Annotated[float | None, typer.Option(help="Softmax layers to keep: a number, or a share below 1.")]
Layers = Annotated[str | None, typer.Option(help="The layers to keep, for --select given: 2,7.")]


def device_or_default(device: str | None) -> str:
    """The device asked for, checked, or the best there is."""
    from halobench.errors import UserError
    from halobench.models import default_device

    if device is None:
        return default_device()
    if device not in ("cpu", "cuda"):
        raise UserError(f"device {device!r} is not known; use cpu or cuda")
    if device == "cuda" and default_device() != "cuda":
        raise UserError("device cuda was asked for, but torch sees no GPU here; use --device cpu")
    return device


def kernels_for(kernels: str, device: str) -> str:
    """The form asked for; one that this device can run nothing in is refused before any model is loaded."""
    import torch

    from halobench.errors import unknown_name
    from halobench.kernels.backend import choose

    known = ("auto", "torch", "triton", "fla")
    if kernels not in known:
        raise unknown_name("kernels", kernels, known)
    dtype = torch.float32 if device == "cpu" else torch.bfloat16
    choose("scalar_decay", kernels, torch.zeros(1, 1, 1, 64, dtype=dtype, device=device))  # it has every form
    return kernels


def parse_layers(text: str | None) -> tuple[int, ...] | None:
    """ "2,7" -> (2, 7)."""
    from halobench.errors import UserError

    if text is None:
        return None
    try:
        return tuple(int(part) for part in text.split(","))
    except ValueError as error:
        raise UserError(f"--layers {text!r} is not a list of layer numbers; write --layers 2,7") from error


def keep_override(keep: float | None) -> list[str]:
    """--keep as a change to the recipe."""
    if keep is None:
        return []
    return [f"keep={int(keep) if float(keep).is_integer() else keep}"]


def mixer_override(mixer: str | None) -> list[str]:
    """--mixer as a change to the recipe."""
    return [] if mixer is None else [f"mixer={mixer}"]
