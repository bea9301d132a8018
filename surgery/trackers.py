"""Where the numbers of training go besides metrics.jsonl: TensorBoard, Weights & Biases and others, by accelerate."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from halobench.errors import UserError, unknown_name

if TYPE_CHECKING:
    from accelerate import Accelerator

TENSORBOARD = "tensorboard"


def chosen(names: list[str] | None) -> list[str]:
    """The trackers to use: those named, or TensorBoard where it is installed when none is named (None).

    Raises:
        UserError: a name that accelerate does not know, or a tracker whose package is not installed.
    """
    from accelerate.tracking import LOGGER_TYPE_TO_CLASS, get_available_trackers
    from accelerate.utils import LoggerType

    installed = {str(tracker) for tracker in get_available_trackers()}
    if names is None:
        return [TENSORBOARD] if TENSORBOARD in installed else []
    own = {str(kind) for kind in LoggerType}
    for name in names:
        if name not in LOGGER_TYPE_TO_CLASS:
            raise unknown_name("tracker", name, LOGGER_TYPE_TO_CLASS)
        if name in own and name not in installed:
            raise UserError(f"tracker {name!r} is not installed: pip install {name}, or take it out of `trackers`")
    return list(names)


def begin(accelerator: Accelerator, run: str, stage: str, settings: dict[str, Any], step: int) -> None:
    """Opens the trackers the accelerator was made with, for a stage that begins or goes on at `step`.

    Steps that will be made again are dropped from TensorBoard, as they are from metrics.jsonl.
    """
    if not accelerator.log_with:
        return
    more: dict[str, dict[str, Any]] = {
        TENSORBOARD: {"purge_step": step + 1},
        "wandb": {"name": f"{run}/{stage}", "group": run},
        "trackio": {"name": f"{run}-{stage}"},
    }
    accelerator.init_trackers("halobench", config=_flat(settings), init_kwargs=more)


def _flat(settings: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """{"a": {"b": [1, 2]}} -> {"a.b": "[1, 2]"}: trackers keep scalars and text."""
    flat: dict[str, Any] = {}
    for key, value in settings.items():
        if isinstance(value, dict):
            flat |= _flat(value, f"{prefix}{key}.")
        else:
            flat[prefix + key] = value if isinstance(value, bool | int | float | str) else str(value)
    return flat
