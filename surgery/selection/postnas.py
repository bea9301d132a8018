"""PostNAS: one super-network trained with random branches, then a beam search over sets of kept layers by task score.

After the search of Jet-Nemotron (arXiv 2508.15884), whose code was never released; what we know of it is from secondary
reading. Ours are: the probability of a softmax branch (keep / layers), the feature that is distilled (hidden states
after the last norm, in units of their mean square), the optimiser, the task, and every budget. The paper spends 50B
tokens.
"""

from __future__ import annotations

import math
import shutil
from dataclasses import dataclass, replace
from typing import Any, ClassVar, Literal

import numpy as np
import torch
from torch import Tensor, nn

from halobench.config import to_dict
from halobench.errors import HalobenchError, UserError
from halobench.mixers.contract import Mixer
from halobench.progress import say
from halobench.surgery.checkpoint import load_mixers, save_mixers
from halobench.surgery.heads import final_hidden
from halobench.surgery.loop import Loop, LoopConfig, Precision
from halobench.surgery.objective import Objective
from halobench.surgery.optim import OptimConfig
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
from halobench.surgery.selection.uncertainty import RESAMPLES, SURE, ranked, with_layers
from halobench.surgery.training_state import FOLDER as CHECKPOINTS

METRIC = "answer_logprob"
ASKED = 85  # tokens, about, that a haystack's questions and answers add to it
Kept = tuple[int, ...]


class SuperNetwork(Objective):
    """Objective: squared distance of the final hidden states to the teacher's, in units of their mean square.

    In each pass every layer runs its attention with probability `share` and else its mixer; the mixers alone train.
    """

    idle = True

    def __init__(self, name: str, teacher: Any, mixers: dict[int, Mixer], share: float, seed: int) -> None:
        self.name, self.teacher, self.share, self.seed = name, teacher, share, seed
        self.branches = branches_of(teacher, mixers)
        self.frozen = (teacher,)
        self.module = nn.ModuleDict({str(layer): mixer for layer, mixer in mixers.items()})
        self.passes = torch.zeros((), device=next(teacher.parameters()).device)
        self.module.register_buffer("passes", self.passes)  # so that checkpoints hold it, and a resumed run draws on

    def _draw(self) -> None:
        """Sets the branch of every layer for the next pass; one mixer at least runs, or nothing would train."""
        rng = np.random.default_rng((self.seed, int(self.passes), 17))
        softmax = rng.random(len(self.branches)) < self.share
        softmax[rng.integers(len(softmax))] &= not softmax.all()
        for both, chosen in zip(self.branches.values(), softmax, strict=True):
            both.share = float(chosen)
        self.passes += 1

    def loss(self, tokens_BT: Tensor, weights_BT: Tensor) -> tuple[Tensor, Tensor]:
        """Sum over all tokens of the relative squared distance, and the number of tokens."""
        inputs = tokens_BT[:, :-1]
        with torch.no_grad():
            self._draw()
            wanted = final_hidden(self.teacher, inputs).flatten(0, 1)
        got = blended_hidden(self.teacher, self.branches, inputs).flatten(0, 1)
        distance = squared_distance(got, wanted, relative=True)
        check_finite(self.name, distance, self.teacher, self.branches, inputs)
        return distance, torch.tensor(float(len(got)), device=got.device)


@dataclass(frozen=True, kw_only=True)
class PostNas:
    """Keep the set of layers that answers best in the super-network, found by beam search from no softmax layer on.

    tokens, length, batch_tokens, rate, planted: of the super-network's training (AdamW, cosine; planted is the share of
    retrieval in the data). beam: sets that go on to the next size. task, task_length, samples: what a set is measured
    on. budget: tokens of measuring at most; a search that ends early keeps the best set so far and fills it up with the
    layers whose addition gained most, and its label says so.

    A layer's score is its mean gain: over all measured sets to which it was added, the answer's log-likelihood after
    less before. The kept layers are the best set found, which need not be the best scores.
    """

    name: ClassVar[str] = "postnas"
    label: ClassVar[str] = "PostNAS"
    paper: ClassVar[str] = "https://arxiv.org/abs/2508.15884"
    needs: ClassVar[frozenset[Need]] = frozenset({"workbench"})

    tokens: int = 200_000
    length: int = 512
    batch_tokens: int = 4096
    rate: float = 1e-3
    planted: float = 0.5
    beam: int = 4
    task: Literal["needles", "lists"] = "needles"
    task_length: int = 256
    samples: int = 16
    budget: int | None = None

    def __post_init__(self) -> None:
        if self.tokens < self.batch_tokens or self.batch_tokens < self.length:
            raise UserError(
                f"postnas: {self.tokens} tokens in steps of {self.batch_tokens} at length {self.length}; the training "
                "needs one step, and a step one sequence"
            )
        if self.beam < 1 or self.samples < 2:
            raise UserError(f"postnas: beam={self.beam}, samples={self.samples}; a beam of 1, and 2 samples, at least")

    def price(self, prices: Prices) -> int:
        """See Selector; an estimate, for sets of the beam may lead to the same larger set, and questions differ."""
        measured = measurements(prices.layers, prices.keep, self.beam) * self.measurement()
        return trained_tokens(self._config(0, "fp32")) + (
            measured if self.budget is None else min(measured, self.budget)
        )

    def measurement(self) -> int:
        """Tokens, about, of measuring one set."""
        return self.samples * (self.task_length + ASKED)

    def rank(self, question: Question) -> Ranking:
        """See Selector. The uncertainty is a bootstrap over the task's samples, the same for every set.

        Membership is the share of resamples in which a layer is in the best set; tied are the layers by which the best
        set differs from sets of its size that it does not beat in 95% of them.
        """
        workbench = question.require_workbench(self.name)
        mixers = self._super_network(workbench, question.keep)
        ledger = Ledger(self, workbench, mixers)
        size = beam_search(ledger, question.layers, question.keep, self.beam)
        config = self._config(workbench.seed, "fp32")
        answer = _conclude(self, question, ledger.measured, size, ledger.spent + trained_tokens(config))
        if size < question.keep:
            say(
                f"{self.name}: the search ended at sets of {size} of {question.keep} layers, for its budget of "
                f"{self.budget:,} tokens was spent; the others are those whose addition gained most"
            )
            answer = replace(answer, label=f"{self.label} (search ended at {size} of {question.keep} layers)")
        return answer

    def _config(self, seed: int, kind: Precision) -> LoopConfig:
        steps = self.tokens // self.batch_tokens
        return LoopConfig(
            tokens=self.tokens,
            batch_tokens=self.batch_tokens,
            lengths=[self.length],
            optim=OptimConfig(rate=self.rate, warmup_steps=steps // 20),
            precision=kind,
            planted=self.planted,
            held_out_sequences=0,
            trackers=[],
            seed=seed,
        )

    def _super_network(self, workbench: Workbench, keep: int) -> dict[int, Mixer]:
        """The mixers trained with random branches, frozen; training that was finished before is read, not repeated."""
        config = self._config(workbench.seed, precision(workbench))
        folder = own_folder(workbench, self.name, {**to_dict(config), "keep": keep})
        if not (folder / "mixers").exists():
            mixers = workbench.training_mixers()
            objective = SuperNetwork(self.name, workbench.teacher, mixers, keep / workbench.layers, workbench.seed)
            data = workbench.data(self.planted)
            Loop(folder / "training", objective, data, config, device=workbench.device).run()
            save_mixers(folder / "mixers", mixers)
            shutil.rmtree(folder / "training" / CHECKPOINTS, ignore_errors=True)
        trained = load_mixers(folder / "mixers", workbench.teacher)
        return {layer: mixer.eval().requires_grad_(False) for layer, mixer in trained.items()}


class BudgetSpentError(Exception):
    """The next measurement would go beyond the budget."""


class Ledger:
    """Measures sets of kept layers, each once, within the budget.

    Attributes:
        measured: the samples of METRIC by set, in the order of the search.
        spent: tokens they took.
        price: tokens of one measurement.
    """

    def __init__(self, selector: PostNas, workbench: Workbench, mixers: dict[int, Mixer]) -> None:
        self.selector, self.workbench, self.mixers = selector, workbench, mixers
        self.measured: dict[Kept, np.ndarray] = {}
        self.spent = 0
        self.price = selector.measurement()  # corrected by the first

    def score(self, kept: Kept) -> float:
        """Mean of METRIC of the student that keeps `kept`."""
        if kept not in self.measured:
            chosen = self.selector
            if chosen.budget is not None and self.spent + self.price > chosen.budget:
                raise BudgetSpentError
            found = self.workbench.measure(
                kept, chosen.task, length=chosen.task_length, samples=chosen.samples, mixers=self.mixers
            )
            samples = np.array(found.samples[METRIC])
            if not np.isfinite(samples).all():
                raise HalobenchError(
                    f"{chosen.name}: {METRIC} on {chosen.task} is not finite for the student that keeps layers "
                    f"{list(kept)}; align anew at a lower rate, or lower the selector's rate"
                )
            self.measured[kept], self.price = samples, found.tokens
            self.spent += found.tokens
        return float(self.measured[kept].mean())


def beam_search(ledger: Ledger, layers: int, keep: int, beam: int) -> int:
    """Measures sets of growing size: each of the `beam` best of one size with one more layer. Returns the size reached.

    Raises:
        UserError: the budget does not even measure each layer alone.
    """
    members: list[Kept] = [()]
    try:
        ledger.score(())
        for _ in range(keep):
            larger = sorted({tuple(sorted((*kept, i))) for kept in members for i in range(layers) if i not in kept})
            larger.sort(key=lambda kept: -ledger.score(kept))
            members = larger[:beam]
    except BudgetSpentError:
        reached = max(map(len, ledger.measured), default=0)
        if sum(len(kept) == 1 for kept in ledger.measured) < layers:
            raise UserError(
                f"postnas: a budget of {ledger.selector.budget} tokens does not measure each layer once, which takes "
                f"{(layers + 1) * ledger.price}; raise it, or lower samples or task_length"
            ) from None
        return reached
    return keep


def measurements(layers: int, keep: int, beam: int) -> int:
    """Sets that the search measures, the empty one included, if those of the beam differ in one layer each."""
    total = 1
    for size in range(keep):
        parents = min(beam, math.comb(layers, size))
        larger = parents * (layers - size) - math.comb(parents, 2)
        total += max(min(larger, math.comb(layers, size + 1)), 1)
    return total


def gains(sets: list[Kept], scores: np.ndarray, layers: int) -> np.ndarray:
    """Mean over the measured sets to which a layer was added of the score after less before.

    Args:
        scores: of each set, (..., sets).

    Returns:
        (..., layers)
    """
    place = {kept: index for index, kept in enumerate(sets)}
    edges: list[list[tuple[int, int]]] = [[] for _ in range(layers)]
    for kept in sets:
        for layer in kept:
            before = tuple(i for i in kept if i != layer)
            if before in place:
                edges[layer].append((place[kept], place[before]))
    mean = [np.mean([scores[..., a] - scores[..., b] for a, b in pairs], axis=0) for pairs in edges]
    return np.stack(mean, axis=-1)


def _best(sets: list[Kept], scores: np.ndarray, gained: np.ndarray, size: int, keep: int) -> tuple[int, list[int]]:
    """The place of the best set of `size`, and its layers, filled up to `keep` with those that gained most."""
    first = max((i for i, kept in enumerate(sets) if len(kept) == size), key=lambda i: scores[i])
    others = [int(i) for i in np.argsort(-gained, kind="stable") if i not in sets[first]]
    return first, sorted([*sets[first], *others[: keep - size]])


def _conclude(selector: PostNas, question: Question, measured: dict[Kept, np.ndarray], size: int, cost: int) -> Ranking:
    """From the samples of every measured set to the ranking."""
    sets = list(measured)
    table = np.stack(list(measured.values()), axis=-1)  # (samples, sets)
    picks = np.random.default_rng(question.seed).integers(len(table), size=(RESAMPLES, len(table)))
    scores, drawn = table.mean(0), table[picks].mean(1)
    if question.keep == 0:
        gained, resampled = np.zeros(question.layers), np.zeros((RESAMPLES, question.layers))
    else:
        gained, resampled = gains(sets, scores, question.layers), gains(sets, drawn, question.layers)
    first, layers = _best(sets, scores, gained, size, question.keep)
    share = np.zeros(question.layers)
    for row, by_layer in zip(drawn, resampled, strict=True):
        share[_best(sets, row, by_layer, size, question.keep)[1]] += 1
    unbeaten = [
        kept
        for index, kept in enumerate(sets)
        if len(kept) == size and index != first and (drawn[:, first] > drawn[:, index]).mean() < SURE
    ]
    tied = sorted(set().union(*(set(kept) ^ set(sets[first]) for kept in unbeaten)))
    whole = ranked(selector, question, gained, resampled, cost)
    membership = [float(x) for x in share / RESAMPLES]
    return replace(with_layers(whole, layers), membership=membership, tied=tied)
