"""FlashMorph: one gate a layer between the frozen attention and the frozen aligned mixer, trained; the largest stay.

H_l = a_l * softmax_l(x) + (1 - a_l) * linear_l(x)        a_l in [0, 1], from 1
loss = |h - h_teacher|^2 at answer tokens + penalty * sum_l a_l        (arXiv 2606.30562)

h are hidden states after the last norm, h_teacher those of a separate pass of the untouched teacher. What we know of
the method is from secondary reading, not from the paper's text or code. Ours are: the clamp as a projection after each
step, the rate, the relative distance, the split into runs and the score along the path (see FlashMorph).
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, Literal

import numpy as np
import torch
from torch import Tensor, nn

from halobench.config import to_dict
from halobench.errors import HalobenchError, UserError
from halobench.mixers.contract import Mixer
from halobench.surgery.heads import final_hidden
from halobench.surgery.loop import Loop, LoopConfig, Precision
from halobench.surgery.objective import Objective
from halobench.surgery.optim import OptimConfig
from halobench.surgery.planted import ANSWER_WEIGHT
from halobench.surgery.selection.blend import (
    blended_hidden,
    branches_of,
    check_finite,
    own_folder,
    precision,
    squared_distance,
    trained_tokens,
)
from halobench.surgery.selection.contract import Need, Prices, Question, Ranking, Workbench
from halobench.surgery.selection.uncertainty import RESAMPLES, ranked


class Gates(Objective):
    """Objective: the loss above, over the gates alone.

    Args:
        teacher, mixers: frozen.
        penalty: on the sum of the gates.
        relative: see squared_distance.

    Attributes:
        gates: by layer.
        path: sum over steps of each gate, (layers,). answers: how many were seen.
    """

    path: Tensor
    answers: Tensor

    def __init__(self, name: str, teacher: Any, mixers: dict[int, Mixer], penalty: float, relative: bool) -> None:
        self.name, self.teacher, self.penalty, self.relative = name, teacher, penalty, relative
        self.branches = branches_of(teacher, mixers)
        self.frozen = (teacher, *mixers.values())
        device = next(teacher.parameters()).device
        self.gates = {layer: nn.Parameter(torch.ones((), device=device)) for layer in self.branches}
        self.module = nn.ParameterDict({f"layer {layer}": gate for layer, gate in self.gates.items()})
        self.path, self.answers = torch.zeros(len(self.gates), device=device), torch.zeros((), device=device)
        self.module.register_buffer("path", self.path)  # so that checkpoints hold it
        self.module.register_buffer("answers", self.answers)

    @torch.no_grad()
    def values(self) -> Tensor:
        """The gates (layers,), after the projection onto [0, 1] that makes up the second half of a step."""
        for gate in self.gates.values():
            gate.clamp_(0, 1)
        return torch.stack([*self.gates.values()])

    def loss(self, tokens_BT: Tensor, weights_BT: Tensor) -> tuple[Tensor, Tensor]:
        """Sum over answer tokens of distance and penalty, and their number; a batch without answers is penalty alone.

        The loop gives a whole step's batch at once, so that `path` grows once a step.
        """
        self.path += self.values()
        shares: list[Tensor] = [*self.gates.values()]
        penalty = self.penalty * torch.stack(shares).sum()
        asked_BT = weights_BT[:, 1:] >= ANSWER_WEIGHT  # a target's weight; the position before it predicts it
        rows = asked_BT.any(1)
        count = asked_BT.sum()
        if not bool(rows.any()):
            return penalty, torch.ones_like(penalty)
        inputs, asked_BT = tokens_BT[rows, :-1], asked_BT[rows]
        with torch.no_grad():
            self.answers += count
            wanted = final_hidden(self.teacher, inputs)[asked_BT]
        for both, share in zip(self.branches.values(), shares, strict=True):
            both.share = share
        got = blended_hidden(self.teacher, self.branches, inputs)[asked_BT]
        distance = squared_distance(got, wanted, self.relative)
        check_finite(self.name, distance, self.teacher, self.branches, inputs)
        return distance + penalty * count, count


@dataclass(frozen=True, kw_only=True)
class FlashMorph:
    """Keep the layers whose gates stay open.

    tokens: of all runs together; the paper trains one run of 20M. runs: independent runs, each on data of its own,
    whose scatter is the uncertainty. length, batch_tokens: of a sequence and of a step. rate: Adam's, on the gates,
    held constant. penalty: on the sum of the gates. normalise: measure the distance in units of the teacher's mean
    square, which gives `penalty` one meaning for every model: what a layer must save, of the whole, to stay. planted:
    share of sequences with retrieval in them; only they have answers.
    score: "path" is the mean of a gate over the steps, which orders gates that end at the same bound by when they came
    there; "last" is the gate at the end, as in the paper.
    """

    name: ClassVar[str] = "flashmorph"
    label: ClassVar[str] = "FlashMorph"
    paper: ClassVar[str] = "https://arxiv.org/abs/2606.30562"
    needs: ClassVar[frozenset[Need]] = frozenset({"workbench"})

    tokens: int = 200_000
    runs: int = 4
    length: int = 512
    batch_tokens: int = 1024
    rate: float = 0.05
    penalty: float = 0.1
    normalise: bool = True
    planted: float = 1.0
    score: Literal["path", "last"] = "path"

    def __post_init__(self) -> None:
        if self.runs < 1 or self.tokens < self.runs * self.batch_tokens or self.batch_tokens < self.length:
            raise UserError(
                f"flashmorph: {self.tokens} tokens in {self.runs} runs, in steps of {self.batch_tokens} tokens at "
                f"length {self.length}; there must be a run, in each run a step, and in a step a sequence"
            )
        if not self.penalty > 0:
            raise UserError(f"flashmorph: penalty={self.penalty}; above 0, for gates that cost nothing stay open")
        if not 0 < self.planted <= 1:
            raise UserError(f"flashmorph: planted={self.planted}; above 0 and at most 1, for text alone asks nothing")

    def price(self, prices: Prices) -> int:
        """See Selector; exact, and the same for every number of layers kept."""
        return self.runs * trained_tokens(self._config(0, "fp32"))

    def rank(self, question: Question) -> Ranking:
        """See Selector. The uncertainty is a bootstrap over runs: with few of them, a lower bound."""
        workbench = question.require_workbench(self.name)
        training = {name: value for name, value in to_dict(self).items() if name != "score"}
        folder = own_folder(workbench, self.name, training)
        scores = np.array([self._run(workbench, folder / f"run-{run}", run) for run in range(self.runs)])
        drawn = None
        if self.runs > 1:
            picks = np.random.default_rng(question.seed).integers(self.runs, size=(RESAMPLES, self.runs))
            drawn = scores[picks].mean(1)
        cost = self.runs * trained_tokens(self._config(0, "fp32"))
        return ranked(self, question, scores.mean(0), drawn, cost)

    def _config(self, seed: int, kind: Precision) -> LoopConfig:
        return LoopConfig(
            tokens=self.tokens // self.runs,
            batch_tokens=self.batch_tokens,
            lengths=[self.length],
            optim=OptimConfig(rate=self.rate, schedule="constant", warmup_steps=0),
            precision=kind,
            planted=self.planted,
            held_out_sequences=0,
            trackers=[],
            seed=seed,
        )

    def _run(self, workbench: Workbench, folder: Path, run: int) -> np.ndarray:
        """The score of each layer in one run, (layers,); a run that was finished before is read, not made again."""
        config = self._config(workbench.seed, precision(workbench))
        gates = Gates(self.name, workbench.teacher, workbench.mixers, self.penalty, self.normalise)
        first = run * config.steps() * (config.batch_tokens // self.length)
        loop = Loop(
            folder,
            gates,
            workbench.data(self.planted),
            config,
            first_sequence=first,
            first_position=first * (self.length + 1),
            device=workbench.device,
        )
        loop.run()
        if not float(gates.answers):
            raise HalobenchError(
                f"flashmorph: run {run} met no answers in {trained_tokens(config)} tokens, so its gates say nothing; "
                "raise the option planted, or tokens"
            )
        scores = gates.values() if self.score == "last" else gates.path / config.steps()
        return scores.detach().double().cpu().numpy()
