"""Hidden states of a model's layers, kept so that a model alike below some layer need not compute those layers again.

A probe makes a series of forward calls that depends on its samples alone, not on the model. `recording` keeps what
every layer gave in every call; `replaying` runs the same series with the layers below one layer left out: they compute
nothing and write nothing to a cache, and the layer gets the hidden state that was kept. HybridCache counts tokens by
its fullest layer, so that masks and positions come out as if all had run.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial, wraps
from typing import Any

from torch import Tensor, nn

from halobench.errors import HalobenchError


@dataclass
class Meter:
    """What forward calls took: token-layers computed (`run`), and what calls without replay would have computed."""

    run: int = 0
    one_by_one: int = 0


class Tape:
    """The outputs of a decoder's layers in a series of forward calls.

    Args:
        layers: the decoder's layers, all of them, in order. Their first argument and their (first) result are hidden
            states (B, T, D).
        meter: counts what is computed while the tape is in use.
    """

    def __init__(self, layers: nn.ModuleList, meter: Meter | None = None) -> None:
        self.layers, self.meter = layers, meter or Meter()
        self._kept: list[list[Any]] = []  # by call, then by layer
        self._call = -1

    @contextmanager
    def counting(self) -> Iterator[None]:
        """Forward calls in this block are counted, and nothing is kept."""
        with self._patched(first=0, record=False):
            yield

    @contextmanager
    def recording(self) -> Iterator[None]:
        """Forward calls in this block are kept, in place of what was."""
        self.forget()
        with self._patched(first=0, record=True):
            yield

    @contextmanager
    def replaying(self, first: int, record: bool = False) -> Iterator[None]:
        """Forward calls in this block compute layers from `first` on.

        Args:
            first: 0 computes all layers, the number of layers none.
            record: keep what the computed layers give, in place of what they gave before.

        Raises:
            HalobenchError: the calls are not those that were recorded.
        """
        with self._patched(first=first, record=record):
            yield
            if self._call + 1 != len(self._kept):
                raise HalobenchError(f"{self._call + 1} forward calls were made, {len(self._kept)} are on the tape")

    def forget(self) -> None:
        """Empties the tape."""
        self._kept = []

    @contextmanager
    def _patched(self, *, first: int, record: bool) -> Iterator[None]:
        self._call = -1
        before = [vars(layer).get("forward") for layer in self.layers]
        try:
            for index, layer in enumerate(self.layers):
                layer.forward = self._wrapped(layer.forward, index, first, record)
            yield
        except BaseException:
            if record:
                self.forget()  # half of a series
            raise
        finally:
            for layer, own in zip(self.layers, before, strict=True):
                if own is None:
                    vars(layer).pop("forward", None)
                else:
                    layer.forward = own

    def _wrapped(self, forward: Callable[..., Any], index: int, first: int, record: bool) -> Callable[..., Any]:
        act = partial(self._skip if index < first else self._run, forward, index, first, record)
        return wraps(forward)(lambda *args, **kwargs: act(*args, **kwargs))

    def _enter(self, index: int, first: int, record: bool, hidden: Tensor) -> None:
        """A layer was called; the first of them begins the next call of the series."""
        if index > 0:
            return
        self._call += 1
        self.meter.one_by_one += hidden.shape[0] * hidden.shape[1] * len(self.layers)
        if record and first == 0:
            self._kept[self._call :] = [[]]
        elif first > 0:
            if self._call >= len(self._kept):
                raise HalobenchError(f"forward call {self._call + 1} was made, {len(self._kept)} are on the tape")
            kept = _hidden(self._kept[self._call][first - 1]).shape
            if kept != hidden.shape:
                raise HalobenchError(
                    f"forward call {self._call + 1} is of shape {tuple(hidden.shape)}, on the tape it is {tuple(kept)}"
                )
            if record:
                del self._kept[self._call][first:]

    def _skip(
        self, forward: Callable[..., Any], index: int, first: int, record: bool, *args: Any, **kwargs: Any
    ) -> Any:
        """In place of a layer below `first`: what it gave when it was recorded."""
        self._enter(index, first, record, _given(args, kwargs))
        return self._kept[self._call][index]

    def _run(self, forward: Callable[..., Any], index: int, first: int, record: bool, *args: Any, **kwargs: Any) -> Any:
        hidden = _given(args, kwargs)
        self._enter(index, first, record, hidden)
        output = forward(*args, **kwargs)
        self.meter.run += hidden.shape[0] * hidden.shape[1]
        if record:
            self._kept[self._call].append(output)
        return output


def _given(args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor:
    return kwargs["hidden_states"] if "hidden_states" in kwargs else args[0]


def _hidden(output: Any) -> Tensor:
    """The hidden states in what a layer gave; some families add more to them."""
    return output[0] if isinstance(output, tuple) else output
