"""A prompt that is read and the steps behind it: the decode engine's, or plain forwards where it refuses a model."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch

from halobench.surgery.engine import DecodeEngine, NotTakenOverError, refusal
from halobench.surgery.heads import keep_logits
from halobench.tasks.scoring import chunk_sizes, prefill

if TYPE_CHECKING:
    from transformers import PreTrainedModel


class Decoder:
    """Reads rows of equal length, then a token a row at a time; to be used inside `scoring.evaluating`.

    Args:
        room: tokens of a prompt and its answer.
        replay: see `DecodeEngine`.

    Attributes:
        cache: what the model remembers.
        logits_BV: at the position read last.
        refused: why the engine does not run, or None.
    """

    cache: Any
    logits_BV: torch.Tensor

    def __init__(self, model: PreTrainedModel, room: int, *, replay: bool = True) -> None:
        self.model, self.room, self.refused = model, room, refusal(model)
        self._token: torch.Tensor | None = None  # the engine's own, where a step has chosen it
        if self.refused is None:
            self._engine = DecodeEngine(model, room=room, replay=replay)

    def read(self, ids_BT: torch.Tensor, chunk: int) -> torch.Tensor:
        """Reads prompts, once, in pieces of at most `chunk` tokens; returns `logits_BV`."""
        rows, length = ids_BT.shape
        self._token = None
        if self.refused is None:
            self.logits_BV = self._engine.prefill(ids_BT, chunk_sizes(self.model, rows, length, chunk))
            self.cache = self._engine.cache
        else:
            self.cache, self.logits_BV = prefill(self.model, ids_BT, chunk, room=self.room - length)
        return self.logits_BV

    def prepare(self) -> None:
        """What is done once before steps are replayed, so that the first of them takes no longer than the others."""
        if self.refused is None:
            try:
                self._engine.prepare(self.token)
            except NotTakenOverError as error:  # before anything was changed
                self.refused, self._token = str(error), None

    def step(self, ids_B1: torch.Tensor) -> torch.Tensor:
        """Reads a token a row; returns `logits_BV`, which the next step may write over."""
        if self.refused is None:
            try:
                self.logits_BV = self._engine.step(ids_B1)
                self._token = self._engine.token
                return self.logits_BV
            except NotTakenOverError as error:  # before anything was changed
                self.refused, self._token = str(error), None
        output = self.model(input_ids=ids_B1, past_key_values=self.cache, use_cache=True, **keep_logits(self.model, 1))
        self.cache, self.logits_BV = output.past_key_values, output.logits[:, -1]
        return self.logits_BV

    @property
    def token(self) -> torch.Tensor:
        """The most likely next token of each row, (B, 1)."""
        return self.logits_BV.argmax(-1, keepdim=True) if self._token is None else self._token

    @property
    def backends(self) -> dict[str, str]:
        """What ran, or why the engine did not."""
        return self._engine.backends if self.refused is None else {"engine": f"no: {self.refused}"}
