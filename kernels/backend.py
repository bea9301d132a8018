"""Which form of an operator runs: the definition, our torch form, or flash-linear-attention's GPU kernels.

flash-linear-attention (fla, an optional dependency) is imported when a tensor is on CUDA or when it is asked for by
name, never before: it is heavy, and where it cannot run its absence must not matter.
"""

from __future__ import annotations

import importlib
from typing import Any

import torch
from torch import Tensor

from halobench.errors import UserError, unknown_name

BACKENDS = ("auto", "naive", "torch", "fla")

INSTALL = "pip install halobench[cuda]"
# What fla's kernels do not take, by operator; found in its sources (0.6).
LARGEST_KEY = {"delta_rule": 256, "dplr": 256}
HALF_PRECISION_ONLY = frozenset({"dplr"})
# fla refuses their gradients on Hopper with Triton 3.4.0 to 3.7.0, which miscompiles them.
MISCOMPILED_GRADIENTS = frozenset({"scalar_decay", "delta_rule"})


def choose(operator: str, requested: str, like: Tensor) -> str:
    """The form to run: "naive", "torch" or "fla".

    "auto" is fla where it can run, else torch. Where fla and torch differ in fp32 it is by TF32: fla's products of
    fp32 tensors are Triton's default. fp64 always runs in torch.

    Args:
        operator: "scalar_decay", "vector_decay", "delta_rule" or "dplr".
        requested: one of `BACKENDS`.
        like: the operator's queries (B, T, H, K), for device, dtype and key size.

    Raises:
        UserError: an unknown name, or fla asked for by name where it cannot run.
    """
    if requested not in BACKENDS:
        raise unknown_name("backend", requested, BACKENDS)
    if requested in ("naive", "torch"):
        return requested
    obstacle = _obstacle(operator, like)
    if requested == "fla" and obstacle is not None:
        raise UserError(
            f"backend 'fla' cannot run {operator} here: {obstacle}; "
            f"use 'auto' or 'torch', or run on an NVIDIA GPU after `{INSTALL}`"
        )
    return "fla" if obstacle is None else "torch"


def explain(operator: str, like: Tensor) -> str:
    """What "auto" runs for a tensor like this one, and why, in one line."""
    obstacle = _obstacle(operator, like)
    if obstacle is None:
        return f"{operator}: fla ({like.dtype} on {like.device}, flash-linear-attention {_fla_version()})"
    return f"{operator}: torch ({obstacle})"


def compute_dtype(like: Tensor) -> torch.dtype:
    """The dtype a kernel should take its matrix products in: the tensor's own, or autocast's in place of fp32."""
    device = like.device.type
    if like.dtype == torch.float32 and torch.amp.is_autocast_available(device) and torch.is_autocast_enabled(device):
        return torch.get_autocast_dtype(device)
    return like.dtype


def fla_ops(name: str) -> Any:
    """fla's module of an operator's kernels, `fla.ops.<name>`; ImportError where it is not installed."""
    return importlib.import_module(f"fla.ops.{name}")


def _obstacle(operator: str, like: Tensor) -> str | None:
    """Why fla cannot run this, or None. Cheap reasons first: the import is the last thing tried."""
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
        return f"flash-linear-attention does not import ({str(error).splitlines()[0] if str(error) else error!r})"
    if operator in MISCOMPILED_GRADIENTS and torch.is_grad_enabled() and like.requires_grad and _miscompiles():
        return "Triton 3.4.0 to 3.7.0 miscompiles its gradients on Hopper, upgrade to Triton 3.7.1 (torch 2.13)"
    return None


def _miscompiles() -> bool:
    """Whether this GPU and Triton are the pair that fla refuses to take gradients on."""
    if torch.cuda.get_device_capability()[0] != 9:
        return False
    version = importlib.import_module("triton").__version__.split("+")[0].split(".")
    return (3, 4, 0) <= tuple(int(part) for part in version[:3]) < (3, 7, 1)


def _fla_version() -> str:
    return str(getattr(importlib.import_module("fla"), "__version__", "unknown version"))
