"""The one training loop: draws sequences, accumulates gradients, steps, logs, checkpoints and resumes exactly.

A stage brings an Objective (what trains and its loss); the loop brings everything else, on accelerate: one process,
several by DDP or FSDP2, several machines. The state that decides the future is the step, the place in the data, the
weights and the optimiser's moments: all of it is in a checkpoint.
"""

from __future__ import annotations

import math
import signal
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, NamedTuple, Protocol

import numpy as np
import torch
from torch import Tensor

from halobench.config import to_dict
from halobench.errors import DivergedError, HalobenchError, UserError
from halobench.files import append_json_line, write_json, write_text
from halobench.progress import Progress, say
from halobench.surgery import gates, trackers
from halobench.surgery.anatomy import evaluating
from halobench.surgery.objective import LossModule, Objective
from halobench.surgery.optim import OptimConfig, Optimizer, rate_factor
from halobench.surgery.parallel import Team, agree, fill, local, make_accelerator, whole, wrap
from halobench.surgery.planted import Sequence
from halobench.surgery.training_state import Checkpoints, Saved, at, differences

METRICS = "metrics.jsonl"
Precision = Literal["bf16", "fp32"]
Batch = tuple[Tensor, Tensor, float]  # tokens (B, T + 1), weights of the same shape, share (see LossModule)


@dataclass(frozen=True, kw_only=True)
class LoopConfig:
    """Budget and shape of a stage.

    tokens: the budget. batch_tokens: tokens of one step, over all processes. lengths: sequence lengths in tokens, one
    drawn per step when there are several. micro_batch_tokens: tokens of one forward pass of one process.
    precision: of the matrix products ("bf16" through autocast). planted: share of synthetic retrieval in the data.
    gradient_checkpointing: compute activations again in the backward pass rather than keep them. keep_checkpoints: how
    many of the newest stay. held_out_sequences: on which the loss is measured before and after (0: not at all).
    trackers: where numbers go besides metrics.jsonl; None is TensorBoard where it is installed.
    """

    tokens: int
    batch_tokens: int
    lengths: list[int]
    optim: OptimConfig
    micro_batch_tokens: int | None = None
    precision: Precision = "bf16"
    planted: float = 0.0
    gradient_checkpointing: bool = False
    save_every_seconds: float = 120.0
    keep_checkpoints: int = 2
    held_out_sequences: int = 8
    trackers: list[str] | None = None
    seed: int = 0

    def __post_init__(self) -> None:
        """Raises UserError for what no training can be made of."""
        least = {
            "tokens": 0,
            "batch_tokens": 1,
            "micro_batch_tokens": 1,
            "keep_checkpoints": 1,
            "held_out_sequences": 0,
        }
        for name, low in least.items():
            value = getattr(self, name)
            if value is not None and value < low:
                raise UserError(f"{name} is {value}; it must be {low} or more")
        if not self.lengths or min(self.lengths) < 1:
            raise UserError(f"lengths is {self.lengths}; give one or more sequence lengths of 1 or more tokens")
        if self.batch_tokens < max(self.lengths):
            raise UserError(
                f"batch_tokens {self.batch_tokens} is below the longest of lengths {self.lengths}; raise it"
            )
        if not 0 <= self.planted <= 1:
            raise UserError(f"planted is {self.planted}; it is a share from 0 (text alone) to 1 (retrieval alone)")

    def steps(self) -> int:
        """Optimiser steps of the stage."""
        return max(1, self.tokens // self.batch_tokens)

    @property
    def trained_tokens(self) -> int:
        """Tokens of all steps: the budget, in whole steps and at least one."""
        return self.steps() * self.batch_tokens


class Data(Protocol):
    """Where sequences come from; see planted.Mixture."""

    def sequence(self, index: int, length: int, position: int) -> Sequence:
        """Training sequence number `index`, with `position` tokens drawn before it."""
        ...

    def held_out(self, index: int, length: int) -> Sequence:
        """A sequence that training never sees."""
        ...


@dataclass
class StageResult:
    """What a stage did, over all its runs.

    first_loss, last_loss: means over the first and the last fifth of the steps. sequences, position: sequences and
    tokens drawn from the data, those of the stages before included. fell: whether last is below first.
    """

    tokens: int = 0
    seconds: float = 0.0
    first_loss: float = math.nan
    last_loss: float = math.nan
    sequences: int = 0
    position: int = 0
    resumed: bool = False
    losses: list[float] = field(default_factory=list)
    held_out_before: float | None = None
    held_out_after: float | None = None
    fell: bool | None = None


class _Totals(NamedTuple):
    """A step over all processes: sums of loss and weight, gradient norms by tensor, who wants to save or to stop."""

    loss: float
    weight: float
    norms: dict[str, float]
    save: bool
    stop: bool


class Loop:
    """Trains one stage in its directory.

    Args:
        folder: the stage's directory; `checkpoints/`, `metrics.jsonl` and `trains.json` live in it.
        objective: what trains.
        data: where sequences come from.
        config: budget and shape.
        first_sequence, first_position: sequences and tokens drawn from the data by the stages before.
        device: of the model.
        team: the processes that share each batch; by default those that were launched with this one.
    """

    def __init__(
        self,
        folder: Path,
        objective: Objective,
        data: Data,
        config: LoopConfig,
        *,
        first_sequence: int = 0,
        first_position: int = 0,
        device: torch.device | str = "cpu",
        team: Team | None = None,
    ) -> None:
        self.folder, self.objective, self.data, self.config = folder, objective, data, config
        self.device, self.team = torch.device(device), team or Team.join(device)
        self.result = StageResult(sequences=first_sequence, position=first_position)
        self.step = 0
        if config.gradient_checkpointing:
            _recompute(objective, True)
        self.accelerator = make_accelerator(
            device, idle=objective.idle, log_with=trackers.chosen(config.trackers) or None, project_dir=folder
        )
        self.model, self._unwrap = wrap(LossModule(objective, config.precision), self.accelerator, self.team)
        self.named = gates.trained(objective.module)
        self.optimizer = Optimizer(self.named, config.optim, objective.module)
        self.checkpoints = Checkpoints(folder, config.keep_checkpoints)
        expected = [] if objective.idle else [name for name, _ in self.named]
        self.reach = gates.Reach(objective.name, expected, speaks=self.team.leads)
        self._written: int | None = None  # the step of the newest checkpoint
        self._saved_at = time.monotonic()
        self._interrupted: Callable[[], bool] = lambda: False

    def run(self) -> StageResult:
        """Trains to the end of the budget, from the last checkpoint if there is one."""
        self._resume()
        if self.team.leads:
            write_json(self.folder / "trains.json", gates.inventory(self.named))
        if self.step == 0:
            self.result.held_out_before = self._held_out()
        trackers.begin(self.accelerator, self.folder.parent.name, self.folder.name, to_dict(self.config), self.step)
        try:
            self._train()
        finally:
            for tracker in self.accelerator.trackers:  # end_training would dissolve the team as well
                tracker.finish()
        self._summarise()
        self.save()
        self._unwrap()
        if self.config.gradient_checkpointing:
            _recompute(self.objective, False)
        return self.result

    def _train(self) -> None:
        steps, started, before = self.config.steps(), time.monotonic(), self.result.seconds
        total = steps * self.config.batch_tokens
        progress = Progress(self.objective.name, total, self.result.tokens, quiet=not self.team.leads)
        self._saved_at = started
        with progress, _interrupts() as self._interrupted:
            first = self.step
            while self.step < steps:
                totals = self._one_step(steps, first=self.step == first)
                self.result.seconds = before + time.monotonic() - started
                progress.advance(self.config.batch_tokens, f"loss {self.result.losses[-1]:.4f}")
                if totals.stop or (totals.save and self.step < steps):
                    self.save()
                if totals.stop:
                    raise KeyboardInterrupt

    # One step ---------------------------------------------------------------------------------------------------------

    def _one_step(self, steps: int, first: bool) -> _Totals:
        length, count = self._shape()
        start, position = self.result.sequences, self.result.position
        place = np.random.SeedSequence((self.config.seed, self.step, self.team.rank)).generate_state(1)
        torch.manual_seed(int(place[0]))  # of dropout, so that a resumed run draws it alike
        batches = self._batches(
            count, length, lambda i: self.data.sequence(start + i, length + 1, position + i * (length + 1))
        )
        totals = self._totals(self._passes(batches))
        if first:
            gates.check_frozen(self.objective.name, self.objective.module, self.objective.frozen)
        if totals.weight == 0:
            raise HalobenchError(f"{self.objective.name}: no token of step {self.step} carries weight; see the data")
        mean = totals.loss / totals.weight
        scale = self.team.size / totals.weight  # DDP and FSDP2 divide by the size
        norm = math.sqrt(sum(x * x for x in totals.norms.values())) * scale
        if not (math.isfinite(mean) and math.isfinite(norm)):
            self._explain(batches, mean, norm)
        if self.step == 0:
            gates.check_start(self.objective.name, mean, self.objective.ceiling)
        self.reach.note(totals.norms, self.step + 1, self.step + 1 == steps)
        limit = min(1.0, self.config.optim.clip / max(norm, 1e-12))
        torch._foreach_mul_([local(p.grad) for _, p in self.named if p.grad is not None], limit * scale)
        factor = rate_factor(self.config.optim, self.step, steps)
        self.optimizer.step(factor)
        self._count(length, count, mean, norm, factor)
        return totals

    def _count(self, length: int, count: int, mean: float, norm: float, factor: float) -> None:
        self.step += 1
        self.result.tokens += count * length
        self.result.sequences += count
        self.result.position += count * (length + 1)
        self.result.losses.append(mean)
        row = {"loss": mean, "norm": norm, "rate": self.config.optim.rate * factor, "tokens": self.result.tokens}
        if self.team.leads:
            append_json_line(self.folder / METRICS, {"step": self.step, "length": length, **row})
        if self.accelerator.trackers:
            self.accelerator.log(row, step=self.step)

    def _shape(self) -> tuple[int, int]:
        """(length, sequences) of the next step. The same for every process, and after a resume."""
        lengths = self.config.lengths
        pick = np.random.default_rng((self.config.seed, self.step, 5)).integers(len(lengths))
        length = lengths[int(pick)]
        return length, self.config.batch_tokens // length

    def _batches(self, count: int, length: int, draw: Callable[[int], Sequence]) -> list[Batch]:
        """This process's share of `count` sequences in micro-batches; every process has as many of them."""
        mine = [draw(place) for place in self.team.share(count)]
        per_pass = max(1, (self.config.micro_batch_tokens or count * length) // length)
        groups = [mine[i * per_pass : (i + 1) * per_pass] for i in range(self.team.passes(count, per_pass))]
        # A pass without a share reads what is at hand: a stream is only ever read forward.
        spare = mine[-1:] or ([] if all(groups) else [draw(0)])
        return [self._tensors(group or spare, 1.0 if group else 0.0) for group in groups]

    def _tensors(self, group: list[Sequence], share: float) -> Batch:
        tokens = torch.from_numpy(np.stack([s.tokens for s in group])).to(self.device)
        weights = torch.from_numpy(np.stack([s.weights for s in group])).float().to(self.device)
        return tokens, weights, share

    def _passes(self, batches: list[Batch]) -> Tensor:
        """Forward and backward of every micro-batch; DDP sums gradients over processes in the last one alone."""
        sums = torch.zeros(2, device=self.device, dtype=torch.float64)
        for number, batch in enumerate(batches):
            alone = number + 1 < len(batches) and not self.team.sharded
            with self.accelerator.no_sync(self.model) if alone else nullcontext():
                loss, weight = self.model(*batch)
                self.accelerator.backward(loss)
            sums += torch.stack([loss.detach().double(), weight.detach().double()])
            del loss  # and what it holds, before the next forward
        return sums

    def _totals(self, sums: Tensor) -> _Totals:
        """Sums over all processes, in one message. Norms are of the gradients as they stand, not yet divided."""
        held = [(name, local(p.grad)) for name, p in self.named if p.grad is not None]
        if not held:
            raise HalobenchError(f"{self.objective.name}: no tensor that trains has a gradient; see the stage's loss")
        norms = torch.stack(torch._foreach_norm([g for _, g in held])).double()
        due = self.team.leads and time.monotonic() - self._saved_at > self.config.save_every_seconds
        message = torch.tensor([due, self._interrupted()], dtype=torch.float64, device=self.device)
        message = torch.cat([sums, message, norms.square()] if self.team.sharded else [sums, message])
        if self.team.size > 1:
            message = self.accelerator.reduce(message, "sum")
        loss, weight, save, stop, *squares = message.tolist()
        found = [math.sqrt(x) for x in squares] if self.team.sharded else norms.tolist()
        return _Totals(loss, weight, dict(zip([n for n, _ in held], found, strict=True)), save > 0, stop > 0)

    def _explain(self, batches: list[Batch], loss: float, norm: float) -> None:
        """Runs the step again to see where numbers stop being finite, and raises HalobenchError."""

        def again() -> None:
            for _, parameter in self.named:
                parameter.grad = None
            for batch in batches:
                with nullcontext() if self.team.sharded else self.accelerator.no_sync(self.model):
                    self.accelerator.backward(self.model(*batch)[0])

        found = agree(self.team, gates.find_nonfinite(self.objective.module, self.objective.frozen, again))
        where = next((place for place in found if place), "the loss itself: every module's output is finite")
        last = self.checkpoints.last()
        good = f"the last good checkpoint is {last}" if last else "there is no checkpoint yet"
        raise DivergedError(
            f"{self.objective.name}: numbers stopped being finite at step {self.step} (loss {loss:g}, gradient norm "
            f"{norm:g}), first in {where}; {good}. Lower the rate and begin in a new folder"
        )

    # Before and after -------------------------------------------------------------------------------------------------

    @torch.no_grad()
    def _held_out(self) -> float | None:
        """The mean loss on sequences that training never sees."""
        count, length = self.config.held_out_sequences, max(self.config.lengths)
        if count == 0:
            return None
        sums = torch.zeros(2, device=self.device, dtype=torch.float64)
        with evaluating(self.objective.module):
            for batch in self._batches(count, length, lambda place: self.data.held_out(place, length + 1)):
                loss, weight = self.model(*batch)
                sums += torch.stack([loss.double(), weight.double()])
        loss, weight = (self.accelerator.reduce(sums, "sum") if self.team.size > 1 else sums).tolist()
        return loss / weight if weight else None

    def _summarise(self) -> None:
        losses = self.result.losses
        part = max(1, len(losses) // 5)  # single steps differ by what the mixture drew
        self.result.first_loss = float(np.mean(losses[:part]))
        self.result.last_loss = float(np.mean(losses[-part:]))
        self.result.fell = gates.loss_fell(losses)
        if self.result.held_out_after is None:
            self.result.held_out_after = self._held_out()
        if not self.result.fell and self.team.leads:
            say(
                f"{self.objective.name}: the loss did not fall: {self.result.first_loss:.4f} over the first fifth of "
                f"the steps, {self.result.last_loss:.4f} over the last"
            )

    # Checkpoints ------------------------------------------------------------------------------------------------------

    def _held(self) -> dict[str, Tensor]:
        """What a checkpoint holds by name: the tensors that train, and the module's persistent buffers."""
        module = self.objective.module
        buffers = dict(module.named_buffers())
        kept = module.state_dict(keep_vars=True) if buffers else {}
        return {**dict(self.named), **{name: b for name, b in buffers.items() if name in kept}}

    def save(self) -> None:
        """Writes the checkpoint of this step, all of it or nothing; every process must call."""
        if self._written == self.step:
            return
        weights: dict[str, Tensor] = {}
        for name, tensor in self._held().items():
            gathered = whole(tensor.detach())
            if self.team.leads:
                weights[name] = gathered.contiguous().cpu()
        moments = self.optimizer.state(keep=self.team.leads)
        if self.team.leads:
            result = {k: None if isinstance(v, float) and math.isnan(v) else v for k, v in vars(self.result).items()}
            state = {
                "processes": self.team.size,
                "config": to_dict(self.config),
                "result": result,
                "unreached": self.reach.waiting,
            }
            self.checkpoints.save(self.step, weights, moments, state)
        self._written, self._saved_at = self.step, time.monotonic()

    def _resume(self) -> None:
        """Takes up the newest checkpoint that is whole; the first process finds it for all."""
        found: Saved | None = None
        trouble: HalobenchError | None = None
        if self.team.leads:
            self.folder.mkdir(parents=True, exist_ok=True)
            try:
                found = self.checkpoints.newest()
            except HalobenchError as error:
                trouble = error
        place, trouble = agree(self.team, (found.folder if found else None, trouble))[0]
        if trouble is not None:
            raise trouble
        if place is not None:
            self._take(found or at(place))
        if self.team.leads:
            _truncate_log(self.folder / METRICS, self.step)

    def _take(self, saved: Saved) -> None:
        state = saved.state
        changed = differences(state["config"], to_dict(self.config))
        if changed:
            raise UserError(
                f"{self.folder} was begun with other settings: {'; '.join(changed)}; use the same, or a new folder"
            )
        if state["processes"] != self.team.size:
            raise UserError(
                f"{self.folder} was begun with {state['processes']} processes and there are {self.team.size} now; "
                f"start {state['processes']} to go on (its checkpoints are untouched), or use a new folder"
            )
        weights = saved.weights()
        with torch.no_grad():
            for name, tensor in self._held().items():
                fill(tensor, weights[name])
        self.optimizer.load_state(saved.moments())
        result: dict[str, Any] = dict(state["result"])
        for name in ("first_loss", "last_loss"):  # JSON has no number for what is not known yet
            result[name] = math.nan if result[name] is None else result[name]
        self.result, self.step = StageResult(**result), state["step"]
        self.result.resumed, self._written = True, self.step
        self.reach.waiting = state["unreached"]


def _recompute(objective: Objective, wanted: bool) -> None:
    """Turns gradient checkpointing of a Hugging Face model on or off."""
    act = "enable" if wanted else "disable"
    names = (f"activation_checkpointing_{act}", f"gradient_checkpointing_{act}")  # newer and older transformers
    turn = next((getattr(objective.module, name) for name in names if hasattr(objective.module, name)), None)
    if turn is None:
        raise UserError(
            f"{objective.name} has no gradient checkpointing, for it trains no whole model; "
            "set gradient_checkpointing to false for it, and a smaller micro_batch_tokens to save memory"
        )
    turn()


@contextmanager
def _interrupts() -> Iterator[Callable[[], bool]]:
    """Ctrl-C and SIGTERM wait for the end of a step, where the state is whole; the same one again acts at once."""
    seen: list[int] = []

    def note(number: int, frame: Any) -> None:
        if number in seen:
            raise KeyboardInterrupt
        seen.append(number)

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
