"""The one result record: a versioned JSON that says what was run, on what, from what, and what came out.

Reports read nothing else. A metric is a number with its count and standard error; running out of memory is a result
(`status: "error"` with the reason), not a gap.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from halobench.config import from_dict, to_dict
from halobench.errors import HalobenchError, UserError
from halobench.files import read_json, write_json
from halobench.provenance import command_line, environment, now

SCHEMA = 1
Kind = Literal["convert", "select", "eval", "profile", "oracle"]


@dataclass(frozen=True, kw_only=True)
class Metric:
    """One number.

    suite: "niah", "csr", "ppl", ...; task: within the suite; metric: "accuracy", "margin", "bits_per_byte", ...
    length: context in tokens, where it matters. n: samples. stderr: of the value; None where there is no sampling.
    samples: the n numbers that `value` is the mean of. clusters: which of them belong together (one haystack, one
    document), as equal numbers; depths: where in its context each one's answer stands, 0 (start) to 1.
    """

    suite: str
    task: str
    metric: str
    value: float
    n: int
    stderr: float | None = None
    length: int | None = None
    higher_is_better: bool = True
    samples: list[float] | None = None
    clusters: list[int] | None = None
    depths: list[float] | None = None


@dataclass(frozen=True, kw_only=True)
class LedgerRow:
    """Tokens and seconds that one piece of work took."""

    what: str
    tokens: int
    seconds: float


@dataclass(frozen=True, kw_only=True)
class ModelCard:
    """What a row of a leaderboard must know about a model.

    name: shown to people. selector: how the kept layers were chosen (several names when they agree).
    kept: 0-based softmax layers; None for an untouched decoder. positions: "rope", "hype" (none in softmax layers).
    files: hash of the hybrid's weights and config as they were written; with others it is another model.
    """

    name: str
    path: str
    hash: str
    layers: int
    parameters: int
    teacher: str
    files: str = ""
    mixer: str | None = None
    selectors: list[str] = field(default_factory=list)
    kept: list[int] | None = None
    positions: str = "rope"
    trained_length: int | None = None
    ledger: list[LedgerRow] = field(default_factory=list)

    @property
    def tokens(self) -> int:
        """Tokens spent on this conversion, alignment and selection included."""
        return sum(row.tokens for row in self.ledger)


@dataclass(frozen=True, kw_only=True)
class RunRecord:
    """See the module. `details` holds what belongs to one kind alone: layer scores, profile rows, training curves."""

    kind: Kind
    model: ModelCard
    metrics: list[Metric] = field(default_factory=list)
    details: dict[str, Any] = field(default_factory=dict)
    settings: dict[str, Any] = field(default_factory=dict)
    lineage: dict[str, str] = field(default_factory=dict)
    backends: dict[str, str] = field(default_factory=dict)
    ledger: list[LedgerRow] = field(default_factory=list)
    status: Literal["ok", "error"] = "ok"
    error: str | None = None
    command: str = field(default_factory=command_line)
    created: str = field(default_factory=now)
    environment: dict[str, Any] = field(default_factory=environment)
    schema: int = SCHEMA

    def save(self, path: Path) -> Path:
        """Writes the record and returns its path."""
        write_json(path, to_dict(self))
        return path


def read_record(path: Path) -> RunRecord:
    """The record in `path`; another version or a damaged file is refused with the reason."""
    data = read_json(path)
    if not isinstance(data, dict) or "schema" not in data or "kind" not in data:
        raise UserError(f"{path} is not a halobench record: it has no `schema` and `kind`")
    if data["schema"] != SCHEMA:
        raise UserError(f"{path} is a record of version {data['schema']}; this halobench reads version {SCHEMA}")
    return from_dict(RunRecord, data, str(path))


def find_records(folder: Path) -> list[RunRecord]:
    """Every record below `folder` (files named *.record.json), in the order of their paths."""
    if not folder.exists():
        raise UserError(f"{folder} does not exist; give the folder of a run")
    records = [read_record(path) for path in sorted(folder.rglob("*.record.json"))]
    if not records:
        raise HalobenchError(
            f"no records (*.record.json) below {folder}; run `halobench eval` or `halobench demo` first"
        )
    return records
