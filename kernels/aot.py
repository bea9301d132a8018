"""What describes a Triton kernel for ahead-of-time compilation, which finds faults where there is no GPU."""

from __future__ import annotations

from typing import Any, NamedTuple


class CompileCase(NamedTuple):
    """One configuration of a kernel as it is launched.

    A module of Triton kernels lists its own in `compile_cases() -> list[CompileCase]`; tests compile them for Hopper.

    Args:
        kernel: the function under `triton.jit`.
        signature: type of each argument that is not a constant, such as "*bf16", "i32" or "fp32".
        constexprs: value of each constant.
    """

    kernel: Any
    signature: dict[str, str]
    constexprs: dict[str, Any]
    num_warps: int
    num_stages: int
