"""What several conversions of one teacher rest on: one alignment and one sweep, made by all processes together."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from halobench.crew import Crew, free_port
from halobench.recipe import Recipe

if TYPE_CHECKING:
    from halobench.pipeline import Conversion
    from halobench.surgery.selection.contract import Need


@dataclass(frozen=True, kw_only=True)
class Ground:
    """A run whose alignment and sweep other conversions share; it can be sent to another process."""

    teacher: str
    recipe: Recipe
    folder: Path
    device: str

    def open(self) -> Conversion:
        """The run as a conversion."""
        from halobench.pipeline import Conversion

        return Conversion(self.teacher, self.recipe, self.folder, device=self.device)


def prepare(ground: Ground, crew: Crew, methods: Sequence[str]) -> None:
    """Aligns, and measures what these selectors read, where it is missing."""
    base = ground.open()
    if base.run.note("align") is None:
        size = crew.size if ground.device == "cpu" else 1  # processes that train together need a GPU each
        port = free_port()
        crew.do([(_align, ground, rank, size, port) for rank in range(size)])
    needs = tuple({need for selector in base.selectors(methods) for need in selector.needs} - {"workbench"})
    if needs:
        crew.do([(_measure, ground, needs, rank, crew.size) for rank in range(crew.size)])


def _align(ground: Ground, rank: int, size: int, port: int) -> None:
    """One process of those that share the alignment's batches."""
    from halobench.surgery.parallel import membership

    with membership(rank, size, port):
        ground.open().align()


def _measure(ground: Ground, needs: Sequence[Need], rank: int, size: int) -> None:
    from halobench.evidence import measure

    base = ground.open()
    measure(base, base.run.path / "select", needs, rank, size)
