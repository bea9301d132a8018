"""Checkpoints of a stage in training: written whole or not at all, checked when read, the last few kept.

STAGE/checkpoints/step-000120/weights.safetensors    what trains, whole, by name
                              optimizer.safetensors  the optimisers' moments
                              state.json             step, place in the data, losses, settings; size and CRC of both
"""

from __future__ import annotations

import shutil
import zlib
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors.torch import load_file, save_file
from torch import Tensor

from halobench.errors import HalobenchError
from halobench.files import atomic_path, read_json, write_json
from halobench.progress import say

FOLDER = "checkpoints"
WEIGHTS, MOMENTS, STATE = "weights.safetensors", "optimizer.safetensors", "state.json"


@dataclass(frozen=True, kw_only=True)
class Saved:
    """A checkpoint that was found whole; its tensors are read when they are asked for."""

    folder: Path
    state: dict[str, Any]

    def weights(self) -> dict[str, Tensor]:
        """What trained, by name."""
        return _read_tensors(self.folder / WEIGHTS)

    def moments(self) -> dict[str, Tensor]:
        """What `Optimizer.state` gave."""
        return _read_tensors(self.folder / MOMENTS)


class Checkpoints:
    """The checkpoints of one stage; one process at a time writes them.

    Args:
        stage: the stage's directory.
        keep: how many of the newest stay.
    """

    def __init__(self, stage: Path, keep: int) -> None:
        self.folder, self.keep = stage / FOLDER, max(1, keep)

    def found(self) -> list[Path]:
        """The folders of all checkpoints, oldest first, damaged or not."""
        return sorted(self.folder.glob("step-*"), key=_step)

    def last(self) -> Path | None:
        """The newest checkpoint's folder."""
        found = self.found()
        return found[-1] if found else None

    def save(self, step: int, weights: dict[str, Tensor], moments: dict[str, Tensor], state: dict[str, Any]) -> Path:
        """Writes a checkpoint under a temporary name, renames it, and drops what is older than the newest `keep`.

        Raises:
            HalobenchError: the disk is full or cannot be written; the checkpoints before are as they were.
        """
        target = self.folder / f"step-{step:06d}"
        with atomic_path(target) as folder:
            folder.mkdir(parents=True)
            for name, tensors in ((WEIGHTS, weights), (MOMENTS, moments)):
                save_file(tensors, folder / name)
            files = {name: _fingerprint(folder / name) for name in (WEIGHTS, MOMENTS)}
            write_json(folder / STATE, {**state, "step": step, "files": files})
            shutil.rmtree(target, ignore_errors=True)  # there is one only where it was found damaged
        # One of a later step was found damaged when this run took up its work.
        earlier = [path for path in self.found() if _step(path) <= step]
        for path in self.found():
            if path not in earlier[-self.keep :]:
                shutil.rmtree(path, ignore_errors=True)
        return target

    def newest(self) -> Saved | None:
        """The newest checkpoint that is whole, or None when there is none at all. Says which ones it passes over.

        Raises:
            HalobenchError: there are checkpoints, and all are damaged.
        """
        for leftover in self.folder.glob(".*"):  # of a process that was killed while it wrote
            shutil.rmtree(leftover, ignore_errors=True)
        damages: list[str] = []
        for path in reversed(self.found()):
            damage, state = _examine(path)
            if damage is None:
                if damages:
                    say(f"{'; '.join(damages)}: passed over in favour of {path.name}")
                return Saved(folder=path, state=state)
            damages.append(f"{path} is damaged ({damage})")
        if damages:
            raise HalobenchError(
                f"{'; '.join(damages)}: none is left to go on from; remove {self.folder} to begin the stage anew"
            )
        return None


def at(folder: Path) -> Saved:
    """The checkpoint in `folder`, which another process has found whole."""
    return Saved(folder=folder, state=read_json(folder / STATE))


def differences(before: Any, after: Any, where: str = "") -> list[str]:
    """Readable differences between two plain values: the field and both values."""
    if isinstance(before, dict) and isinstance(after, dict):
        keys = [*before, *(k for k in after if k not in before)]
        return [d for k in keys for d in differences(before.get(k), after.get(k), f"{where}.{k}" if where else str(k))]
    return [] if before == after else [f"{where} is {before!r} there and {after!r} here"]


def _step(path: Path) -> int:
    number = path.name.removeprefix("step-")
    return int(number) if number.isdigit() else -1


def _read_tensors(path: Path) -> dict[str, Tensor]:
    """The tensors in a file, in memory of their own; load_file maps the file, which may change or go."""
    return {name: tensor.clone() for name, tensor in load_file(path).items()}


def _fingerprint(path: Path) -> list[int]:
    """[size in bytes, CRC-32] of a file."""
    size = crc = 0
    with path.open("rb") as file:
        while block := file.read(1 << 22):
            size, crc = size + len(block), zlib.crc32(block, crc)
    return [size, crc]


def _examine(path: Path) -> tuple[str | None, dict[str, Any]]:
    """(what is wrong or None, state) of a checkpoint."""
    try:
        state = read_json(path / STATE)
        files = state["files"]
        for name in (WEIGHTS, MOMENTS):
            size, crc = files[name]
            if not (path / name).is_file():
                return f"{name} is missing", {}
            if (path / name).stat().st_size != size:
                return f"{name} has {(path / name).stat().st_size:,} bytes of {size:,}", {}
            if _fingerprint(path / name)[1] != crc:
                return f"the bytes of {name} have changed", {}
    except HalobenchError:
        return f"{STATE} is missing or is not JSON", {}
    except (KeyError, TypeError, ValueError):
        return f"{STATE} lacks its fields", {}
    return None, state
