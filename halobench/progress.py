"""Progress of long work: a bar with tokens per second and time left on a terminal, plain lines elsewhere.

Everything goes to stderr: stdout belongs to results.
"""

from __future__ import annotations

import os
import sys
import time
from types import TracebackType

from halobench.units import format_count, format_seconds

_LABEL = "HALOBENCH_LABEL"


def label_lines(label: str) -> None:
    """Marks every line of this process and its children with `label`: several processes share one terminal."""
    os.environ[_LABEL] = label


def say(text: str) -> None:
    """One line of the story, on stderr."""
    label = os.environ.get(_LABEL)
    print(f"[{label}] {text}" if label else text, file=sys.stderr, flush=True)


class Progress:
    """Counts `unit`s towards `total`, starting from `done` when work is resumed.

    On a terminal the line is redrawn; elsewhere a new line is printed every `every` seconds. `quiet` prints nothing: of
    several processes one speaks.
    """

    def __init__(
        self, label: str, total: int, done: int = 0, unit: str = "tokens", every: float = 20.0, quiet: bool = False
    ) -> None:
        self.quiet = quiet
        self.label, self.total, self.done, self.unit, self.every = label, total, done, unit, every
        self.note = ""
        self._start, self._first = time.monotonic(), done
        self._shown = self._start
        self._live = sys.stderr.isatty() and _LABEL not in os.environ

    def __enter__(self) -> Progress:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self.quiet:
            return
        if self._live:
            sys.stderr.write("\r\x1b[2K")
        if kind is None:
            say(self._line(finished=True))

    def advance(self, amount: int, note: str = "") -> None:
        """Counts `amount` more units; `note` is shown behind the figures (the loss, say)."""
        self.done += amount
        self.note = note or self.note
        now = time.monotonic()
        if self.quiet or now - self._shown < (0.2 if self._live else self.every):
            return
        self._shown = now
        if self._live:
            sys.stderr.write(f"\r\x1b[2K{self._line()}")
            sys.stderr.flush()
        else:
            say(self._line())

    def _line(self, finished: bool = False) -> str:
        spent = max(time.monotonic() - self._start, 1e-9)
        rate = (self.done - self._first) / spent
        share = min(self.done / max(self.total, 1), 1.0)
        ending = f"in {format_seconds(spent)}" if finished else "-"
        if not finished and rate > 0:
            ending = f"{format_seconds(max(self.total - self.done, 0) / rate)} left"
        figures = f"{share:4.0%}  {format_count(self.done)} {self.unit}  {format_count(rate)} {self.unit}/s  {ending}"
        return f"  {self.label:<14} {figures}  {self.note}".rstrip()
