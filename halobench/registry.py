"""One typed, lazy registry for everything that has a name: mixers, selectors, stages, suites.

An entry is an object or an address `package.module:attribute`, imported on first use, so that listing names costs
nothing. Third parties add entries through an entry-point group of the same form.
"""

from __future__ import annotations

from importlib import import_module
from importlib.metadata import entry_points
from typing import Generic, TypeVar, cast

from halobench.errors import UserError, unknown_name

T = TypeVar("T")


class Registry(Generic[T]):
    """Names to objects of one kind.

    Args:
        kind: what an entry is called in messages, e.g. "mixer".
        entries: built-in names, each with the address of its object.
        group: entry-point group that installed packages may add names to.
    """

    def __init__(self, kind: str, entries: dict[str, str], group: str | None = None) -> None:
        self.kind = kind
        self.group = group
        self._built_in = dict(entries)
        self._entries: dict[str, str | T] = dict(entries)

    def add(self, name: str, entry: T) -> None:
        """Register `entry` under a new `name`. A name that is taken is refused."""
        if name in self.names():
            raise UserError(f"{self.kind} {name!r} is registered already; choose another name")
        self._entries[name] = entry

    def names(self) -> list[str]:
        """All names, built-in ones first, in the order they were declared."""
        return list(dict.fromkeys([*self._entries, *self._installed()]))

    def built_in(self) -> dict[str, str]:
        """The names this package declares, with the addresses of their objects."""
        return dict(self._built_in)

    def get(self, name: str) -> T:
        """The object called `name`; raises UserError with the nearest name when there is none."""
        entry: str | T | None = self._entries.get(name)
        if entry is None:
            point = self._installed().get(name)
            if point is None:
                raise unknown_name(self.kind, name, self.names())
            entry = point
        if isinstance(entry, str):
            module, _, attribute = entry.partition(":")
            entry = cast(T, getattr(import_module(module), attribute))
            self._entries[name] = entry
        return entry

    def _installed(self) -> dict[str, str]:
        if self.group is None:
            return {}
        return {point.name: point.value for point in entry_points(group=self.group)}
