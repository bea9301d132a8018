"""What a profile has measured already: a file for each context and batch, so that an interrupted profile goes on."""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from halobench.config import from_dict
from halobench.files import read_json, write_json

if TYPE_CHECKING:
    from halobench.tasks.profile import ProfileRow

FOLDER = ".profile"


@dataclass(frozen=True)
class MeasuredRows:
    """The rows of models that were measured in turns, in `folder`, which belongs to these models and settings alone."""

    folder: Path

    @classmethod
    def of(cls, out: Path, identity: dict[str, Any]) -> MeasuredRows:
        """Those below `out` with the same identity (plain data): models, settings, machine and versions."""
        digest = hashlib.sha256(json.dumps(identity, sort_keys=True).encode()).hexdigest()[:16]
        return cls(out / FOLDER / digest)

    def read(self, context: int, batch: int) -> list[ProfileRow] | None:
        """A row a model, or None where there is no measurement yet."""
        from halobench.tasks.profile import ProfileRow

        path = self._path(context, batch)
        return [from_dict(ProfileRow, row, str(path)) for row in read_json(path)] if path.exists() else None

    def write(self, context: int, batch: int, rows: list[ProfileRow]) -> None:
        """Keeps finished rows."""
        write_json(self._path(context, batch), [row.to_dict() for row in rows])
        self._underway.unlink(missing_ok=True)

    def begin(self, context: int, batch: int) -> None:
        """Notes what is being measured now, for the case that the process does not live to tell."""
        write_json(self._underway, [context, batch])

    def note_killed(self) -> bool:
        """Called when the system has ended the measuring process; False when nothing was being measured."""
        if not self._underway.exists():
            return False
        self._underway.replace(self.folder / f"killed-{'-'.join(map(str, read_json(self._underway)))}.json")
        return True

    def killed_by(self, context: int, batch: int) -> tuple[int, int] | None:
        """A context and batch, neither larger than these, whose measurement the system ended."""
        for path in sorted(self.folder.glob("killed-*.json")):
            smaller = read_json(path)
            if smaller[0] <= context and smaller[1] <= batch:
                return smaller[0], smaller[1]
        return None

    @property
    def _underway(self) -> Path:
        return self.folder / "underway.json"

    def _path(self, context: int, batch: int) -> Path:
        return self.folder / f"{context}-{batch}.json"
