"""The house's rules: who may import whom, and how large things may grow."""

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
ROOMS = ("kernels", "mixers", "surgery", "tasks", "reports")
MAY_IMPORT = {
    "shelf": set(),
    "kernels": {"shelf"},
    "mixers": {"shelf", "kernels"},
    "surgery": {"shelf", "kernels", "mixers"},
    "tasks": {"shelf", "kernels", "mixers", "surgery"},
    "reports": {"shelf"},
    "top": {"shelf", "top", *ROOMS},
}
SHELF = {
    "errors",
    "registry",
    "config",
    "records",
    "provenance",
    "files",
    "units",
    "progress",
    "assets",
    "__init__",
    "__version__",
}


def room_of(module: str) -> str:
    """The room a module such as halobench.surgery.loop stands in."""
    first = (module.split(".") + ["__init__"])[1]
    if first in ROOMS:
        return first
    return "shelf" if first in SHELF else "top"


def sources() -> list[tuple[str, Path]]:
    found = []
    for room in ROOMS:
        for path in sorted((ROOT / room).rglob("*.py")):
            found.append((".".join(("halobench", *path.relative_to(ROOT).with_suffix("").parts)), path))
    for path in sorted((ROOT / "halobench").glob("*.py")):
        found.append((f"halobench.{path.stem}", path))
    for folder in ("cli", "assets"):
        for path in sorted((ROOT / "halobench" / folder).glob("*.py")):
            found.append((f"halobench.{folder}.{path.stem}", path))
    return found


def imports(path: Path) -> set[str]:
    names = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            assert node.level == 0, f"{path}: relative import"
            names |= {f"{node.module}.{alias.name}" for alias in node.names}
    return names


@pytest.mark.parametrize(("module", "path"), sources(), ids=lambda value: value if isinstance(value, str) else "")
def test_arrows_between_rooms_are_kept(module: str, path: Path) -> None:
    room = room_of(module)
    for name in imports(path):
        if name.split(".")[0] == "halobench":
            target = room_of(name if name.count(".") else "halobench.__init__")
            assert target == room or target in MAY_IMPORT[room], f"{module} ({room}) imports {name} ({target})"


def test_rooms_are_never_imported_bare() -> None:
    for module, path in sources():
        assert not {n.split(".")[0] for n in imports(path)} & set(ROOMS), module


def test_kernels_cannot_be_mistaken_for_the_hub_package() -> None:
    assert not (ROOT / "kernels" / "__init__.py").exists()


def test_the_rule_can_fail() -> None:
    assert "surgery" not in MAY_IMPORT[room_of("halobench.mixers.lightning")]
    assert room_of("halobench.pipeline") == "top"
    assert room_of("halobench.records") == "shelf"


def test_files_and_functions_stay_small() -> None:
    others = [(path.name, path) for folder in ("tests", "benchmarks") for path in sorted((ROOT / folder).glob("*.py"))]
    for module, path in sources() + others:
        text = path.read_text()
        assert text.count("\n") <= 500, f"{module} has over 500 lines"
        for node in ast.walk(ast.parse(text)):
            if isinstance(node, ast.FunctionDef):
                length = (node.end_lineno or node.lineno) - node.lineno
                assert length <= 60, f"{module}.{node.name} has {length} lines"


def test_every_module_says_what_it_is_for() -> None:
    for module, path in sources():
        assert ast.get_docstring(ast.parse(path.read_text())), f"{module} has no docstring"
