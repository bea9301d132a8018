"""Models that are profiled in turns in one process: what they measure, and the record of each."""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from transformers.utils import logging

from halobench.config import to_dict
from halobench.errors import UserError
from halobench.evaluation import slug
from halobench.floors import Sizes, sizes_of, theory_of, with_theory
from halobench.mixers.forms import ask_for
from halobench.models import card_of, resolve
from halobench.profile_rows import MeasuredRows
from halobench.progress import say
from halobench.provenance import hardware, versions
from halobench.records import ModelCard, RunRecord
from halobench.shapes import NOTE, SEED, check_room, empty_preset, fill, preset_card, preset_of
from halobench.surgery.checkpoint import load_model
from halobench.tasks.machine import Machine, available_bytes, measure_machine
from halobench.tasks.paired import Overtaking, cache_overtaking, overtaking
from halobench.tasks.profile import (
    PairRow,
    ProfileRow,
    Rounds,
    out_of_memory_row,
    pair_of,
    profile_at,
    profile_metrics,
)
from halobench.tasks.scoring import check_context
from halobench.units import format_bytes, format_flops

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from halobench.profiling import Job


class Team:
    """The models of a job, loaded, with the machine's rates and the rows there are."""

    def __init__(self, job: Job) -> None:
        self.job, self.request = job, job.request
        self.device = torch.device(job.request.device)
        self.models, self.cards = _opened(job, self.device)
        longest = max(job.request.contexts) + job.request.new_tokens
        for model in self.models:
            try:
                check_context(model, longest)
            except UserError as error:
                raise UserError(f"{error}, less the {job.request.new_tokens} that --new-tokens adds") from error
        self.sizes = [_sizes(card, model) for card, model in zip(self.cards, self.models, strict=True)]
        self.measured = MeasuredRows.of(job.out, self._identity())
        self.rows: list[list[ProfileRow]] = []  # of each cell that is done, a row a model

    def _identity(self) -> dict[str, Any]:
        commits = [getattr(model.config, "_commit_hash", None) for model in self.models]
        settings = {k: v for k, v in self.job.settings().items() if k not in ("contexts", "batches", "in_turns")}
        return {
            "models": [card.hash for card in self.cards],
            "commits": commits,
            "attention": [_attention(model) for model in self.models],
            **settings,
            "versions": versions(),
            "hardware": hardware(),
        }

    def run(self) -> list[Path]:
        """Measures what is missing, from small to large; the records are written anew after each context and batch."""
        self.machine = measure_machine(self.device, self.request.torch_dtype())
        say(f"machine: {describe(self.machine)}")
        paths: list[Path] = []
        for context, batch in self.request.cells():
            known = self.measured.read(context, batch)
            if known is None:
                self.measured.begin(context, batch)
                known = self._measure(context, batch)
                self.measured.write(context, batch, known)
            else:
                say(f"  {context} tokens, batch {batch}: measured before, taken as it is")
            self.rows.append(known)
            paths = [self._record(place).save(self._path(place)) for place in range(len(self.models))]
        return paths

    def _measure(self, context: int, batch: int) -> list[ProfileRow]:
        """A row a model. Where memory will not do, that is the row: a host kills what asks for too much."""
        named = [(card.name, model) for card, model in zip(self.cards, self.models, strict=True)]
        theories = [
            None if sizes is None else theory_of(sizes, self.machine, context, batch, self.request.chunk)
            for sizes in self.sizes
        ]
        refusals = [self._refusal(context, batch, theory) for theory in theories]
        able = [pair for pair, refusal in zip(named, refusals, strict=True) if refusal is None]
        rounds = Rounds(new_tokens=self.request.new_tokens, repeats=self.request.repeats, chunk=self.request.chunk)
        found = iter(profile_at(able, context, batch=batch, rounds=rounds))
        rows = [
            next(found) if refusal is None else out_of_memory_row(*pair, context, batch, self.request.chunk, refusal)
            for pair, refusal in zip(named, refusals, strict=True)
        ]
        return [row if theory is None else with_theory(row, theory) for row, theory in zip(rows, theories, strict=True)]

    def _refusal(self, context: int, batch: int, theory: Any) -> str | None:
        """Why a measurement is not to be tried, or None."""
        killed = self.measured.killed_by(context, batch)
        if killed is not None:
            return (
                f"the system ended the process at {killed[0]} tokens, batch {killed[1]}, most often for lack of memory"
            )
        if theory is None or self.device.type != "cpu":
            return None
        needed, there = theory.peak_bytes - theory.weight_bytes, available_bytes(self.device)
        if needed <= there:
            return None
        return f"not tried: cache and activations need {format_bytes(needed)}, and {format_bytes(there)} are free"

    def _path(self, place: int) -> Path:
        return self.job.out / f"{slug(self.cards[place])}.profile.record.json"

    def _record(self, place: int) -> RunRecord:
        """The record of one model with the rows there are so far."""
        card, model, rows = self.cards[place], self.models[place], [of_cell[place] for of_cell in self.rows]
        failed = [row for row in rows if row.status != "ok"]
        random = preset_of(self.job.names[place]) is not None
        return RunRecord(
            kind="profile",
            model=card,
            metrics=profile_metrics(rows),
            details={
                "rows": [row.to_dict() for row in rows],
                "missing": [list(cell) for cell in self.request.cells()[len(rows) :]],
                "machine": to_dict(self.machine) | {"bytes_per_s": self.machine.bytes_per_s},
                "process": os.getpid(),
                **({"random_weights": {"seed": SEED, "note": NOTE}} if random else {}),
                **(self._against_first(place) if self.job.paired and place else {}),
            },
            settings=self.job.settings(),
            backends={
                "device": str(self.machine.device),
                "dtype": self.machine.dtype,
                "attention": _attention(model),
                **{f"attention in {phase}": ", ".join(used) or "written out" for phase, used in _kernels(rows).items()},
                **{f"mixer {name}": form for row in rows for name, form in row.mixers.items()},
            },
            status="error" if len(failed) == len(rows) else "ok",
            error=failed[0].error if failed else None,
        )

    def _against_first(self, place: int) -> dict[str, Any]:
        """Ratios to the first model, and the contexts from which on this one is the better."""
        pairs = [pair_of(of_cell[0], of_cell[place]) for of_cell in self.rows]
        found = overtakings(pairs)
        first, own = self.sizes[0], self.sizes[place]
        if first is not None and own is not None:
            found.append(cache_overtaking(1, first.cache, own.cache))
        return {
            "against": self.cards[0].name,
            "ratios": [_ratios(pair) for pair in pairs],
            "overtakes": [to_dict(one) | {"line": one.line()} for one in found],
        }


def overtakings(pairs: list[PairRow]) -> list[Overtaking]:
    """By batch, where the hybrid overtakes in TPOT and in prefill, among the contexts where both were measured."""
    found = []
    for batch in sorted({pair.hybrid.batch for pair in pairs}):
        for what in ("tpot", "prefill"):
            measured = [
                (pair.hybrid.context, ratio)
                for pair in pairs
                if pair.hybrid.batch == batch and (ratio := getattr(pair, what)) is not None
            ]
            if measured:
                contexts, ratios = zip(*measured, strict=True)
                found.append(overtaking(what, batch, contexts, ratios))
    return found


def _ratios(pair: PairRow) -> dict[str, Any]:
    whole = to_dict(pair)
    ratios = {name: whole[name] for name in ("prefill", "tpot", "cache_ratio", "memory_ratio")}
    return {"context": pair.hybrid.context, "batch": pair.hybrid.batch, **ratios}


def _opened(job: Job, device: torch.device) -> tuple[list[PreTrainedModel], list[ModelCard]]:
    """The models on the device and their cards; presets that cannot fit are refused before any is filled."""
    dtype = job.request.torch_dtype()
    presets = {name: preset for name in job.names if (preset := preset_of(name)) is not None}
    empty = {name: empty_preset(preset, dtype) for name, preset in presets.items()}
    check_room(list(empty.values()), list(empty), device)
    logging.disable_progress_bar()
    models, cards = [], []
    for name in job.names:
        if name in presets:
            cards.append(preset_card(presets[name], empty[name]))
            models.append(fill(empty[name], device))
        else:
            models.append(load_model(resolve(name), dtype=dtype, device=device).eval())
            cards.append(card_of(name, models[-1]))
        ask_for(models[-1], job.request.kernels)
    return models, cards


def _sizes(card: ModelCard, model: PreTrainedModel) -> Sizes | None:
    try:
        return sizes_of(model)
    except UserError as error:
        say(f"{card.name}: no floors, for its shapes cannot be read: {error}")
        return None


def _attention(model: PreTrainedModel) -> str:
    return str(getattr(model.config, "_attn_implementation", None) or "default")


def _kernels(rows: list[ProfileRow]) -> dict[str, list[str]]:
    """The attention kernels of all rows, by phase."""
    found: dict[str, set[str]] = {}
    for row in rows:
        for phase, names in row.kernels.items():
            found.setdefault(phase, set()).update(names)
    return {phase: sorted(names) for phase, names in found.items()}


def describe(machine: Machine) -> str:
    """A machine's rates in words."""
    rates = f"copy {machine.copy_bytes_per_s / 1e9:.1f}, read {machine.read_bytes_per_s / 1e9:.1f} GB/s"
    products = f"{format_flops(machine.flops_per_s)}/s in {machine.dtype} products of {machine.matmul_size} rows"
    return f"{machine.device}: {rates}; {products}"
