"""`halobench convert`: HALO end to end on a teacher."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from halobench.cli import options


def convert(
    teacher: Annotated[str, typer.Argument(help="A model folder, a hub name, or `tiny` (embedded).")] = "tiny",
    out: options.Out = Path("runs/convert"),
    recipe: options.Recipe = "halo-tiny",
    mixer: options.Mixer = None,
    select: Annotated[
        str | None, typer.Option(help="How to choose the kept layers; see `halobench selectors`.")
    ] = None,
    keep: options.Keep = None,
    layers: options.Layers = None,
    data: Annotated[
        str | None, typer.Option(help="Training text: a file, a folder, `sample`, or a hub dataset.")
    ] = None,
    until: Annotated[
        str, typer.Option(help="Stop after this stage: align, select, distil, finetune or scale.")
    ] = "scale",
    aligned: Annotated[Path | None, typer.Option(help="Use the alignment and sweep of this run.")] = None,
    device: options.Device = None,
    kernels: options.Kernels = "auto",
    set_: options.Sets = None,
) -> None:
    """Convert a teacher into a hybrid: transfer, align, select layers, distil, finetune. Resumes what it began."""
    from halobench.errors import UserError, unknown_name
    from halobench.mixers import MIXERS
    from halobench.pipeline import Conversion
    from halobench.progress import say
    from halobench.recipe import STAGES, load_recipe
    from halobench.surgery.selection import SELECTORS

    if until not in STAGES:
        raise unknown_name("stage", until, STAGES)
    given = options.parse_layers(layers)
    if given and (keep is not None or select not in (None, "given")):
        what = "--keep" if keep is not None else f"--select {select}"
        raise UserError(
            f"--layers says which layers stay softmax, and {what} would choose others; leave one of them out"
        )
    overrides = [*(set_ or []), *options.keep_override(keep), *options.mixer_override(mixer)]
    named = {"select": "given" if given and select is None else select, "data": data}
    overrides += [f"{field}={value}" for field, value in named.items() if value is not None]
    chosen = load_recipe(recipe, overrides)
    MIXERS.get(chosen.mixer)
    SELECTORS.get(chosen.select)
    where = options.device_or_default(device)
    form = options.kernels_for(kernels, where)
    conversion = Conversion(teacher, chosen, out, device=where, given=given, aligned=aligned, kernels=form)
    conversion.convert(until)
    if until == STAGES[-1] and conversion.team.leads:
        say(f"next: halobench eval {out} -o {out}/eval")
