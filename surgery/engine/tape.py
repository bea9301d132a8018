"""A step on a CPU as a list of tensor operations, replayed without the Python that called them.

For a small model most of a decode step is Python: modules, hooks, shapes. All of that gives the same calls at every
step, because where the next token goes is a number in a tensor. So the operations of one step are noted, with every
tensor they read or wrote kept where it is, and replayed into the same tensors: what a CUDA graph does on a GPU. A view
of a fixed tensor is fixed too and costs nothing again.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import cache, partial
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
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
    """An operation as it was called and as it is replayed, and the memory it reads and writes.

    `changes`: what it leaves differs from step to step even where what it reads does not.
    """

    func: Any
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    result: Any
    run: Callable[[], Any]
    read: set[int]
    written: set[int]
    changes: bool


class _Reads(TorchFunctionMode):
    """Refuses what brings numbers to Python and is no operation."""

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if func in (Tensor.tolist, Tensor.numpy, Tensor.__array__):
            raise UnfitError(f"the model decides by numbers it has computed ({func.__name__})")
        return func(*args, **(kwargs or {}))


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
        self._kept: list[list[Tensor]] = []  # so that no memory of one is another's later
        self._reads = _Reads()

    def __enter__(self) -> Tape:
        self._reads.__enter__()
        return super().__enter__()

    def __exit__(self, *raised: Any) -> None:
        super().__exit__(*raised)
        self._reads.__exit__(*raised)

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        with torch._C.DisableTorchFunction():  # an operation may look at numbers: it does so again in a replay
            result = func(*args, **kwargs)
        given, made = ([x for x in tree_flatten(tree)[0] if isinstance(x, Tensor)] for tree in ((args, kwargs), result))
        if _decides(func, args) or (given and not made and not func._schema.is_mutable):
            raise UnfitError(f"the model decides by numbers it has computed ({func})")
        self._kept += [given, made]
        read, written = ({x.untyped_storage().data_ptr() for x in tensors} for tensors in (given, made))
        changes = func._schema.is_mutable or torch.Tag.nondeterministic_seeded in func.tags
        run: Callable[[], Any]
        if func._schema.is_mutable:
            run, written = partial(func, *args, **kwargs), read | written
        elif func._schema.name.startswith("aten::empty") or written <= read:
            return result
        else:
            run = _into(func, args, kwargs, result)
        self._noted.append(
            _Call(
                func=func, args=args, kwargs=kwargs, result=result,
                run=run, read=read, written=written, changes=changes,
            )
        )  # fmt: skip
        return result

    @property
    def calls(self) -> list[Callable[[], Any]]:
        """What a replay runs, in order."""
        if self._calls is None:
            changing = self._changing.union(*(call.written for call in self._noted if call.changes))
            needed = []
            for call in self._noted:
                if call.changes or not changing.isdisjoint(call.read | call.written):
                    changing |= call.written
                    needed.append(call)
            # Where a number is rounded to half precision a last digit more or less shows.
            halves = any(x.dtype in (torch.float16, torch.bfloat16) for kept in self._kept for x in kept)
            self._calls = [call.run for call in needed] if halves else _shortened(needed)
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
    if name == "matmul" and all(_is_batch(x, result.shape[:-2]) for x in (*args, result)):
        return partial(torch.bmm, *(x.view(-1, *x.shape[-2:]) for x in args), out=result.view(-1, *result.shape[-2:]))
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


def _is_batch(x: Tensor, lead: torch.Size) -> bool:
    """Whether x is contiguous matrices, as many as `lead` says."""
    return x.dim() > 1 and x.numel() > 0 and x.is_contiguous() and x.shape[:-2] == lead


def _shortened(calls: list[_Call]) -> list[Callable[[], Any]]:
    """What replays the calls, with one product of x and itself for the mean(x^2) + epsilon of a norm."""
    readers = Counter(storage for call in calls for storage in call.read)
    short: list[Callable[[], Any]] = []
    at = 0
    while at < len(calls):
        product = _mean_square(calls[at : at + 3], readers)
        short.append(calls[at].run if product is None else product)
        at += 1 if product is None else 3
    return short


def _mean_square(calls: list[_Call], readers: Counter[int]) -> Callable[[], Any] | None:
    """One call in place of three, if they are an RMS norm's first and nothing else reads what the first two leave."""
    aten = torch.ops.aten
    if [call.func for call in calls[1:]] != [aten.mean.dim, aten.add.Tensor] or any(call.kwargs for call in calls):
        return None
    square, mean, add = calls
    x, (mean_of, *over), (add_to, *epsilon) = square.args[0], mean.args, add.args
    squares = square.func is aten.square.default or (square.func is aten.pow.Tensor_Scalar and square.args[1] == 2)
    if not squares or mean_of is not square.result or add_to is not mean.result or over != [[-1], True]:
        return None
    alone = all(readers[storage] == 1 for call in (square, mean) for storage in call.written)
    plain = x.is_contiguous() and x.numel() > 0 and x.dtype == add.result.dtype and isinstance(epsilon[0], float)
    if not alone or not plain:
        return None
    rows = x.view(-1, 1, x.shape[-1])
    offset = x.new_tensor(epsilon[0]).expand(len(rows), 1, 1)
    out = add.result.view(-1, 1, 1)
    return partial(torch.baddbmm, offset, rows, rows.transpose(1, 2), alpha=1 / x.shape[-1], out=out)


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
