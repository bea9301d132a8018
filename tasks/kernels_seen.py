"""Which attention kernels torch really ran: it chooses anew at every call, by shapes, masks and dtype."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

_SDPA = "aten::_scaled_dot_product_"


@contextmanager
def attention_kernels() -> Iterator[set[str]]:
    """A set that gathers the kernels of scaled_dot_product_attention that run inside the block.

    Names are torch's own without their common parts: "flash", "efficient", "cudnn", "flash_for_cpu"; "math" is the
    written-out form. Attention that does not go through that function leaves none: the model's attention implementation
    says which it is. Gradients are off inside, and so is inference mode, which hides the choice.
    """
    calls = _Calls()
    with torch.inference_mode(False), torch.no_grad(), calls:
        yield calls.kernels


class _Calls(TorchFunctionMode):
    """Looks into every call of scaled_dot_product_attention."""

    def __init__(self) -> None:
        super().__init__()
        self.kernels: set[str] = set()

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if func is not F.scaled_dot_product_attention:
            return func(*args, **(kwargs or {}))
        with _Operators() as operators:
            result = func(*args, **(kwargs or {}))
        self.kernels |= operators.kernels or {"math"}
        return result


class _Operators(TorchDispatchMode):
    """Notes the fused attention operators below one call; the written-out form has none of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.kernels: set[str] = set()

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        name = func._schema.name
        if name.startswith(_SDPA):
            self.kernels.add(name.removeprefix(_SDPA).replace("_attention", ""))
        return func(*args, **(kwargs or {}))
