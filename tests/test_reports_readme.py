"""Generated sections of a Markdown file: replaced between their markers, and noticed when stale."""

from __future__ import annotations

from pathlib import Path

import pytest

from halobench.errors import UserError
from halobench.reports.readme import section_is_stale, update_section


def test_a_section_of_the_readme_is_replaced_and_its_staleness_noticed(tmp_path: Path) -> None:
    readme = tmp_path / "README.md"
    readme.write_text("# T\n<!-- begin: results -->\nold\n<!-- end: results -->\nrest\n", encoding="utf-8")
    assert section_is_stale(readme, "results", "new\n")
    assert update_section(readme, "results", "new\n")
    assert readme.read_text(encoding="utf-8") == "# T\n<!-- begin: results -->\nnew\n<!-- end: results -->\nrest\n"
    assert not section_is_stale(readme, "results", "new") and not update_section(readme, "results", "new")
    with pytest.raises(UserError, match="needs exactly one"):
        update_section(readme, "absent", "x")
    with pytest.raises(UserError, match="own markers"):
        update_section(readme, "results", "<!-- end: results -->")
    readme.write_text("<!-- end: a -->\n<!-- begin: a -->\n", encoding="utf-8")
    with pytest.raises(UserError, match="before it begins"):
        update_section(readme, "a", "x")
