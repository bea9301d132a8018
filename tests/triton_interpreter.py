"""Runs the `gpu` tests of a file on the CPU, under Triton's interpreter: one test body for both.

A file of kernel tests marks its bodies `gpu`, takes the fixture `device` ("cuda", or "cpu" under the interpreter), and
has one unmarked test that calls `passes_under_the_interpreter(__file__)`. That runs the file's `gpu` tests in a process
of their own: Triton reads TRITON_INTERPRET once, when it is imported.
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"


@pytest.fixture
def device() -> str:
    """Where kernels run: "cpu" under the interpreter, else "cuda"; skips where there is neither."""
    if INTERPRETED:
        return "cpu"
    if not torch.cuda.is_available():
        pytest.skip("no NVIDIA GPU; the same test runs under Triton's interpreter")
    return "cuda"


def passes_under_the_interpreter(file: str) -> None:
    """Fails unless every `gpu` test of `file` passes under the interpreter, and at least one ran.

    Tests that only a device can answer skip themselves there (`INTERPRETED`).
    """
    pytest.importorskip("triton", reason="triton is not installed")
    # Without conftest.py, which imports transformers: these tests need tensors only.
    options = ["-q", "-m", "gpu", "--noconftest", "-p", "no:cacheprovider", "-o", "addopts=--import-mode=importlib"]
    ended = subprocess.run(
        [sys.executable, "-m", "pytest", *options, file],
        cwd=Path(__file__).parents[1],
        env={**os.environ, "TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
    )
    report = ended.stdout + ended.stderr
    assert ended.returncode == 0 and re.search(r"\d+ passed", ended.stdout), report
