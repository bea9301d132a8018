"""The form that the mixers of a model run in, asked for and used."""

from __future__ import annotations

from torch import nn

from halobench.mixers.contract import Mixer


def ask_for(module: nn.Module, backend: str) -> None:
    """Every mixer in `module` with a choice of forms is to run in `backend` ("auto" picks by device and shape).

    Softmax layers have none: torch's own attention picks its kernel. What cannot run is an error of the first forward
    (see `kernels.backend.choose`), never another form in its place.
    """
    for part in module.modules():
        if isinstance(part, Mixer):
            part.backend = backend


def used(module: nn.Module) -> dict[str, str]:
    """By name of the mixer, the form of its last call, such as "torch", "fla" or "sdpa"; no entry before it."""
    mixers = [part for part in module.modules() if isinstance(part, Mixer)]
    return {mixer.name: mixer.used_backend for mixer in mixers if mixer.used_backend is not None}
