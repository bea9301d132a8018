"""Keeps generated passages of a Markdown file true: the text between two markers is replaced, or checked for staleness.

<!-- begin: results -->
(generated)
<!-- end: results -->
"""

from __future__ import annotations

from pathlib import Path

from halobench.errors import UserError
from halobench.files import write_text


def update_section(markdown_path: Path, name: str, text: str) -> bool:
    """Puts `text` between the markers of section `name`. Returns whether the file changed."""
    before = _read(markdown_path)
    after = _with_section(before, markdown_path, name, text)
    if after != before:
        write_text(markdown_path, after)
    return after != before


def section_is_stale(markdown_path: Path, name: str, text: str) -> bool:
    """True when section `name` does not hold `text`; the file is left alone."""
    before = _read(markdown_path)
    return _with_section(before, markdown_path, name, text) != before


def _read(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except FileNotFoundError as error:
        raise UserError(f"{path} does not exist; give the Markdown file that has the section") from error


def _with_section(content: str, path: Path, name: str, text: str) -> str:
    begin, end = f"<!-- begin: {name} -->", f"<!-- end: {name} -->"
    for marker in (begin, end):
        if content.count(marker) != 1:
            raise UserError(f"{path} has {content.count(marker)} lines {marker!r}; section {name!r} needs exactly one")
    if begin in text or end in text:
        raise UserError(f"the text for section {name!r} holds the section's own markers; leave them out")
    head, _, rest = content.partition(begin)
    _, found, tail = rest.partition(end)
    if not found:
        raise UserError(f"{path} ends section {name!r} before it begins; put {begin!r} first")
    return f"{head}{begin}\n{text.strip()}\n{end}{tail}"
