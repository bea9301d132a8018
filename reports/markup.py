"""From the leaderboard's Markdown to HTML, and the one HTML table renderer.

Texts of records arrive escaped by table.escape; `inline` keeps them so. Nothing but <strong> comes out of it.
"""

from __future__ import annotations

import html
import itertools
import re
from collections.abc import Sequence
from dataclasses import dataclass

from halobench.reports.table import MISSING, clean, escape


@dataclass(frozen=True, kw_only=True)
class Head:
    """A column's header. first: the order that a first click gives."""

    text: str
    first: str = "ascending"


@dataclass(frozen=True, kw_only=True)
class Cell:
    """text: Markup, or plain text, which is escaped. order: what it is sorted by; None sorts last."""

    text: str
    order: float | str | None = None


def inline(markdown: str) -> str:
    """One line of Markdown as HTML: bold becomes <strong>, what was escaped (table.escape) shows as itself."""
    safe = re.sub(r"&(?!(?:amp|lt|gt|#4[67]|#64);)", "&amp;", markdown).replace("<", "&lt;").replace(">", "&gt;")
    marks = itertools.cycle(("<strong>", "</strong>"))
    shown = re.sub(r"\\(.)|\*\*", lambda found: found[1] if found[1] else next(marks), safe)
    return shown + ("</strong>" if next(marks) == "</strong>" else "")


def table(caption: str, heads: Sequence[Head], rows: Sequence[Sequence[Cell]], text_columns: int = 1) -> str:
    """A sortable table in a box that scrolls by itself; the first cell of a row is its header."""
    name = html.escape(clean(caption))
    titles = "".join(
        f'<th scope="col" class="{_kind(i, text_columns)}"><button type="button" data-first="{head.first}">'
        f"{inline(escape(head.text))}</button></th>"
        for i, head in enumerate(heads)
    )
    body = "".join(f"<tr>{''.join(_cell(i, cell, text_columns) for i, cell in enumerate(row))}</tr>" for row in rows)
    return (
        f'<div class="scroll" tabindex="0" role="region" aria-label="{name}"><table class="sortable">'
        f"<caption>{name}</caption><thead><tr>{titles}</tr></thead><tbody>{body}</tbody></table></div>"
    )


def _cell(place: int, cell: Cell, text_columns: int) -> str:
    order = "" if cell.order is None or cell.text == MISSING else html.escape(clean(str(cell.order)))
    name = (
        f'th scope="row" class="{_kind(place, text_columns)}"'
        if place == 0
        else f'td class="{_kind(place, text_columns)}"'
    )
    shown = inline(escape(cell.text))
    if shown == MISSING:
        shown = f'<span aria-label="not measured">{MISSING}</span>'
    return f'<{name} data-sort="{order}">{shown}</{"th" if place == 0 else "td"}>'


def _kind(place: int, text_columns: int) -> str:
    return "text" if place < text_columns else "number"


def facts(pairs: Sequence[tuple[str, str]]) -> str:
    """A list of names with plain values."""
    shown = "".join(f"<dt>{html.escape(name)}</dt><dd>{html.escape(clean(value, 600))}</dd>" for name, value in pairs)
    return f"<dl>{shown}</dl>"
