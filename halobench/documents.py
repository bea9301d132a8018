"""Keeps documents true: the file tree comes from the modules' docstrings, tables from the committed records.

`make docs` rewrites the sections; a test fails when they are stale.
"""

from __future__ import annotations

import ast
from pathlib import Path

from halobench.assets import TINY_TEACHER
from halobench.files import read_json
from halobench.records import find_records
from halobench.reports.readme import section_is_stale, update_section

ROOT = Path(__file__).resolve().parents[1]
BENCHMARKS = ROOT / "benchmarks"
RECORDS = BENCHMARKS / "demo"
DOCS = ROOT / "docs"
MEASURED = ROOT / "benchmarks" / "surgery"
FAMILIES_RECORD = ROOT / "benchmarks" / "families.json"
ORACLES = ROOT / "benchmarks" / "oracle"
LONG_RECORDS = ROOT / "benchmarks" / "long"
TEACHER_RECORDS = ROOT / "benchmarks" / "teacher"
ROOMS = ("halobench", "surgery", "mixers", "kernels", "tasks", "reports")


def tree() -> str:
    """Every module with the first sentence of its docstring, as a code block."""
    lines = []
    for room in ROOMS:
        lines.append(f"{room}/")
        folder = ROOT / room
        for path in sorted(folder.rglob("*.py"), key=lambda p: (len(p.relative_to(folder).parts) > 1, str(p))):
            inside = path.relative_to(folder)
            if path.name == "__init__.py" or any((folder / p).is_symlink() for p in list(inside.parents)[:-1]):
                continue
            lines.append(f"  {str(inside):<30} {_phrase(path)}")
    return "```\n" + "\n".join(lines) + "\n```"


def _phrase(path: Path) -> str:
    """The first sentence of a module's docstring, without its full stop, on one line."""
    text = ast.get_docstring(ast.parse(path.read_text(encoding="utf-8"))) or ""
    first = " ".join(text.split("\n\n")[0].split())
    for end in (". ", ": "):
        first = first.split(end)[0]
    return first.rstrip(".")


def leaderboard() -> str:
    """The leaderboard of the committed demo: its table and what the numbers say, without footnotes."""
    from halobench.reports.leaderboard import short_leaderboard

    return short_leaderboard(find_records(RECORDS))


def oracle() -> str:
    """What the committed oracles say of the selectors."""
    from halobench.reports.oracle_page import oracle_page

    return oracle_page(find_records(ORACLES))


def oracle_short() -> str:
    """The same as one table."""
    from halobench.reports.oracle_page import oracle_table

    return oracle_table(find_records(ORACLES))


def long_contexts() -> str:
    """What the committed evaluations to 512K tokens found and took."""
    from halobench.reports.long_context import long_table

    return long_table(find_records(LONG_RECORDS))


def teacher_metrics() -> str:
    """What the embedded teacher was measured at, as a table."""
    from halobench.reports.table import number, render
    from halobench.units import format_length

    record = find_records(TEACHER_RECORDS)[0]
    rows = []
    for m in record.metrics:
        length = format_length(m.length) if m.length else ""
        rows.append([f"{m.suite} {m.task}", m.metric, length, number(m.value, m.stderr, 3), str(m.n)])
    return render(["task", "metric", "tokens", "value ± standard error", "samples"], rows, text_columns=3)


def families() -> str:
    """What the suite covered and how it ended: a row a family, a column a test or a mixer."""
    from halobench.reports.table import Markup, render

    record = read_json(FAMILIES_RECORD)
    mark = {"passed": "yes", "failed": "**no**"}
    rows = []
    for family, found in record["families"].items():
        cells = [mark.get(found["outcomes"].get(column, ""), "not tested") for column in record["columns"]]
        rows.append([Markup(f"`{family}`"), found["particular"], *map(Markup, cells)])
    versions = ", ".join(f"{name} {number}" for name, number in record["versions"].items())
    header = ["family", "what is particular", *(Markup(column) for column in record["columns"])]
    table = render(header, rows, text_columns=len(header))
    return f"{table}\n\nMade by `make families` ({versions})."


def mixers() -> str:
    """Every mixer: name, paper, kind of memory."""
    from halobench.mixers import MIXERS
    from halobench.reports.table import Markup, render

    rows: list[list[str]] = []
    for name, address in MIXERS.built_in().items():
        mixer = MIXERS.get(name)
        module = address.partition(":")[0].removeprefix("halobench.").replace(".", "/")
        cells = (f"`{name}`", f"[{mixer.label}]({mixer.paper})", f"`{module}.py`", ", ".join(mixer.backends))
        rows.append([Markup(cell) for cell in cells])
    return render(["name", "paper", "file", "forms"], rows, text_columns=4)


def measured() -> str:
    """What benchmarks/surgery.py found: alignment by mixer, chunks against definitions."""
    from halobench.reports.table import Markup, number, render, significant

    aligned, forms = (read_json(MEASURED / f"{part}.json") for part in ("alignment", "mixers"))
    ratios = {(row["mixer"], row["head_dim"]): row["naive over torch"] for row in forms["rows"]}
    rows: list[list[str]] = []
    for row in aligned["rows"]:
        errors = row["relative_error"]
        times = [significant(ratios[row["mixer"], size], 2) for size in (32, 64)]
        rows.append([Markup(f"`{row['mixer']}`"), number(sum(errors) / len(errors)), number(max(errors)), *times])
    header = ["mixer", "error left", "in the worst layer", "chunks over definition, 4 x 32", "8 x 64"]
    tokens = aligned["rows"][0]["tokens"]
    return f"""{render(header, rows)}
Error left: of the teacher's attention output after {tokens:,} tokens of alignment on the embedded teacher, as a share
of its power, mean over its layers; one seed and one recipe, that of Lightning Attention, so small differences between
mixers mean nothing. Chunks over definition: how many times faster the chunked form is than the loop over 4,096 tokens,
by heads x size, forward, on two cores of a busy machine."""


def speed() -> str:
    """What the benchmark scripts measured, and what has not been."""
    from halobench.reports.readme_speed import DEVICES, KINDS, speed

    paths = {(kind, device): BENCHMARKS / f"{kind}-{device}.json" for kind in KINDS for device in DEVICES}
    return speed({which: read_json(path) for which, path in paths.items() if path.exists()})


def transfer() -> str:
    """The docstring of every mixer's module: formulas, what is copied, what is new, how it starts."""
    from halobench.mixers import MIXERS

    titles: dict[str, list[str]] = {}
    for name, address in MIXERS.built_in().items():
        titles.setdefault(address.partition(":")[0], []).append(MIXERS.get(name).label)
    parts = []
    for module, labels in titles.items():
        path = ROOT / module.removeprefix("halobench.").replace(".", "/")
        text = ast.get_docstring(ast.parse(path.with_suffix(".py").read_text(encoding="utf-8"))) or ""
        parts.append(f"### {', '.join(labels)}\n\n```\n{text}\n```")
    return "\n\n".join(parts)


def laws() -> str:
    """The laws of the conformance suite."""
    from halobench.mixers.conformance import LAWS
    from halobench.reports.table import render

    return render(["law", "what it asks"], [[name, law.__doc__ or ""] for name, law in LAWS.items()], text_columns=2)


def sections() -> list[tuple[Path, str, str]]:
    """Generated sections: the file, the name of the section, and the text it must hold."""
    readme, card = ROOT / "README.md", TINY_TEACHER / "README.md"
    return [
        (readme, "tree", tree()),
        (readme, "leaderboard", leaderboard()),
        (readme, "oracle", oracle_short()),
        (readme, "speed", speed()),
        (card, "metrics", teacher_metrics()),
        (DOCS / "kernels.md", "speed", speed()),
        (DOCS / "families.md", "families", families()),
        (DOCS / "mixers.md", "mixers", mixers()),
        (DOCS / "mixers.md", "measured", measured()),
        (DOCS / "mixers.md", "transfer", transfer()),
        (DOCS / "extending.md", "laws", laws()),
        (DOCS / "oracle.md", "oracle", oracle()),
        (DOCS / "evaluation.md", "long", long_contexts()),
    ]


def stale() -> list[str]:
    """Sections that are not what they should be."""
    return [f"{path.name}: {name}" for path, name, text in sections() if section_is_stale(path, name, text)]


def refresh() -> None:
    """Rewrites the generated sections, and the oracle's picture."""
    from halobench.reports.oracle_plot import plot_oracle

    for path, name, text in sections():
        update_section(path, name, text)
    plot_oracle(find_records(ORACLES), DOCS / "oracle.png")


if __name__ == "__main__":
    refresh()
