"""What goes wrong, said in one line: what was given, what is allowed, what to do next.

The command line prints the message alone (no traceback) and exits with the error's code.
"""

from __future__ import annotations

from collections.abc import Iterable
from difflib import get_close_matches


class HalobenchError(Exception):
    """A failure with a message fit for the user's eyes. Exit code 1: it happened while running."""

    exit_code = 1


class DivergedError(HalobenchError):
    """Training went to numbers that are not finite: a result of the recipe, and no fault of the machine."""


class UserError(HalobenchError):
    """The request cannot be carried out as given. Exit code 2: nothing was started."""

    exit_code = 2


def unknown_name(kind: str, name: str, known: Iterable[str]) -> UserError:
    """The error for a misspelt `name` among `known`, with the nearest name when there is one."""
    choices = sorted(known)
    near = get_close_matches(name, choices, n=1, cutoff=0.5)
    hint = f"did you mean {near[0]!r}?" if near else "see the names that are allowed"
    return UserError(f"unknown {kind} {name!r}; {hint} (allowed: {', '.join(choices) or 'none'})")


def reason_of(error: BaseException) -> str:
    """The first line of an error that others raised, or its kind where it says nothing."""
    return (str(error).strip() or type(error).__name__).splitlines()[0]


def is_out_of_memory(error: BaseException) -> bool:
    """Whether memory ran out, on a GPU or on the host: torch tells in words."""
    text = str(error).lower()
    kind = isinstance(error, MemoryError) or type(error).__name__ == "OutOfMemoryError"
    return kind or "can't allocate memory" in text or "out of memory" in text


def some(names: Iterable[object], most: int = 4) -> str:
    """The first few of many, for a message: "a, b, c, d and 3 more"."""
    listed = [str(name) for name in names]
    return ", ".join(listed[:most]) + (f" and {len(listed) - most} more" if len(listed) > most else "")
