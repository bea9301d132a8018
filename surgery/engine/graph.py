"""A step of work recorded once and replayed: a CUDA graph, or the reason why there is none."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from halobench.errors import reason_of


def capture(work: Callable[[], None], written: Sequence[Tensor], device: torch.device) -> tuple[Any, str]:
    """(a CUDA graph of `work`, "cuda graph"), or (None, "no: why").

    `work` reads and writes fixed tensors. It is run twice beforehand: kernels are compiled and memory is set aside, and
    the second time anything that waits for the GPU is an error, for a graph cannot hold it.

    Args:
        written: tensors whose content must be afterwards what it was before.
    """
    if device.type != "cuda":
        return None, f"no: the model is on {device.type}"
    before = [tensor.clone() for tensor in written]
    try:
        side = torch.cuda.Stream(device)
        side.wait_stream(torch.cuda.current_stream(device))
        with torch.cuda.stream(side):
            work()
            put_back(written, before)
            with _waits_are_errors():
                work()
            put_back(written, before)
        torch.cuda.current_stream(device).wait_stream(side)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, stream=side):
            work()
        return graph, "cuda graph"
    except torch.OutOfMemoryError:
        raise
    except Exception as error:  # whatever the model's code does that a graph cannot hold
        torch.cuda.synchronize(device)
        put_back(written, before)
        return None, f"no: {reason_of(error)}"


def put_back(tensors: Iterable[Tensor], before: Iterable[Tensor]) -> None:
    """Gives tensors the numbers that copies of them have."""
    for tensor, then in zip(tensors, before, strict=True):
        tensor.copy_(then)


@contextmanager
def _waits_are_errors() -> Iterator[None]:
    mode = torch.cuda.get_sync_debug_mode()
    torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode(mode)
