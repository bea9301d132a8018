"""Which form of an operator runs: the definition, torch, our Triton kernels, or flash-linear-attention's.

triton and flash-linear-attention (fla, an optional dependency) are imported when a tensor is on CUDA or when they are
asked for by name, never before: they are heavy, and where they cannot run their absence must not matter.
"""

from __future__ import annotations

import importlib
import os
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from halobench.errors import UserError, reason_of, unknown_name

BACKENDS = ("auto", "naive", "torch", "triton", "fla")

INSTALL = "pip install halobench[cuda]"


@dataclass(frozen=True, kw_only=True)
class TritonKernel:
    """What a Triton kernel of ours takes: the largest size of a head, and the shared memory (bytes) of a program then.

    exact_is_slow: its products of fp32 tensors are exact and spend registers that there are not: not for "auto".
    """

    largest: int | None = None
    shared_memory: int = 0
    exact_is_slow: bool = False


TRITON = {
    "scalar_decay": TritonKernel(largest=128, shared_memory=164_352, exact_is_slow=True),
    "decode_attention": TritonKernel(largest=256),
    "decode_step": TritonKernel(largest=256),
    "loss": TritonKernel(),
}
# Operators that fla's kernels are not used for, and why.
WITHOUT_FLA = {
    "decode_attention": "fla has no such kernel",
    "loss": "fla's loss takes the unembedding's gradient in fp32 products",
}
# What fla's kernels do not take, by operator; found in its sources (0.6).
LARGEST_KEY = {"delta_rule": 256, "dplr": 256}
HALF_PRECISION_ONLY = frozenset({"dplr"})
# fla refuses their gradients on Hopper with Triton 3.4.0 to 3.7.0, which miscompiles them. Our kernels have no product
# of the kind that it miscompiles.
MISCOMPILED_GRADIENTS = frozenset({"scalar_decay", "delta_rule"})


def choose(operator: str, requested: str, like: Tensor, size: int | None = None) -> str:
    """The form to run: "naive", "torch", "triton" or "fla".

    "auto" is on CUDA our Triton kernel where the operator has one that can run, in bf16 and fp16; else fla where it
    can; else torch. fp64 always runs in torch. Products of fp32 tensors are full fp32 in torch and in our kernels,
    which spend registers on them that they do not have, and TF32 in fla.

    Whether gradients will be taken, which fla refuses on some GPUs, is told by whether the queries need one: they are
    projected by weights that a training step trains. Where only other inputs need gradients fla's own refusal stands.

    Args:
        operator: "scalar_decay", "vector_decay", "delta_rule", "dplr", "decode_attention" or "loss".
        requested: one of `BACKENDS`.
        like: the operator's queries (..., K), or hidden states for the loss: for device, dtype and size.
        size: of a head, keys' and values' the larger, where it is not the last size of `like`.

    Raises:
        UserError: an unknown name, or triton or fla asked for by name where it cannot run.
    """
    if requested not in BACKENDS:
        raise unknown_name("backend", requested, BACKENDS)
    if requested in ("naive", "torch"):
        return requested
    if requested == "auto":
        return _auto(operator, like, size)[0]
    obstacle = OBSTACLE[requested](operator, like, size)
    if obstacle is not None:
        advice = f", or run on an NVIDIA GPU after `{INSTALL}`" if requested == "fla" else ""
        raise UserError(f"backend '{requested}' cannot run {operator} here: {obstacle}; use 'auto' or 'torch'{advice}")
    return requested


def explain(operator: str, like: Tensor, size: int | None = None) -> str:
    """What "auto" runs for a tensor like this one, and why not what comes before it, in one line."""
    form, obstacles = _auto(operator, like, size)
    why = [] if form == "torch" else [f"{like.dtype} on {like.device}, {_version(form)}"]
    return f"{form} ({'; '.join(why + obstacles)})"


def compute_dtype(like: Tensor) -> torch.dtype:
    """The dtype a kernel should take its matrix products in: the tensor's own, or autocast's in place of fp32."""
    device = like.device.type
    if like.dtype == torch.float32 and torch.amp.is_autocast_available(device) and torch.is_autocast_enabled(device):
        return torch.get_autocast_dtype(device)
    return like.dtype


def fla_ops(name: str) -> Any:
    """fla's module of an operator's kernels, `fla.ops.<name>`; ImportError where it is not installed."""
    return importlib.import_module(f"fla.ops.{name}")


def interpreted() -> bool:
    """Whether Triton kernels run in its interpreter, on any device: for tests, thousands of times slower."""
    return os.environ.get("TRITON_INTERPRET") == "1"


def _auto(operator: str, like: Tensor, size: int | None) -> tuple[str, list[str]]:
    """The form of "auto", and why each form that comes before it does not run."""
    obstacles: list[str] = []
    for form, obstacle in OBSTACLE.items():
        found = obstacle(operator, like, size)
        if found is None and like.device.type != "cuda":
            found = "its interpreter is for tests"
        exact = form == "triton" and compute_dtype(like) == torch.float32
        if found is None and exact and TRITON[operator].exact_is_slow:
            found = "the tensor is float32, for which our kernel is exact and slow; it runs if asked for by name"
        if found is None:
            return form, obstacles
        obstacles.append(f"not {form}: {found}")
    return "torch", obstacles


def triton_obstacle(operator: str, like: Tensor, size: int | None = None) -> str | None:
    """Why our Triton kernel cannot run this, or None. Cheap reasons first: the import is the last thing tried."""
    kernel = TRITON.get(operator)
    if kernel is None:
        return f"it has no Triton kernel of ours, which {', '.join(TRITON)} have"
    if like.device.type != "cuda" and not interpreted():
        return (
            f"the tensor is on {like.device.type}, Triton kernels need an NVIDIA GPU (or TRITON_INTERPRET=1, for tests)"
        )
    if like.dtype == torch.float64:
        return "the tensor is float64, which our Triton kernels do not compute in"
    size = like.shape[-1] if size is None else size
    if kernel.largest is not None and size > kernel.largest:
        return f"the size of a head is {size}, our Triton kernel takes at most {kernel.largest}"
    if like.device.type == "cuda":
        shared = torch.cuda.get_device_properties(like.device).shared_memory_per_block_optin  # type: ignore[attr-defined]
        if shared < kernel.shared_memory:
            return f"the GPU has {shared} bytes of shared memory a program, our kernel needs {kernel.shared_memory}"
    try:
        importlib.import_module("triton")
    except ModuleNotFoundError:
        return "triton is not installed, it comes with CUDA builds of torch"
    return None


def _fla_obstacle(operator: str, like: Tensor, size: int | None) -> str | None:
    """Why fla cannot run this, or None. Cheap reasons first: the import is the last thing tried."""
    if operator in WITHOUT_FLA:
        return WITHOUT_FLA[operator]
    if like.device.type != "cuda":
        return f"the tensor is on {like.device.type}, fla's kernels need an NVIDIA GPU"
    if like.dtype == torch.float64:
        return "the tensor is float64, which fla does not compute in"
    if operator in HALF_PRECISION_ONLY and compute_dtype(like) == torch.float32:
        return "the tensor is float32, fla's kernels for it take bfloat16 or float16"
    largest = LARGEST_KEY.get(operator)
    if largest is not None and like.shape[-1] > largest:
        return f"the key size is {like.shape[-1]}, fla's kernels take at most {largest}"
    try:
        importlib.import_module("fla.ops")
    except ModuleNotFoundError as error:
        missing = "flash-linear-attention" if (error.name or "").split(".")[0] == "fla" else error.name
        return f"{missing} is not installed, `{INSTALL}`"
    except (ImportError, OSError, RuntimeError) as error:
        return f"flash-linear-attention does not import ({reason_of(error)})"
    if operator in MISCOMPILED_GRADIENTS and torch.is_grad_enabled() and like.requires_grad and _miscompiles():
        return "Triton 3.4.0 to 3.7.0 miscompiles its gradients on Hopper, upgrade to Triton 3.7.1 (torch 2.13)"
    return None


def _miscompiles() -> bool:
    """Whether this GPU and Triton are the pair that fla refuses to take gradients on."""
    if torch.cuda.get_device_capability()[0] != 9:
        return False
    version = importlib.import_module("triton").__version__.split("+")[0].split(".")
    return (3, 4, 0) <= tuple(int(part) for part in version[:3]) < (3, 7, 1)


def _version(form: str) -> str:
    """The version of the package that a form's kernels come from or are compiled by."""
    package, name = {"fla": ("fla", "flash-linear-attention"), "triton": ("triton", "triton")}[form]
    return f"{name} {getattr(importlib.import_module(package), '__version__', 'unknown version')}"


# The forms that "auto" prefers to torch, best first, and what tells why one cannot run.
OBSTACLE: dict[str, Callable[[str, Tensor, int | None], str | None]] = {
    "triton": triton_obstacle,
    "fla": _fla_obstacle,
}
