"""Writing files so that a reader never meets half of one: a temporary name beside the target, then a rename."""

from __future__ import annotations

import errno
import json
import os
import re
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from halobench.errors import HalobenchError

FULL = (errno.ENOSPC, errno.EDQUOT)
UNWRITABLE = (errno.EACCES, errno.EROFS, errno.EPERM, errno.EEXIST, errno.ENOTDIR, errno.ENAMETOOLONG)
_HALF = re.compile(r"\.(?P<name>.+)\.(?P<process>\d+)\.(?P<kind>tmp|old)")  # what `atomic_path` and `_replace` call it


@contextmanager
def _explained(path: Path) -> Iterator[None]:
    """Turns the errors of a full or unwritable disk into one clear line."""
    try:
        yield
    except Exception as error:
        if _is_full(error):
            raise HalobenchError(f"no space left to write {path}; free some room and run again to resume") from error
        if isinstance(error, OSError) and error.errno in UNWRITABLE:
            raise HalobenchError(f"{path} cannot be written ({error.strerror}); choose another folder") from error
        raise


def _is_full(error: Exception) -> bool:
    """Whether a disk is full: safetensors tells in words, numpy that not all was written, without a number."""
    if not isinstance(error, OSError):
        return any(f"os error {number}" in str(error) for number in FULL)
    return error.errno in FULL or error.errno is None and "written" in str(error)


@contextmanager
def atomic_path(path: Path) -> Iterator[Path]:
    """Yields a temporary file or folder name beside `path`; renames it to `path` when the block ends well."""
    path = Path(path)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    with _explained(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            yield temporary
            _replace(temporary, path)
        finally:
            _remove(temporary)


def _replace(source: Path, target: Path) -> None:
    """Renames over `target`. A folder in the way is moved aside first, since rename cannot replace one."""
    if not target.is_dir():
        source.replace(target)
        return
    aside = target.with_name(f".{target.name}.{os.getpid()}.old")
    target.rename(aside)
    source.rename(target)
    shutil.rmtree(aside)


def _remove(path: Path) -> None:
    if path.is_dir():
        shutil.rmtree(path, ignore_errors=True)
    else:
        path.unlink(missing_ok=True)


def make_folder(path: Path) -> None:
    """Makes the folder that long work will write to: a HalobenchError now, where it would be one at its end."""
    with _explained(path):
        path.mkdir(parents=True, exist_ok=True)
        if not os.access(path, os.W_OK):
            raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), str(path))


def is_half_written(path: Path) -> bool:
    """Whether a name is one that `atomic_path` gives to what is not whole yet."""
    return _HALF.fullmatch(path.name) is not None


def drop_halves(folder: Path) -> None:
    """Drops what processes of this machine that are no more have left half-written below a folder."""
    for entry in [*folder.rglob(".*.tmp"), *folder.rglob(".*.old")]:
        found = _HALF.fullmatch(entry.name)
        if found is None or _runs(int(found["process"])):
            continue
        if found["kind"] == "tmp" or entry.with_name(found["name"]).exists():  # else the old one is all there is
            _remove(entry)


def _runs(process: int) -> bool:
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        pass
    return True


def write_text(path: Path, text: str) -> None:
    """Writes `text` to `path` atomically."""
    if path.is_dir():
        raise HalobenchError(f"{path} is a folder, and a file of that name is to be written; choose another place")
    with atomic_path(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


def write_json(path: Path, value: Any) -> None:
    """Writes `value` as indented JSON, atomically. NaN and infinity are refused: they are not JSON."""
    write_text(path, json.dumps(value, indent=1, ensure_ascii=False, allow_nan=False) + "\n")


def append_json_line(path: Path, value: Any) -> None:
    """Appends one line of JSON to a log."""
    with _explained(path), path.open("a", encoding="utf-8") as file:
        file.write(json.dumps(value) + "\n")


def read_json(path: Path) -> Any:
    """The JSON in `path`, or a clear error when the file is missing, empty or damaged."""
    try:
        return json.loads(Path(path).read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise HalobenchError(f"{path} does not exist") from error
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise HalobenchError(f"{path} is not valid JSON ({error}); it may be damaged or half-written") from error
