"""The one Markdown table renderer: escaping, numbers with their standard errors, alignment.

Every text that came from a record passes through `escape`, so a model called `<img onerror=..>|x` is shown by its name
and does nothing else. Text written by this package is wrapped in `Markup` and left alone.
"""

from __future__ import annotations

import math
import re
import unicodedata
from collections.abc import Sequence

MISSING = "–"
_LONGEST = 240


class Markup(str):
    """Markdown that is trusted as it stands."""

    __slots__ = ()


def clean(text: str, longest: int = _LONGEST) -> str:
    """One printable line of `text`: white space becomes spaces, control and direction marks go, length is capped."""
    spaced = re.sub(r"\s+", " ", str(text)).strip()
    printable = "".join(c for c in spaced if not unicodedata.category(c).startswith("C"))
    return printable if len(printable) <= longest else printable[: longest - 1] + "…"


def escape(text: str) -> Markup:
    """`text` such that Markdown and HTML show it letter for letter."""
    if isinstance(text, Markup):
        return text
    marked = re.sub(r"([\\`*_\[\]|~$#!])", r"\\\1", clean(text))
    marked = re.sub(r"&", "&amp;", marked).replace("<", "&lt;").replace(">", "&gt;")
    # GitHub would make links of these.
    return Markup(re.sub(r"(?i)(www)\.", r"\1&#46;", marked.replace("://", ":&#47;&#47;")).replace("@", "&#64;"))


def number(value: float | None, stderr: float | None = None, digits: int = 3) -> Markup:
    """ "0.912 ±0.014"; a value that is missing or not finite is a dash."""
    if value is None or not math.isfinite(value):
        return Markup(MISSING)
    shown = _fixed(value, digits)
    if stderr is not None and math.isfinite(stderr):
        shown += f" ±{_fixed(stderr, digits)}"
    return Markup(shown)


def signed(value: float, digits: int = 3) -> Markup:
    """A difference with its sign: "+0.150"; a difference that rounds to nothing has none."""
    shown = _fixed(value, digits)
    return Markup(shown if shown.startswith("-") or float(shown) == 0 else f"+{shown}")


def significant(value: float | None, figures: int = 3) -> Markup:
    """A measured time or size to so many figures, never in exponent form: 0.0123, 18.9, 10400."""
    if value is None or not math.isfinite(value):
        return Markup(MISSING)
    if value == 0:
        return Markup("0")
    rounded = float(f"{value:.{figures - 1}e}")
    return Markup(f"{rounded:.{max(0, figures - 1 - math.floor(math.log10(abs(rounded))))}f}")


def _fixed(value: float, digits: int) -> str:
    shown = f"{value:.{digits}f}"
    return shown.removeprefix("-") if float(shown) == 0 else shown


def render(header: Sequence[str], rows: Sequence[Sequence[str]], text_columns: int = 1) -> str:
    """A Markdown table: `text_columns` aligned left, then numbers aligned right. Cells are escaped unless `Markup`."""
    if any(len(row) != len(header) for row in rows):
        raise ValueError(f"every row needs {len(header)} cells, got {sorted({len(row) for row in rows})}")
    rule = [":---" if i < text_columns else "---:" for i in range(len(header))]
    body: list[list[str]] = [[escape(cell) for cell in row] for row in (header, *rows)]
    lines = [body[0], rule, *body[1:]]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines) + "\n"
