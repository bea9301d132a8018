"""A run's directory: what it was begun with, which stages are done, and where each came from.

RUN/run.json            the recipe and the teacher it was begun with; another recipe is refused
RUN/STAGE/checkpoints/  of a stage in training; see surgery/training_state.py
RUN/STAGE/metrics.jsonl one line a step: loss, gradient norm, rate, tokens
RUN/STAGE/trains.json   which weights train, by kind
RUN/STAGE/stage.json    written last: the stage is complete. Tokens, seconds, losses, lineage
RUN/select/             the sweep's evidence and the choice
RUN/model/              the finished hybrid, with its card
"""

from __future__ import annotations

import json
import shutil
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from halobench.config import from_dict, to_dict
from halobench.errors import UserError
from halobench.files import is_half_written, read_json, write_json
from halobench.provenance import environment, now
from halobench.records import LedgerRow

if TYPE_CHECKING:
    from halobench.surgery.loop import StageResult

CURVE = 60  # points of a training curve in a record


@dataclass(frozen=True, kw_only=True)
class StageNote:
    """What a finished stage leaves behind.

    came_from and hash tie it to the weights before and after. sequences, position: sequences and tokens drawn from the
    data so far, where the next stage goes on. first_loss, last_loss: means over the first and last fifth of the steps;
    fell: whether last is below first. held_out_before, held_out_after: on sequences that no stage trains on.
    """

    stage: str
    came_from: str
    hash: str
    tokens: int
    seconds: float
    sequences: int
    position: int = 0
    first_loss: float | None = None
    last_loss: float | None = None
    fell: bool | None = None
    held_out_before: float | None = None
    held_out_after: float | None = None
    details: dict[str, Any] = field(default_factory=dict)

    def ledger(self) -> LedgerRow:
        """Its line in the token ledger."""
        return LedgerRow(what=self.stage, tokens=self.tokens, seconds=round(self.seconds, 2))


def arrow(before: float, after: float) -> str:
    """What the story says of a loss."""
    return f"{before:.4f} -> {after:.4f}"


def held_out(result: StageResult) -> str:
    """What the story says of the held-out loss; nothing where there is none."""
    if result.held_out_before is None or result.held_out_after is None:
        return ""
    return f" (held out {arrow(result.held_out_before, result.held_out_after)})"


class RunFolder:
    """The directory of one conversion.

    Args:
        path: where it is or shall be.
        identity: plain data that decides the run (recipe, teacher's hash): a resume must bring the same.
        teacher: the teacher as the user named it, to load it again.
    """

    def __init__(self, path: Path, identity: dict[str, Any], teacher: str) -> None:
        self.path = path
        begun = path / "run.json"
        if path.exists() and not path.is_dir():
            raise UserError(f"{path} exists and is not a run of halobench; choose another -o")
        held = [entry for entry in path.iterdir() if not is_half_written(entry)] if path.exists() else []
        if begun.exists():
            differing = _differences(begun, identity)
            if differing and len(held) > 1:
                raise UserError(
                    f"{path} holds another run: {'; '.join(differing[:4])}. Use the same settings, or another -o"
                )
            if not differing:
                return
        elif held:
            raise UserError(f"{path} exists and is not a run of halobench; choose another -o")
        write_json(begun, {"identity": identity, "teacher": teacher, "begun": now(), "environment": environment()})

    def note(self, stage: str) -> StageNote | None:
        """The note of a finished stage, or None."""
        path = self.path / stage / "stage.json"
        return from_dict(StageNote, read_json(path), str(path)) if path.exists() else None

    def curve(self, stage: str) -> list[list[float]]:
        """[tokens, loss] along a stage's training, each the mean of as many steps as make CURVE points or fewer."""
        from halobench.surgery.loop import METRICS

        path = self.path / stage / METRICS
        if not path.exists():
            return []
        rows = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
        step = -(-len(rows) // CURVE)
        parts = [rows[i : i + step] for i in range(0, len(rows), step)]
        return [[part[-1]["tokens"], round(sum(row["loss"] for row in part) / len(part), 5)] for part in parts]

    def sweep(self) -> None:
        """Drops the checkpoints of finished stages, which a run that was killed between the two has left behind."""
        for note in self.path.glob("*/stage.json"):
            shutil.rmtree(note.parent / "checkpoints", ignore_errors=True)

    def finish(self, note: StageNote) -> None:
        """Marks a stage complete and drops its checkpoints."""
        write_json(self.path / note.stage / "stage.json", to_dict(note))
        self.sweep()


def _differences(begun: Path, identity: dict[str, Any]) -> list[str]:
    from halobench.surgery.training_state import differences

    there = read_json(begun)
    if not isinstance(there, dict) or not isinstance(there.get("identity"), dict):
        raise UserError(f"{begun} is damaged: it has no identity; choose another -o, or remove the folder")
    return differences(there["identity"], identity)
