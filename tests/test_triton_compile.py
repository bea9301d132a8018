"""Every Triton kernel compiles for Hopper as it is launched, within its shared memory and registers; no GPU is needed.

A module of kernels lists its configurations in `compile_cases()` (see kernels/aot.py) and is found by that.
"""

from __future__ import annotations

import importlib
import re
import subprocess
from functools import cache
from pathlib import Path
from typing import Any

import pytest

from halobench.kernels.aot import CompileCase
from tests.triton_interpreter import INTERPRETED

KERNELS = Path(__file__).parents[1] / "kernels"
MODULES = sorted(
    ".".join(("halobench.kernels", *path.relative_to(KERNELS).with_suffix("").parts))
    for path in KERNELS.rglob("*.py")
    if "\ndef compile_cases(" in path.read_text()
)
SHARED_MEMORY = 232_448  # bytes a program can have on Hopper
# What a thread may spill (bytes) where decays are of each token and K = V = 128: the matrices just do not fit there.
SPILLED = {"outputs": 8, "query_gradients": 64, "key_value_gradients": 128, "decay_gradients": 104}

pytestmark = pytest.mark.skipif(INTERPRETED, reason="the interpreter compiles nothing")


def name_of(case: CompileCase) -> str:
    flags = (f"{key}={value}" for key, value in case.constexprs.items() if value is not None)
    return f"{case.kernel.__name__}({', '.join(flags)}, {case.num_warps} warps, {case.num_stages} stages)"


def compiled(case: CompileCase) -> Any:
    """The kernel compiled for an H100 or H200, every pointer aligned to 16 bytes as torch's are."""
    triton = pytest.importorskip("triton")
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    names = case.kernel.arg_names
    missing = [name for name in names if name not in case.signature and name not in case.constexprs]
    assert not missing, f"{name_of(case)} does not say what {missing} are"
    signature = {name: case.signature.get(name, "constexpr") for name in names}
    aligned = {(i,): [["tt.divisibility", 16]] for i, name in enumerate(names) if signature[name].startswith("*")}
    source = ASTSource(case.kernel, signature, {(names.index(n),): v for n, v in case.constexprs.items()}, aligned)
    options = {"num_warps": case.num_warps, "num_stages": case.num_stages}
    return triton.compile(source, target=GPUTarget("cuda", 90, 32), options=options)


def spilled(kernel: Any, directory: Path) -> int:
    """Bytes that a thread of a compiled kernel spills from its registers, as ptxas reports it."""
    import triton

    ptxas = Path(triton.__file__).parent / "backends/nvidia/bin/ptxas"
    source = directory / "kernel.ptx"
    source.write_text(kernel.asm["ptx"])
    command = [ptxas, "-v", "--gpu-name=sm_90a", source, "-o", directory / "kernel.cubin"]
    report = subprocess.run(command, capture_output=True, text=True, check=True).stderr
    stores = re.search(r"(\d+) bytes spill stores", report)
    assert stores is not None, report
    return int(stores[1])


@cache
def cases(module: str) -> list[CompileCase]:
    pytest.importorskip("triton")
    return importlib.import_module(module).compile_cases()


def test_the_modules_of_kernels_are_found() -> None:
    assert "halobench.kernels.scalar_decay.triton" in MODULES


@pytest.mark.parametrize("module", MODULES)
def test_kernels_compile_for_hopper_within_shared_memory_and_registers(module: str, tmp_path: Path) -> None:
    assert cases(module), f"{module}.compile_cases() lists no configuration"
    for case in cases(module):
        kernel = compiled(case)
        assert kernel.metadata.shared <= SHARED_MEMORY, name_of(case)
        large = case.constexprs.get("PER_TOKEN") and case.constexprs["K"] == 128
        allowed = SPILLED.get(case.kernel.__name__, 0) if large else 0
        assert spilled(kernel, tmp_path) <= allowed, f"{name_of(case)} spills {spilled(kernel, tmp_path)} bytes"


def test_pointers_move_by_64_bit_offsets_between_chunks_and_states() -> None:
    for case in cases("halobench.kernels.scalar_decay.triton"):
        moves = re.findall(r"tt\.addptr .* : !tt\.ptr<[^>]*>, (\w+)", compiled(case).asm["ttir"])
        wide = [width for width in moves if width == "i64"]
        assert wide, f"{name_of(case)} moves no pointer by a 64-bit offset"
