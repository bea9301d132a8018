"""What this machine can do at best: bytes and operations a second, measured, and the memory that is free.

A decode step must read every weight and the whole cache, so bytes over bandwidth is a time that no program beats; for a
prompt, operations over the rate of a large matrix product is. Both rates are measured in the process that uses them.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch

from halobench.tasks.statistics import median_stderr

BUFFER = {"cpu": 2**29, "cuda": 2**31}  # bytes: well beyond any cache
MATMUL = {"cpu": 1024, "cuda": 8192}  # rows and columns of the squares
PASSES = {"cpu": 1, "cuda": 10}  # within one timing: on a GPU one pass is as short as the wait for it
ROUNDS = 5
_CGROUP = Path("/sys/fs/cgroup")


@dataclass(frozen=True, kw_only=True)
class Machine:
    """Rates are medians over rounds with their standard errors.

    buffer_bytes: that were copied and summed. copy_bytes_per_s: read and written together. read_bytes_per_s: read by a
    sum. flops_per_s: of a product of square matrices of `matmul_size` in `dtype`, a multiply-add counted as two.
    """

    device: str
    dtype: str
    buffer_bytes: int
    copy_bytes_per_s: float
    copy_stderr: float | None
    read_bytes_per_s: float
    read_stderr: float | None
    matmul_size: int
    flops_per_s: float
    flops_stderr: float | None

    @property
    def bytes_per_s(self) -> float:
        """The bandwidth that floors are made from: the faster of copying and reading."""
        return max(self.copy_bytes_per_s, self.read_bytes_per_s)


def measure_machine(
    device: torch.device,
    dtype: torch.dtype,
    *,
    buffer_bytes: int | None = None,
    matmul_size: int | None = None,
    clock: Callable[[], float] = time.perf_counter,
) -> Machine:
    """Measures `device`; a second or so.

    Args:
        buffer_bytes: of each of two buffers; by default as in BUFFER, less where little memory is free.
        clock: seconds.
    """
    size = buffer_bytes or min(BUFFER[device.type], available_bytes(device) // 8)
    side = matmul_size or MATMUL[device.type]
    source, target = torch.ones(size // 4, device=device), torch.empty(size // 4, device=device)
    copied = _rate(lambda: target.copy_(source), 2 * source.nbytes, device, clock)
    read = _rate(lambda: source.sum(), source.nbytes, device, clock)
    left, right = (torch.randn(side, side, device=device).to(dtype) for _ in range(2))
    multiplied = _rate(lambda: left @ right, 2 * side**3, device, clock)
    return Machine(
        device=torch.cuda.get_device_name(device) if device.type == "cuda" else device.type,
        dtype=str(dtype).removeprefix("torch."),
        buffer_bytes=source.nbytes,
        copy_bytes_per_s=copied[0],
        copy_stderr=copied[1],
        read_bytes_per_s=read[0],
        read_stderr=read[1],
        matmul_size=side,
        flops_per_s=multiplied[0],
        flops_stderr=multiplied[1],
    )


def wait_for(device: torch.device) -> None:
    """Returns when the device has done all it was given."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def _rate(
    work: Callable[[], object], amount: int, device: torch.device, clock: Callable[[], float]
) -> tuple[float, float | None]:
    """`amount` over the seconds that `work` takes: the median of ROUNDS and its standard error."""
    passes, rates = PASSES[device.type], []
    work()
    for _ in range(ROUNDS):
        wait_for(device)
        started = clock()
        for _ in range(passes):
            work()
        wait_for(device)
        rates.append(passes * amount / (clock() - started))
    return median_stderr(rates)


def available_bytes(device: torch.device) -> int:
    """Memory that a process can still have on `device`; on the host also within its control group's limit."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    if sys.platform != "linux":
        import os

        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    lines = Path("/proc/meminfo").read_text().splitlines()
    free = next(int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable:"))
    return min(free, _left_in_group())


def _left_in_group() -> int:
    """What the limit of the control group leaves; what files occupy counts as free, for it is given back."""
    try:
        limit = int((_CGROUP / "memory.max").read_text())
        used = int((_CGROUP / "memory.current").read_text())
        stat = dict(line.split() for line in (_CGROUP / "memory.stat").read_text().splitlines())
    except (OSError, ValueError):  # no group, no limit ("max"), or the older layout
        return sys.maxsize
    return limit - used + int(stat.get("file", 0))
