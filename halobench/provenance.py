"""Where a result came from: versions, hardware, the command, and hashes of data and models."""

from __future__ import annotations

import hashlib
import os
import platform
import sys
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from halobench import __version__

_PACKAGES = ("torch", "transformers", "triton", "lm-eval", "datasets", "flash-linear-attention", "flash-attn", "numpy")


def versions() -> dict[str, str]:
    """Versions of halobench, Python and the packages that decide numbers; a package that is absent is left out."""
    found = {"halobench": __version__, "python": platform.python_version()}
    for name in _PACKAGES:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            continue
    return found


def hardware() -> dict[str, Any]:
    """Processor, cores this process may use, memory in bytes, and the GPU when torch sees one."""
    import torch

    found: dict[str, Any] = {
        "processor": _processor(),
        "cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        "threads": torch.get_num_threads(),
        "memory": os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"),
    }
    if torch.cuda.is_available():
        found["gpu"] = torch.cuda.get_device_name(0)
        found["gpu_memory"] = torch.cuda.get_device_properties(0).total_memory
    return found


def _processor() -> str:
    try:
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    except OSError:
        pass
    return platform.processor() or platform.machine()


def environment() -> dict[str, Any]:
    """Versions and hardware together."""
    return {"versions": versions(), "hardware": hardware(), "system": platform.system()}


def command_line() -> str:
    """The command as typed, with the program's name rather than its path."""
    program = Path(sys.argv[0])
    name = program.parent.name if program.name == "__main__.py" else program.name  # as `python -m halobench` has it
    return " ".join([name, *sys.argv[1:]])


def now() -> str:
    """The time in UTC, to the second."""
    return datetime.now(UTC).isoformat(timespec="seconds")


def file_hash(path: Path) -> str:
    """SHA-256 of a file's bytes, the first 16 hexadecimal digits."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()[:16]


def model_hash(folder: Path) -> str:
    """One hash over a model folder's weights and configuration, whatever the order of its shards."""
    digest = hashlib.sha256()
    for path in sorted([*folder.glob("*.safetensors"), *folder.glob("config.json")]):
        digest.update(path.name.encode() + file_hash(path).encode())
    return digest.hexdigest()[:16]
