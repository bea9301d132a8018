"""PostNAS: the super-network learns, the beam finds sets that single layers do not show, the budget is kept."""

from __future__ import annotations

import itertools
import os
import signal
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from halobench.errors import HalobenchError, UserError
from halobench.surgery.heads import final_hidden
from halobench.surgery.selection.blend import blended_hidden, branches_of
from halobench.surgery.selection.contract import Measured, Prices, Question, Ranking
from halobench.surgery.selection.postnas import Kept, PostNas, SuperNetwork, measurements
from halobench.tasks.needle import build_haystacks, build_lists
from halobench.tasks.suites import held_out_filler
from tests.pico_workbench import PicoWorkbench

SMALL: dict[str, Any] = {
    "tokens": 8 * 64, "length": 32, "batch_tokens": 64, "rate": 1e-3, "samples": 6, "task_length": 32, "beam": 2,
}  # fmt: skip


def rank(bench: PicoWorkbench, keep: int = 1, **changes: Any) -> Ranking:
    return PostNas(**{**SMALL, **changes}).rank(Question(layers=bench.layers, keep=keep, workbench=bench))


class Scored(PicoWorkbench):
    """A workbench on which a set's score is a given function of it; nothing is trained to speak of."""

    def __init__(self, folder: Path, layers: int, value: Any, noise: float = 0.0) -> None:
        super().__init__(folder)
        self.layers, self.value, self.noise = layers, value, noise

    def measure(self, kept: Any, task: str, **settings: Any) -> Measured:  # type: ignore[override]
        self.asked.append(tuple(kept))
        rng = np.random.default_rng((5, *kept))
        size = settings["samples"]
        samples = self.value(tuple(kept)) + self.noise * rng.normal(size=size)
        return Measured({"answer_logprob": samples.tolist()}, size * (settings["length"] + 90))


def search(
    folder: Path, layers: int, keep: int, value: Any, noise: float = 0.0, **changes: Any
) -> tuple[Ranking, Scored]:
    bench = Scored(folder, layers, value, noise)
    return rank(bench, keep, **changes), bench


def pairwise(kept: Kept) -> float:
    """Layer 0 is the best alone; 3 and 4 are worth little alone and most together."""
    alone = {0: 1.0, 1: 0.5, 2: 0.4, 3: 0.3, 4: 0.2, 5: 0.1}
    return sum(alone[i] for i in kept) + (5.0 if {3, 4} <= set(kept) else 0.0)


@pytest.mark.parametrize("broken", [0, 3])
def test_the_layer_whose_mixer_is_broken_stays(tmp_path: Path, broken: int) -> None:
    answer = rank(PicoWorkbench(tmp_path, broken=(broken,)))
    assert answer.layers == [broken]
    assert answer.ranking[0] == broken
    assert answer.membership is not None and answer.membership[broken] == 1.0
    assert answer.tied == []


def test_two_broken_layers_are_found_together(tmp_path: Path) -> None:
    answer = rank(PicoWorkbench(tmp_path, broken=(1, 2)), keep=2)
    assert answer.layers == [1, 2]
    assert set(answer.ranking[:2]) == {1, 2}


def test_a_beam_finds_the_pair_that_a_greedy_search_misses(tmp_path: Path) -> None:
    assert search(tmp_path / "greedy", 6, 2, pairwise, beam=1)[0].layers == [0, 1]
    found, bench = search(tmp_path / "wide", 6, 2, pairwise, beam=6)
    assert found.layers == [3, 4]
    assert set(bench.asked) == {(), *itertools.combinations(range(6), 1), *itertools.combinations(range(6), 2)}
    assert len(bench.asked) == len(set(bench.asked))


def test_the_kept_layers_are_the_best_set_and_not_the_best_scores(tmp_path: Path) -> None:
    found, _ = search(tmp_path, 6, 2, lambda kept: 2.0 * (0 in kept) + 3.0 * (set(kept) == {3, 4}), beam=6)
    assert int(np.argmax(found.scores)) == 0
    assert found.layers == [3, 4]
    assert set(found.ranking[:2]) == {3, 4}
    assert sorted(found.ranking) == list(range(6))


def test_scores_are_mean_gains_over_the_sets_a_layer_was_added_to(tmp_path: Path) -> None:
    found, _ = search(tmp_path, 3, 2, lambda kept: float(sum(kept)) + (1.0 if kept == (0, 1) else 0.0), beam=3)
    assert found.scores == pytest.approx([(0 + 1 + 0) / 3, (1 + 2 + 1) / 3, 2.0])


def test_layers_that_noise_cannot_tell_apart_are_tied(tmp_path: Path) -> None:
    def value(kept: Kept) -> float:
        return float(2 in kept)

    clear, _ = search(tmp_path / "clear", 6, 2, lambda kept: value(kept) + (4 in kept), noise=0.01, beam=3, samples=8)
    assert clear.layers == [2, 4]
    assert clear.tied == []
    assert clear.membership == pytest.approx([0, 0, 1, 0, 1, 0])
    noisy, _ = search(tmp_path / "noisy", 6, 2, value, noise=0.5, beam=6, samples=8)
    assert noisy.tied and len(noisy.tied) > 2
    assert noisy.membership is not None and sum(noisy.membership) == pytest.approx(2)
    assert 0 < sorted(noisy.membership)[-2] < 1


@pytest.mark.parametrize(
    ("layers", "keep", "beam"), [(4, 1, 4), (4, 3, 2), (6, 6, 3), (8, 2, 4), (12, 3, 4), (12, 5, 6), (28, 7, 4)]
)
def test_the_price_is_within_a_fifth_of_the_cost(tmp_path: Path, layers: int, keep: int, beam: int) -> None:
    worth = np.random.default_rng(1).normal(size=layers)
    options = {"samples": 2, "beam": beam}
    answer, bench = search(tmp_path, layers, keep, lambda kept: float(worth[[*kept]].sum()), noise=0.5, **options)
    prices = Prices(layers=layers, keep=keep, recall=0, csr=0, text=0, restore=0, prompt=0)
    assert answer.cost_tokens == bench.quiz.tokens + len(bench.asked) * 2 * 122
    assert PostNas(**{**SMALL, **options}).price(prices) == pytest.approx(answer.cost_tokens, rel=0.2)


@pytest.mark.parametrize("build", [build_haystacks, build_lists])
def test_a_measurement_is_priced_by_the_tokens_of_real_haystacks(build: Any, bpe: Any) -> None:
    stacks = build(bpe, held_out_filler(bpe)[:20_000], 256, 6, 0)
    tokens = sum(len(ids) for h in stacks for ids in (h.context, *h.questions, *h.answers))
    assert PostNas(samples=6, task_length=256).measurement() == pytest.approx(tokens, rel=0.15)


def test_a_search_without_choices_is_priced_exactly() -> None:
    assert measurements(5, 0, 4) == 1
    assert measurements(5, 1, 4) == 6
    assert measurements(3, 3, 8) == 8  # a beam that holds every set


def test_a_budget_ends_the_search_and_the_answer_says_so(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    worth = [0.1, 0.5, 0.2, 0.9, 0.3, 0.4]

    def value(kept: Kept) -> float:
        return sum(worth[i] for i in kept)

    budget = (1 + 6 + 5) * 6 * 122  # the singles, and half of what two beam members lead to
    found, bench = search(tmp_path, 6, 4, value, budget=budget)
    assert found.cost_tokens - bench.quiz.tokens == budget
    assert found.label == "PostNAS (search ended at 2 of 4 layers)"
    assert "ended at sets of 2 of 4 layers" in capsys.readouterr().err
    assert found.layers == [1, 3, 4, 5]
    with pytest.raises(UserError, match="does not measure each layer once, which takes 5124"):
        search(tmp_path, 6, 4, value, budget=4000)


def test_training_brings_the_mixers_nearer_and_leaves_teacher_and_aligned_mixers_alone(tmp_path: Path) -> None:
    bench = PicoWorkbench(tmp_path, broken=())
    for mixer in bench.mixers.values():
        mixer.o_proj.weight.mul_(0.5)  # type: ignore[operator, union-attr]
    before = {n: p.clone() for n, p in [*bench.teacher.named_parameters(), *bench.mixers[1].named_parameters()]}
    selector = PostNas(**{**SMALL, "tokens": 256 * 40, "batch_tokens": 256, "rate": 3e-3})
    trained = selector._super_network(bench, 1)
    tokens = torch.from_numpy(bench.quiz.sequence(10**6, 40).tokens)[None]

    def distance(mixers: Any) -> float:
        branches = branches_of(bench.teacher, mixers)
        for both in branches.values():
            both.share = 0.0
        got = blended_hidden(bench.teacher, branches, tokens)
        return float((got - final_hidden(bench.teacher, tokens)).square().mean())

    with torch.no_grad():
        assert distance(trained) < 0.75 * distance(bench.mixers)
    after = dict([*bench.teacher.named_parameters(), *bench.mixers[1].named_parameters()])
    assert all(torch.equal(before[n], after[n]) for n in before)


def test_a_layer_runs_its_attention_in_its_share_of_the_passes(tmp_path: Path) -> None:
    bench = PicoWorkbench(tmp_path)
    network = SuperNetwork("test", bench.teacher, bench.training_mixers(), 0.25, 0)
    drawn = np.zeros(4)
    for _ in range(400):
        network._draw()
        drawn += [both.share for both in network.branches.values()]
    assert drawn / 400 == pytest.approx([0.25] * 4, abs=0.07)
    network.share = 1.0
    network._draw()
    assert sum(both.share for both in network.branches.values()) == 3  # one mixer is left to train


def test_the_same_seed_gives_the_same_answer_and_nothing_is_trained_twice(tmp_path: Path) -> None:
    first = PicoWorkbench(tmp_path / "a")
    answer = rank(first, keep=2)
    assert answer == rank(PicoWorkbench(tmp_path / "b"), keep=2)
    drawn = first.quiz.tokens
    assert rank(first, keep=2) == answer
    rank(first, keep=2, beam=3, samples=4)  # another search of the same super-network
    assert first.quiz.tokens == drawn == SMALL["tokens"]
    assert rank(PicoWorkbench(tmp_path / "c", seed=1), keep=2).scores != answer.scores


def test_interrupted_training_goes_on_to_the_same_answer(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = rank(PicoWorkbench(tmp_path / "whole"), keep=2)
    bench = PicoWorkbench(tmp_path / "cut")
    original, steps = SuperNetwork.loss, iter(range(3))

    def until_stopped(self: Any, tokens: torch.Tensor, weights: torch.Tensor) -> Any:
        if next(steps, None) is None:
            os.kill(os.getpid(), signal.SIGINT)
        return original(self, tokens, weights)

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(SuperNetwork, "loss", until_stopped)
        rank(bench, keep=2)
    assert rank(bench, keep=2) == whole
    assert bench.quiz.tokens == SMALL["tokens"]


def test_numbers_that_stop_being_finite_name_the_layer(tmp_path: Path) -> None:
    bench = PicoWorkbench(tmp_path / "training")
    bench.mixers[1].v_proj.weight[0, 0] = float("nan")  # type: ignore[operator, union-attr]
    with pytest.raises(HalobenchError, match=r"postnas: numbers stopped being finite .* in the output of layer 1"):
        rank(bench)
    with pytest.raises(HalobenchError, match=r"student that keeps layers \[2\]"):
        search(tmp_path / "search", 4, 2, lambda kept: float("nan") if kept == (2,) else 0.0)


def test_no_layer_and_every_layer_can_be_kept(tmp_path: Path) -> None:
    assert rank(PicoWorkbench(tmp_path), keep=0).layers == []
    assert rank(PicoWorkbench(tmp_path), keep=4).layers == [0, 1, 2, 3]


def test_wrong_options_and_a_missing_workbench_say_what_to_do() -> None:
    with pytest.raises(UserError, match="needs one step"):
        PostNas(tokens=100)
    with pytest.raises(UserError, match="a beam of 1"):
        PostNas(beam=0)
    with pytest.raises(UserError, match="postnas measures models itself"):
        PostNas().rank(Question(layers=4, keep=1))
