"""What was scored already: a line for each finished sample and a file for each finished part, kept beside the record.

A journal belongs to one model, task, length and everything else that decides the numbers; with another of these there
is another journal. A kill can tear the last line only, and that is left out. Journals outlive the evaluation: another
length, a higher limit or another precision then reads only what is new.
"""

from __future__ import annotations

import hashlib
import json
import re
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from halobench.config import from_dict, to_dict
from halobench.errors import HalobenchError
from halobench.files import append_json_line
from halobench.tasks.sampled import SampledTask, Scored

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_PROBE = 'The 3 quick foxes — naïve, of course — jumped\n\n  over 12,345 lazy dogs: {"a": 1}.'


@dataclass(frozen=True, kw_only=True)
class Entry:
    """A finished sample, the seconds that it took (its share of a batch), and the highest memory use up to its end."""

    index: int
    scored: Scored
    seconds: float
    peak_bytes: int


class Journal:
    """The finished samples in the file `path`, which is made with the first of them."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def read(self) -> dict[int, Entry]:
        """All entries by index, without a last line that has no end. Writes nothing."""
        if not self.path.exists():
            return {}
        content = self.path.read_bytes()
        entries = {}
        for number, line in enumerate(content[: _whole(content)].decode().splitlines(), start=1):
            try:
                entry = from_dict(Entry, json.loads(line), f"{self.path} line {number}")
            except json.JSONDecodeError as error:
                raise HalobenchError(
                    f"{self.path} line {number} is not JSON; delete the file to score its samples again"
                ) from error
            entries[entry.index] = entry
        return entries

    def mend(self) -> None:
        """Cuts a last line without its end off the file, so that the next one starts anew."""
        if not self.path.exists():
            return
        content = self.path.read_bytes()
        if _whole(content) < len(content):
            with self.path.open("r+b") as file:
                file.truncate(_whole(content))

    def add(self, entry: Entry) -> None:
        """Appends one entry."""
        self.path.parent.mkdir(parents=True, exist_ok=True)
        append_json_line(self.path, to_dict(entry))


def _whole(content: bytes) -> int:
    """Bytes of the whole lines."""
    return content.rfind(b"\n") + 1


@dataclass(frozen=True, kw_only=True)
class Journals:
    """The journals and parts of a model's evaluations in `folder`; `identity` (plain data) is what decides all numbers.

    The `settings` asked for below are what decides those of one task beside it.
    """

    folder: Path
    identity: dict[str, Any]

    def of(self, task: SampledTask, length: int, settings: dict[str, Any]) -> Journal:
        """The journal of a task at a length; nothing is written yet."""
        return Journal(self._path(task.suite, task.name, {"length": length, **settings}, "jsonl"))

    def part(self, suite: str, task: str, settings: dict[str, Any]) -> Path:
        """The file of a finished part; nothing is written yet."""
        return self._path(suite, task, settings, "json")

    def _path(self, suite: str, task: str, settings: dict[str, Any], ending: str) -> Path:
        whole = {**self.identity, "suite": suite, "task": task, "settings": settings}
        digest = hashlib.sha256(json.dumps(whole, sort_keys=True).encode()).hexdigest()[:12]
        place = [suite, task, *(str(settings[name]) for name in ("length", "window") if name in settings)]
        plain = re.sub(r"[^A-Za-z0-9_.-]+", "-", "-".join(place))
        return self.folder / f"{plain}-{digest}.{ending}"


def tokenizer_fingerprint(tokenizer: PreTrainedTokenizerBase) -> str:
    """One hash over what a tokenizer does: its vocabulary, its special tokens, and how it cuts a difficult line."""
    vocabulary = sorted(tokenizer.get_vocab().items())
    specials = [tokenizer.bos_token_id, tokenizer.eos_token_id]
    described = json.dumps([vocabulary, specials, list(tokenizer(_PROBE)["input_ids"])])
    return hashlib.sha256(described.encode()).hexdigest()[:16]
