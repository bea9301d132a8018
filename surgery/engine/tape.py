"""A step on a CPU as a list of tensor operations, replayed without the Python that called them.

For a small model most of a decode step is Python: modules, hooks, shapes. All of that gives the same calls at every
step, because where the next token goes is a number in a tensor. So the operations of one step are noted, with every
tensor they read or wrote kept where it is, and replayed into the same tensors: what a CUDA graph does on a GPU. A view
of a fixed tensor is fixed too and costs nothing again.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import cache, partial
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_flatten

# Functions that write their result where they are told; any other operation's result is copied there.
WRITING = (
    "add", "addcmul", "addmm", "argmax", "baddbmm", "bmm", "cat", "clamp", "cos", "div", "exp", "index_select", "log",
    "mean", "mm", "mul", "neg", "pow", "rsqrt", "sigmoid", "sin", "sqrt", "sub", "tanh",
)  # fmt: skip
_UNFIT = (torch.Tag.data_dependent_output, torch.Tag.dynamic_output_shape)


class UnfitError(RuntimeError):
    """A step that cannot be replayed; the message is the reason."""


@dataclass(frozen=True, kw_only=True)
class _Call:
    """An operation, the memory it reads and writes, and whether what it leaves differs by itself from step to step."""

    run: Callable[[], Any]
    read: set[int]
    written: set[int]
    changes: bool


class Tape(TorchDispatchMode):
    """Notes what runs inside `with tape:`; `replay` runs it again on the same tensors.

    What is computed from tensors that no operation inside writes to, such as weights, is left as it was; `inputs` are
    tensors of which others change the numbers between replays.
    """

    def __init__(self, inputs: Iterable[Tensor] = ()) -> None:
        super().__init__()
        self._changing = {x.untyped_storage().data_ptr() for x in inputs}
        self._noted: list[_Call] = []
        self._calls: list[Callable[[], Any]] | None = None
        self._kept: list[Any] = []  # tensors, so that no memory of one is another's later

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        result = func(*args, **kwargs)
        given, made = ([x for x in tree_flatten(tree)[0] if isinstance(x, Tensor)] for tree in ((args, kwargs), result))
        if _decides(func, args) or (given and not made and not func._schema.is_mutable):
            raise UnfitError(f"the model decides by numbers it has computed ({func})")
        self._kept += [given, made]
        read, written = ({x.untyped_storage().data_ptr() for x in tensors} for tensors in (given, made))
        if func._schema.is_mutable:
            self._noted.append(
                _Call(run=partial(func, *args, **kwargs), read=read, written=read | written, changes=True)
            )
        elif not func._schema.name.startswith("aten::empty") and not written <= read:
            random = torch.Tag.nondeterministic_seeded in func.tags
            run = _into(func, args, kwargs, result)
            self._noted.append(_Call(run=run, read=read, written=written, changes=random))
        return result

    @property
    def calls(self) -> list[Callable[[], Any]]:
        """What a replay runs, in order."""
        if self._calls is None:
            changing = self._changing.union(*(call.written for call in self._noted if call.changes))
            self._calls = []
            for call in self._noted:
                if call.changes or not changing.isdisjoint(call.read | call.written):
                    changing |= call.written
                    self._calls.append(call.run)
        return self._calls

    def replay(self) -> None:
        """Everything once more, in order."""
        for call in self.calls:
            call()


def _decides(func: Any, args: tuple[Any, ...]) -> bool:
    """Whether the shape of the result, or a number on the host, depends on the numbers in tensors."""
    if func.overloadpacket is torch.ops.aten.index:  # by places it does not, by a mask it does
        return any(index is not None and index.dtype in (torch.bool, torch.uint8) for index in args[1])
    return any(tag in func.tags for tag in _UNFIT)


def _into(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any], result: Any) -> Callable[[], Any]:
    """A call that computes `result` again, into the same memory."""
    name = func._schema.name.removeprefix("aten::")
    if name in WRITING:
        return partial(getattr(torch, name), *args, **kwargs, out=result)
    # A linear layer's own form with `out` takes half as long again.
    if name == "linear" and args[0].is_contiguous() and result.is_contiguous():
        rows, made = (x.view(-1, x.shape[-1]) for x in (args[0], result))
        bias = args[2] if len(args) > 2 else None
        multiply = torch.mm if bias is None else partial(torch.addmm, bias)
        return partial(multiply, rows, args[1].t(), out=made)
    told = _told_where(func)
    if told is not None:
        return partial(told, *args, **kwargs, out=result)
    if isinstance(result, Tensor):
        return lambda: result.copy_(func(*args, **kwargs))

    def several() -> None:
        for held, new in zip(result, func(*args, **kwargs), strict=True):
            if held is not None:
                held.copy_(new)

    return several


@cache
def _told_where(func: Any) -> Any:
    """The overload of an operation that writes its one result into `out`; None where there is none."""
    wanted = [(argument.name, str(argument.type)) for argument in func._schema.arguments]
    for name in func.overloadpacket.overloads():
        overload = getattr(func.overloadpacket, name)
        given = overload._schema.arguments
        if [argument.name for argument in given if argument.is_out] == ["out"] and wanted == [
            (argument.name, str(argument.type)) for argument in given if not argument.is_out
        ]:
            return overload
    return None
