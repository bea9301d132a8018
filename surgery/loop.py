"""The one training loop: draws sequences, accumulates gradients, steps, logs, checkpoints and resumes exactly.

A stage brings an Objective (what trains and its loss); the loop brings everything else. The state that decides the
future is the step, the sequences drawn, the weights and the optimiser's moments: all of it is in the checkpoint.
"""

from __future__ import annotations

import math
import signal
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from halobench.config import to_dict
from halobench.errors import HalobenchError, UserError
from halobench.files import append_json_line, atomic_path, read_json, write_json, write_text
from halobench.progress import Progress
from halobench.surgery.optim import OptimConfig, Optimizer, rate_factor
from halobench.surgery.parallel import Team
from halobench.surgery.planted import Mixture


@dataclass(frozen=True, kw_only=True)
class LoopConfig:
    """Budget and shape of a stage.

    tokens: the budget. batch_tokens: tokens of one step, over all processes. lengths: sequence lengths in tokens, one
    drawn per step when there are several. micro_batch_tokens: tokens of one forward pass of one process.
    precision: of the matrix products ("bf16" through autocast). planted: share of synthetic retrieval in the data.
    """

    tokens: int
    batch_tokens: int
    lengths: list[int]
    optim: OptimConfig
    micro_batch_tokens: int | None = None
    precision: str = "bf16"
    planted: float = 0.0
    save_every_seconds: float = 120.0
    seed: int = 0

    def steps(self) -> int:
        """Optimiser steps of the stage."""
        return max(1, self.tokens // self.batch_tokens)


class Objective(Protocol):
    """What a stage trains and how it is judged."""

    name: str

    def parameters(self) -> list[tuple[str, nn.Parameter]]:
        """The parameters that train, by name."""
        ...

    def embeddings(self) -> frozenset[int]:
        """Ids of parameters that are tables (embedding, unembedding)."""
        ...

    def loss(self, tokens_BT: Tensor, weights_BT: Tensor) -> tuple[Tensor, Tensor]:
        """(sum of the loss, sum of the weights it is divided by) of a micro-batch."""
        ...


@dataclass
class StageResult:
    """What a stage did: tokens and seconds over all its runs, and its losses (first and last: means over a fifth)."""

    tokens: int = 0
    seconds: float = 0.0
    first_loss: float = math.nan
    last_loss: float = math.nan
    sequences: int = 0
    resumed: bool = False
    losses: list[float] = field(default_factory=list)


class Loop:
    """Trains one stage in its directory.

    Args:
        folder: the stage's directory; `checkpoint/` and `metrics.jsonl` live in it.
        objective: what trains.
        data: where sequences come from.
        config: budget and shape.
        first_sequence: where in the data stream this stage starts.
        device: of the model.
        team: the processes that share each batch.
    """

    def __init__(
        self,
        folder: Path,
        objective: Objective,
        data: Mixture,
        config: LoopConfig,
        *,
        first_sequence: int = 0,
        device: torch.device | str = "cpu",
        team: Team | None = None,
    ) -> None:
        self.folder, self.objective, self.data, self.config = folder, objective, data, config
        self.device, self.team = torch.device(device), team or Team()
        self.optimizer = Optimizer(objective.parameters(), config.optim, objective.embeddings())
        self.result = StageResult(sequences=first_sequence)
        self.step = 0

    def run(self) -> StageResult:
        """Trains to the end of the budget, from the last checkpoint if there is one."""
        self._resume()
        steps, saved, started = self.config.steps(), time.monotonic(), time.monotonic()
        before = self.result.seconds
        total = steps * self.config.batch_tokens
        progress = Progress(self.objective.name, total, self.result.tokens, quiet=not self.team.leads)
        with progress, _interrupts() as interrupted:
            while self.step < steps:
                loss = self._one_step(steps)
                self.result.seconds = before + time.monotonic() - started
                progress.advance(self.config.batch_tokens, f"loss {loss:.4f}")
                if interrupted():
                    self.save()
                    raise KeyboardInterrupt
                if time.monotonic() - saved > self.config.save_every_seconds:
                    self.save()
                    saved = time.monotonic()
        self._summarise()
        self.save()
        return self.result

    def _one_step(self, steps: int) -> float:
        length, count = self._shape()
        first = self.result.sequences
        mine = [self.data.sequence(first + place, length + 1) for place in self.team.share(count)]
        per_pass = max(1, (self.config.micro_batch_tokens or count * length) // length)
        sums = torch.zeros(2, device=self.device, dtype=torch.float64)
        for start in range(0, len(mine), per_pass):
            group = mine[start : start + per_pass]
            tokens = torch.from_numpy(np.stack([s.tokens for s in group])).to(self.device)
            weights = torch.from_numpy(np.stack([s.weights for s in group])).float().to(self.device)
            with torch.autocast(self.device.type, torch.bfloat16, enabled=self.config.precision == "bf16"):
                loss, weight = self.objective.loss(tokens, weights)
            loss.backward()
            sums += torch.stack([loss.detach().double(), weight.double()])
        total, weight = self.team.sum_gradients(self.optimizer.parameters, sums).tolist()
        norm = self._clip(weight)
        mean = total / weight
        if not (math.isfinite(mean) and math.isfinite(norm)):
            self._explain(mean, norm)
        self.optimizer.step(rate_factor(self.config.optim, self.step, steps))
        self.step += 1
        self.result.tokens += count * length
        self.result.sequences += count
        self.result.losses.append(mean)
        if self.team.leads:
            row = {"step": self.step, "tokens": self.result.tokens, "length": length, "loss": mean, "norm": norm}
            append_json_line(self.folder / "metrics.jsonl", row)
        return mean

    def _shape(self) -> tuple[int, int]:
        """(length, sequences) of the next step. The same for every process, and after a resume."""
        lengths = self.config.lengths
        pick = np.random.default_rng((self.config.seed, self.step, 5)).integers(len(lengths))
        length = lengths[int(pick)]
        if self.config.batch_tokens < length:
            raise UserError(f"{self.objective.name}: batch_tokens {self.config.batch_tokens} is below length {length}")
        return length, self.config.batch_tokens // length

    def _clip(self, weight: float) -> float:
        """Divides the gradients by the weight of the batch, limits their norm, and returns the norm before."""
        gradients = [p.grad for p in self.optimizer.parameters if p.grad is not None]
        norm = float(torch.linalg.vector_norm(torch.stack(torch._foreach_norm(gradients)))) / weight
        scale = min(1.0, self.config.optim.clip / max(norm, 1e-12)) if math.isfinite(norm) else 1.0
        torch._foreach_mul_(gradients, scale / weight)
        return norm

    def _explain(self, loss: float, norm: float) -> None:
        bad = [n for n, p in self.objective.parameters() if p.grad is not None and not torch.isfinite(p.grad).all()]
        where = f"first at {bad[0]}" if bad else "in the loss itself"
        raise HalobenchError(
            f"{self.objective.name}: numbers stopped being finite at step {self.step} (loss {loss}, gradient {norm}), "
            f"{where}; the last good checkpoint is {self.folder / 'checkpoint'}: lower the rate and run again"
        )

    def _summarise(self) -> None:
        losses = self.result.losses
        part = max(1, len(losses) // 5)  # single steps differ by what the mixture drew
        if losses:
            self.result.first_loss = float(np.mean(losses[:part]))
            self.result.last_loss = float(np.mean(losses[-part:]))

    def save(self) -> None:
        """Writes the checkpoint: all of it or nothing."""
        if not self.team.leads:
            return
        with atomic_path(self.folder / "checkpoint") as folder:
            folder.mkdir(parents=True)
            weights = {name: p.detach().contiguous() for name, p in self.objective.parameters()}
            save_file(weights, folder / "weights.safetensors")
            save_file(self.optimizer.state(), folder / "optimizer.safetensors")
            state = {"step": self.step, "config": to_dict(self.config), "result": vars(self.result)}
            state["result"] = {
                k: None if isinstance(v, float) and math.isnan(v) else v for k, v in vars(self.result).items()
            }
            write_json(folder / "state.json", state)

    def _resume(self) -> None:
        folder = self.folder / "checkpoint"
        self.folder.mkdir(parents=True, exist_ok=True)
        if not folder.exists():
            (self.folder / "metrics.jsonl").unlink(missing_ok=True)
            return
        state = read_json(folder / "state.json")
        changed = sorted(k for k, v in to_dict(self.config).items() if state["config"].get(k) != v)
        if changed:
            raise UserError(
                f"{self.folder} was begun with another {', '.join(changed)}; use the same settings, or a new folder"
            )
        weights = load_file(folder / "weights.safetensors")
        with torch.no_grad():
            for name, parameter in self.objective.parameters():
                parameter.copy_(weights[name])
        self.optimizer.load_state(load_file(folder / "optimizer.safetensors"))
        result: dict[str, Any] = {k: math.nan if v is None else v for k, v in state["result"].items()}
        self.result, self.step = StageResult(**result), state["step"]
        self.result.resumed = True
        _truncate_log(self.folder / "metrics.jsonl", self.step)


@contextmanager
def _interrupts() -> Iterator[Callable[[], bool]]:
    """Ctrl-C and SIGTERM wait for the end of a step, where the state is whole; a second one acts at once."""
    seen: list[int] = []

    def note(number: int, frame: Any) -> None:
        seen.append(number)
        if len(seen) > 1:
            raise KeyboardInterrupt

    if threading.current_thread() is not threading.main_thread():
        yield lambda: False
        return
    before = {number: signal.signal(number, note) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield lambda: bool(seen)
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _truncate_log(path: Path, steps: int) -> None:
    """Drops the lines of steps that were made after the checkpoint and will be made again."""
    if path.exists():
        lines = path.read_text().splitlines(keepends=True)[:steps]
        write_text(path, "".join(lines))
