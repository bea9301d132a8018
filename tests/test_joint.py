"""The joint selector: whole sets are searched, text is guarded, and the answer says how sure it is."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import combinations
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from halobench.errors import UserError
from halobench.surgery.selection import Prices, Question, make_selector
from halobench.surgery.selection.contract import Measured

LAYERS = 8


class Table:
    """A workbench whose students are numbers: what a set recalls and what it costs in text."""

    layers, prompt, seed, device, hype = LAYERS, 100, 0, "cpu", True
    teacher: Any = None
    mixers: dict = {}
    folder = Path()

    def __init__(
        self, recall: Callable[[frozenset[int]], float], kl: Callable[[frozenset[int]], float] = lambda kept: 1.0
    ) -> None:
        self.recall, self.kl = recall, kl
        self.asked: list[tuple[str, frozenset[int], int | None, bool]] = []

    def measure(
        self, kept: Sequence[int], task: str, *, length: int | None = None, samples: int | None = None,
        hype: bool = False, mixers: dict | None = None,
    ) -> Measured:  # fmt: skip
        chosen = frozenset(kept)
        self.asked.append((task, chosen, length, hype))
        assert samples is not None and length is not None
        if task == "text":
            return Measured({"kl": [self.kl(chosen)] * samples}, samples * length)
        noise = np.random.default_rng(len(chosen)).normal(scale=0.01, size=samples)  # the same prompts for every set
        return Measured({"answer_logprob": list(self.recall(chosen) + noise)}, samples * length)


def rank(bench: Any, keep: int = 2, **options: object) -> Any:
    question = Question(layers=bench.layers, keep=keep, workbench=bench)
    return make_selector("joint", options).rank(question)


def together(kept: frozenset[int]) -> float:
    """5 is the best single layer, but 2 and 6 carry recall together."""
    return -10.0 + 3.0 * (5 in kept) + 2.0 * (2 in kept) + 6.0 * ({2, 6} <= kept)


def test_layers_that_only_work_together_are_found() -> None:
    singles = np.array([together(frozenset({i})) for i in range(LAYERS)])
    assert set(np.argsort(-singles)[:2]) == {5, 2}  # what scores of single layers would keep
    answer = rank(Table(together))
    assert answer.layers == [2, 6]
    assert sorted(answer.ranking[:2]) == [2, 6]
    assert sorted(answer.ranking) == list(range(LAYERS))


def test_an_exchange_escapes_what_greed_chose_first() -> None:
    assert rank(Table(together), exchanges=0).layers == [2, 5]
    assert rank(Table(together), exchanges=1).layers == [2, 6]


def test_the_search_finds_the_best_of_all_sets_when_layers_add_up() -> None:
    worth = np.random.default_rng(3).normal(size=LAYERS)
    bench = Table(lambda kept: float(sum(worth[i] for i in kept)))
    best = max(combinations(range(LAYERS), 3), key=lambda kept: sum(worth[i] for i in kept))
    assert rank(bench, keep=3).layers == list(best)


def test_a_set_that_hurts_text_is_passed_over() -> None:
    bench = Table(together, kl=lambda kept: 2.0 if 6 in kept else 1.0)
    answer = rank(bench)
    assert answer.layers == [2, 5]
    assert answer.membership is not None and answer.membership[6] == 0 < answer.membership[5]
    assert rank(bench, bound=1.5).layers == [2, 6]


def test_when_no_set_spares_the_text_the_mildest_is_taken() -> None:
    answer = rank(Table(together, kl=lambda kept: float(sum(kept)) + 1.0), keep=1, bound=0.0)
    assert answer.layers == [0]


def test_prompts_are_longer_than_the_recipes_and_positions_are_out() -> None:
    bench = Table(together)
    rank(bench, beyond=4)
    assert {length for task, _, length, _ in bench.asked if task == "needles"} == {400}
    assert {length for task, _, length, _ in bench.asked if task == "text"} == {100}
    assert all(hype is (task == "needles") for task, *_, hype in bench.asked)  # what removal costs text, training mends
    bench.hype = False  # a conversion that keeps its positions is searched with them
    bench.asked.clear()
    rank(bench)
    assert not any(hype for *_, hype in bench.asked)


def test_no_set_is_measured_twice_and_every_token_is_counted() -> None:
    bench = Table(together)
    answer = rank(bench)
    assert len(bench.asked) == len(set(bench.asked))
    spent = sum(3 * 200 if task == "needles" else 2 * 100 for task, *_ in bench.asked)
    assert answer.cost_tokens == spent
    prices = Prices(layers=LAYERS, keep=2, recall=0, csr=0, text=0, restore=0, prompt=100)
    assert make_selector("joint").price(prices) == pytest.approx(spent, rel=0.2)


def test_sure_layers_are_sure_and_equal_ones_are_tied() -> None:
    clear = rank(Table(together))
    assert clear.membership is not None and clear.membership[2] == clear.membership[6] == 1.0
    assert clear.tied == []
    worth = {0: 5.0, 3: 1.0, 4: 1.0}
    even = rank(Table(lambda kept: sum(worth.get(i, 0.0) for i in kept)))
    assert 0 in even.layers
    assert set(even.tied or ()) == {3, 4}


@pytest.mark.parametrize("options", [{"samples": 0}, {"beyond": 0}, {"exchanges": -1}, {"bound": -0.1}])
def test_options_out_of_range_are_refused(options: dict) -> None:
    with pytest.raises(UserError, match="must be 1 or more"):
        make_selector("joint", options)


def test_keeping_nothing_or_nearly_all_works() -> None:
    assert rank(Table(together), keep=0).layers == rank(Table(together), keep=0, exchanges=0).layers == []
    assert len(rank(Table(together), keep=LAYERS - 1).layers) == LAYERS - 1
