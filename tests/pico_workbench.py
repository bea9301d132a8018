"""A workbench of pico size: layers whose mixers equal their attention, and broken ones, so that the answer is known."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from halobench.mixers.contract import Mixer
from halobench.surgery.plan import SurgeryPlan
from halobench.surgery.planted import ANSWER_WEIGHT
from halobench.surgery.planted import Sequence as Drawn
from halobench.surgery.selection.contract import Measured
from halobench.surgery.transplant import build_mixers, swapped, transplant
from tests.conftest import make_pico


class Quiz:
    """Random tokens; every fourth target is an answer. Notes which sequences were drawn, and how many tokens."""

    def __init__(self, seed: int = 0, answers: bool = True) -> None:
        self.seed, self.answers = seed, answers
        self.drawn: list[int] = []
        self.tokens = 0

    def sequence(self, index: int, length: int, position: int = 0) -> Drawn:
        """The `index`-th sequence; the place in the text does not matter here."""
        self.drawn.append(index)
        self.tokens += length - 1
        weights = np.ones(length)
        if self.answers:
            weights[::4] = ANSWER_WEIGHT
        return Drawn(np.random.default_rng((self.seed, index)).integers(3, 101, length), weights)


class PicoWorkbench:
    """See Workbench.

    Args:
        broken: layers whose mixers give the opposite of what attention gives; those of the others equal it.
    """

    device = "cpu"
    prompt = 32
    hype = True

    def __init__(self, folder: Path, broken: tuple[int, ...] = (2,), seed: int = 0) -> None:
        self.folder, self.seed = folder, seed
        self.teacher: Any = make_pico().requires_grad_(False)
        self.layers = self.teacher.config.num_hidden_layers
        self.mixers = {layer: m.eval() for layer, m in build_mixers(self.teacher, "softmax", EXACT).items()}
        for layer, mixer in self.mixers.items():
            mixer.requires_grad_(False)
            if layer in broken:
                mixer.o_proj.weight.neg_()  # type: ignore[operator, union-attr]
        self.quiz = Quiz(seed)
        self.asked: list[tuple[int, ...]] = []
        self.carrier: Any = transplant(self.teacher, SurgeryPlan.for_model(self.teacher, keep="all")).eval()

    def data(self, planted: float) -> Any:
        return self.quiz

    def training_mixers(self) -> dict[int, Mixer]:
        copies = copy.deepcopy(self.mixers)
        return {layer: mixer.float().train().requires_grad_(True) for layer, mixer in copies.items()}

    @torch.no_grad()
    def measure(
        self,
        kept: Sequence[int],
        task: str,
        *,
        length: int | None = None,
        samples: int | None = None,
        hype: bool = False,
        mixers: dict[int, Mixer] | None = None,
    ) -> Measured:
        """The answer is the token that the teacher finds likeliest."""
        assert length is not None and samples is not None
        self.asked.append(tuple(kept))
        rows = [np.random.default_rng((99, i)).integers(3, 101, length) for i in range(samples)]
        tokens = torch.from_numpy(np.stack(rows))
        answers = self.teacher(input_ids=tokens).logits.argmax(-1, keepdim=True)
        chosen = self.mixers if mixers is None else mixers
        with swapped(self.carrier, {i: None if i in kept else mixer for i, mixer in chosen.items()}) as student:
            found = student(input_ids=tokens).logits.log_softmax(-1).gather(-1, answers).squeeze(-1)
        return Measured({"answer_logprob": found.mean(1).tolist()}, samples * length)


EXACT = {"rope": True, "output_gate": False}
