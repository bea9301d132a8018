"""FlashMorph: gates of layers that nothing is lost by close, the others stay open; exact costs and resumption."""

from __future__ import annotations

import os
import signal
from pathlib import Path
from typing import Any

import pytest
import torch

from halobench.errors import HalobenchError, UserError
from halobench.surgery.anatomy import attention_modules
from halobench.surgery.heads import final_hidden
from halobench.surgery.planted import ANSWER_WEIGHT
from halobench.surgery.selection.blend import blended_hidden, branches_of
from halobench.surgery.selection.contract import Prices, Question, Ranking
from halobench.surgery.selection.flashmorph import FlashMorph, Gates
from tests.pico_workbench import PicoWorkbench, Quiz

SMALL: dict[str, Any] = {"tokens": 2 * 24 * 64, "runs": 2, "length": 32, "batch_tokens": 64, "rate": 0.1}
SHORT = 2 * 6 * 64


def rank(bench: PicoWorkbench, keep: int = 1, **changes: Any) -> Ranking:
    return FlashMorph(**{**SMALL, **changes}).rank(Question(layers=bench.layers, keep=keep, workbench=bench))


def random_tokens() -> torch.Tensor:
    return torch.randint(3, 101, (2, 17), generator=torch.Generator().manual_seed(4))


@pytest.mark.parametrize("broken", [0, 2, 3])
def test_the_layer_whose_mixer_is_broken_stays(tmp_path: Path, broken: int) -> None:
    answer = rank(PicoWorkbench(tmp_path, broken=(broken,)))
    assert answer.layers == [broken]
    assert answer.membership is not None and answer.membership[broken] == 1.0
    assert answer.tied == []


def test_gates_close_where_the_mixer_equals_the_attention_and_stay_open_where_it_is_broken(tmp_path: Path) -> None:
    last = rank(PicoWorkbench(tmp_path), score="last").scores
    assert last[2] > 0.8
    assert [last[i] for i in (0, 1, 3)] == [0.0, 0.0, 0.0]


def test_gates_that_end_at_the_same_bound_are_told_apart_by_their_path(tmp_path: Path) -> None:
    bench = PicoWorkbench(tmp_path, broken=(1,))
    for mixer in (bench.mixers[0], bench.mixers[3]):
        mixer.o_proj.weight.mul_(0.9 if mixer.layer_index == 3 else 1.0)  # type: ignore[operator, union-attr]
    by_path = rank(bench)
    assert max(by_path.scores) < 1.0
    assert min(by_path.scores) > 0.0
    assert by_path.layers == [1]


def test_the_price_is_what_is_spent_and_no_run_sees_the_data_of_another(tmp_path: Path) -> None:
    bench = PicoWorkbench(tmp_path)
    answer = rank(bench, tokens=3 * 200 + 50, runs=3)  # does not divide evenly
    prices = Prices(layers=4, keep=1, recall=0, csr=0, text=0, restore=0, prompt=0)
    assert FlashMorph(**{**SMALL, "tokens": 650, "runs": 3}).price(prices) == answer.cost_tokens == bench.quiz.tokens
    assert len(bench.quiz.drawn) == len(set(bench.quiz.drawn)) == answer.cost_tokens // 32


def test_the_same_seed_gives_the_same_bits_and_another_seed_others(tmp_path: Path) -> None:
    benches = [PicoWorkbench(tmp_path / name, seed=seed) for name, seed in (("a", 0), ("b", 0), ("c", 1))]
    first, again, other = (rank(bench, tokens=SHORT) for bench in benches)
    assert first == again
    assert first.scores != other.scores


def test_a_finished_search_is_read_for_any_number_of_kept_layers(tmp_path: Path) -> None:
    bench = PicoWorkbench(tmp_path)
    first = rank(bench, keep=1, tokens=SHORT)
    drawn = len(bench.quiz.drawn)
    second = rank(bench, keep=2, tokens=SHORT)
    rank(bench, tokens=SHORT, score="last")
    assert len(bench.quiz.drawn) == drawn
    assert second.scores == first.scores
    assert second.cost_tokens == first.cost_tokens
    rank(bench, tokens=SHORT, penalty=0.2)  # other options are another search
    assert len(bench.quiz.drawn) == 2 * drawn
    bench.mixers[0].o_proj.weight.neg_()  # type: ignore[operator, union-attr]
    assert rank(bench, tokens=SHORT).scores != first.scores  # and so is another alignment
    assert len(bench.quiz.drawn) == 3 * drawn


def test_an_interrupted_search_goes_on_to_the_same_bits(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = rank(PicoWorkbench(tmp_path / "whole"), tokens=SHORT)
    cut = PicoWorkbench(tmp_path / "cut")
    original = Gates.loss
    steps = iter(range(9))  # to the second run's fourth step

    def until_stopped(self: Gates, tokens: torch.Tensor, weights: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        if next(steps, None) is None:
            os.kill(os.getpid(), signal.SIGINT)
        return original(self, tokens, weights)

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(Gates, "loss", until_stopped)
        rank(cut, tokens=SHORT)
    before = cut.quiz.tokens
    assert rank(cut, tokens=SHORT) == whole
    assert 0 < cut.quiz.tokens - before < whole.cost_tokens // 2


def test_one_run_alone_claims_no_uncertainty(tmp_path: Path) -> None:
    answer = rank(PicoWorkbench(tmp_path), runs=1)
    assert answer.layers == [2]
    assert answer.stderr is None


def test_open_gates_are_the_teacher_and_closed_gates_its_mixers(tmp_path: Path) -> None:
    bench = PicoWorkbench(tmp_path)
    tokens, branches = random_tokens(), branches_of(bench.teacher, bench.mixers)
    modules = attention_modules(bench.teacher)
    wanted = final_hidden(bench.teacher, tokens)
    for share in (torch.tensor(1.0), 1.0):
        for both in branches.values():
            both.share = share
        assert torch.allclose(blended_hidden(bench.teacher, branches, tokens), wanted, atol=1e-5)
    for layer, both in branches.items():
        both.share = torch.tensor(1.0 if layer == 2 else 0.3)  # the others equal their attention
    assert torch.allclose(blended_hidden(bench.teacher, branches, tokens), wanted, atol=1e-4)
    branches[2].share = 0.0
    assert not torch.allclose(blended_hidden(bench.teacher, branches, tokens), wanted, atol=1e-2)
    assert attention_modules(bench.teacher) == modules
    assert torch.equal(final_hidden(bench.teacher, tokens), wanted)


def test_only_positions_that_predict_an_answer_count(tmp_path: Path) -> None:
    bench = PicoWorkbench(tmp_path)
    gates = Gates("test", bench.teacher, bench.mixers, 0.5, False)
    with torch.no_grad():
        gates.gates[2].fill_(0.25)
    weights = torch.ones(2, 17)
    weights[0, 6] = weights[1, 16] = ANSWER_WEIGHT
    loss, count = gates.loss(random_tokens(), weights)
    got = blended_hidden(bench.teacher, gates.branches, random_tokens()[:, :-1])
    distance = (got - final_hidden(bench.teacher, random_tokens()[:, :-1])).square().sum(-1)
    assert float(count) == 2
    assert float(loss.detach()) == pytest.approx(
        float((distance[0, 5] + distance[1, 15]).detach()) + 2 * 0.5 * 3.25, rel=1e-4
    )
    assert float(gates.path[2]) == 0.25


def test_the_relative_distance_does_not_depend_on_the_scale_of_the_hidden_states(tmp_path: Path) -> None:
    losses = []
    for scale in (1.0, 10.0):
        bench = PicoWorkbench(tmp_path)
        bench.teacher.model.norm.weight.mul_(scale)
        gates = Gates("test", bench.teacher, bench.mixers, 0.0, True)
        gates.gates[2].data.fill_(0.5)
        losses.append(gates.loss(random_tokens(), torch.full((2, 17), ANSWER_WEIGHT))[0].item())
    assert losses[0] == pytest.approx(losses[1], rel=1e-4)
    assert losses[0] > 0.1


def test_numbers_that_stop_being_finite_name_the_layer(tmp_path: Path) -> None:
    bench = PicoWorkbench(tmp_path)
    bench.mixers[1].v_proj.weight[0, 0] = float("nan")  # type: ignore[operator, union-attr]
    with pytest.raises(HalobenchError, match="flashmorph: numbers stopped being finite .* in the output of layer 1"):
        rank(bench)


def test_data_without_answers_is_refused(tmp_path: Path) -> None:
    bench = PicoWorkbench(tmp_path)
    bench.quiz = Quiz(answers=False)
    with pytest.raises(HalobenchError, match="run 0 met no answers"):
        rank(bench)


def test_wrong_options_and_a_missing_workbench_say_what_to_do() -> None:
    with pytest.raises(UserError, match="planted=0"):
        FlashMorph(planted=0)
    with pytest.raises(UserError, match="penalty=0"):
        FlashMorph(penalty=0)
    with pytest.raises(UserError, match="in each run a step"):
        FlashMorph(tokens=1000, runs=4, batch_tokens=512)
    with pytest.raises(UserError, match="flashmorph measures models itself"):
        FlashMorph().rank(Question(layers=4, keep=1))
