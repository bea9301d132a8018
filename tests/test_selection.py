"""Selectors: the formulas, what they read and cost, their uncertainty, and clear words for what cannot be ranked."""

from __future__ import annotations

import copy
import json
from dataclasses import asdict
from itertools import combinations
from pathlib import Path
from typing import Any, get_args

import numpy as np
import pytest

from halobench.errors import UserError
from halobench.surgery.selection import SELECTORS, Prices, Question, Ranking, make_selector
from halobench.surgery.selection.contract import Need
from halobench.surgery.selection.halo import halo_scores, noise_floor
from halobench.surgery.selection.scores_file import read_scores
from halobench.surgery.selection.smart import spread_sets

LAYERS = 6
FROM_SCORES = ["halo", "jet-nemotron", "nll", "kl-drop", "kl-ls", "smart", "lighttransfer"]
FIXED = ["even", "latter-half", "first-last", "random"]
COSTS = {
    "replaced": {"needles": 700, "items": 210, "text": 70},
    "restored": {"text": 77},
    "redistilled": {"text": 60, "training": 6000},
}


def scores_file(**changes: object) -> dict[str, Any]:
    """A sweep of six layers with 40 samples a task, in which layers 2 and 4 matter, by every metric there is."""
    rng = np.random.default_rng(0)
    needles, items, text = rng.random(40), rng.normal(size=40), rng.random(40)
    lost = [0.0, 0.0, 0.6, 0.0, 0.3, 0.0]

    def entry(**tasks: dict[str, np.ndarray]) -> dict[str, Any]:
        return {
            "scores": {t: {m: float(np.mean(v)) for m, v in by.items()} for t, by in tasks.items()},
            "samples": {t: {m: v.tolist() for m, v in by.items()} for t, by in tasks.items()},
        }

    def noise() -> np.ndarray:
        return 0.02 * rng.normal(size=40)

    teacher = entry(needles={"accuracy": needles, "answer_logprob": -needles}, items={"margin": items})
    replaced = [
        entry(
            needles={"accuracy": needles - lost[i], "answer_logprob": -needles - 2 * lost[i]},
            items={"margin": items - (0.05 if lost[i] else 0.1) - 0.001 * i},
            text={"kl": text + lost[i] + noise(), "local_attention": 0.9 - lost[i] + noise()},
        )
        for i in range(LAYERS)
    ]
    restored = [entry(text={"kl": text + 3 - lost[i] + noise()}) for i in range(LAYERS)]
    redistilled = [entry(text={"kl": text + 1 - lost[i] + noise()}) for i in range(LAYERS)]
    linear = entry(text={"kl": text + 3})
    return {
        "teacher": "t", "mixer": "lightning", "num_layers": LAYERS, "csr_metric": "margin", "csr_tasks": ["items"],
        "recall_tasks": ["needles"], "recall_metric": "accuracy",
        "original": teacher["scores"], "original_samples": teacher["samples"],
        "linear": linear["scores"], "linear_samples": linear["samples"], "costs": COSTS,
        "replaced": [{"layer": i, **e} for i, e in enumerate(replaced)],
        "restored": [{"layer": i, **e} for i, e in enumerate(restored)],
        "redistilled": [{"layer": i, **e} for i, e in enumerate(redistilled)],
        **changes,
    }  # fmt: skip


def evidence(tmp_path: Path, data: dict[str, Any]):  # type: ignore[no-untyped-def]
    path = tmp_path / "scores.json"
    path.write_text(json.dumps(data))
    return read_scores(path)


def rank(
    tmp_path: Path, method: str, keep: int = 2, data: dict[str, Any] | None = None, seed: int = 0, **options: Any
) -> Ranking:
    found = evidence(tmp_path, scores_file() if data is None else data)
    return make_selector(method, options).rank(Question(layers=LAYERS, keep=keep, evidence=found, seed=seed))


def every_layer(data: dict[str, Any], part: str, task: str, metric: str, values: list[float]) -> dict[str, Any]:
    """`data` with one metric of each layer put in, and its samples taken out."""
    changed = copy.deepcopy(data)
    for entry, value in zip(changed[part], values, strict=True):
        entry["scores"].setdefault(task, {})[metric] = value
        entry["samples"].get(task, {}).pop(metric, None)
    return changed


# What each method ranks by -------------------------------------------------------------------------------------------


def test_halo_divides_the_recall_lost_by_the_commonsense_lost() -> None:
    recall, csr = np.array([0.9, 0.5, 0.8]), np.array([0.60, 0.58, 0.50])
    assert halo_scores(recall, csr, 1e-6, None) == pytest.approx([0.0, 0.4 / 0.020001, 0.1 / 0.100001])
    assert halo_scores(recall, csr, 1e-10, 5.0).max() == 5.0


def test_a_floored_denominator_takes_away_the_lead_of_the_layer_with_the_best_commonsense() -> None:
    recall, csr = np.array([0.80, 0.50, 0.79, 0.7]), np.array([0.60, 0.58, 0.602, 0.59])
    assert halo_scores(recall, csr, 1e-6, None).argmax() == 2
    floor = noise_floor(csr, None)
    assert floor == pytest.approx(0.012)  # the median of the gaps .002, .022 and .012
    expected = [0.0, 0.30 / 0.022, 0.01 / 0.012, 0.1 / 0.012]
    assert halo_scores(recall, csr, 1e-6, None, floor) == pytest.approx(expected)


def test_the_floor_is_the_standard_error_of_the_commonsense_difference_on_the_same_items() -> None:
    rng = np.random.default_rng(1)
    shared, own = rng.normal(size=(4000, 1)), rng.normal(size=(4000, 3)) * [0.0, 0.1, 0.3]
    found = noise_floor(np.array([1.0, 0.9, 0.8]), shared + own)  # the shared part cancels
    assert found == pytest.approx(0.2, rel=0.05)  # the median of .1 and .3


def test_the_recall_drop_is_measured_from_the_teacher(tmp_path: Path) -> None:
    answer = rank(tmp_path, "jet-nemotron")
    assert answer.scores == pytest.approx([0, 0, 0.6, 0, 0.3, 0])
    assert answer.stderr == pytest.approx([0.0] * 6, abs=1e-9)  # the same questions: a constant drop has no noise


def test_the_nll_of_answers_rises_where_their_log_likelihood_falls(tmp_path: Path) -> None:
    assert rank(tmp_path, "nll").scores == pytest.approx([0, 0, 1.2, 0, 0.6, 0])


def test_the_kl_drop_keeps_the_layer_whose_loss_moves_the_model_most(tmp_path: Path) -> None:
    data = every_layer(scores_file(), "replaced", "text", "kl", [0.1, 0.5, 0.2, 0.4, 0.3, 0.0])
    answer = rank(tmp_path, "kl-drop", data=data)
    assert answer.ranking == [1, 3, 4, 2, 0, 5] and answer.layers == [1, 3]


def test_kl_ls_ranks_by_the_training_loss_the_re_distilled_candidate_ends_with(tmp_path: Path) -> None:
    data = every_layer(scores_file(), "redistilled", "text", "train_kl", [0.6, 0.1, 0.5, 0.4, 0.3, 0.2])
    answer = rank(tmp_path, "kl-ls", data=data)
    assert answer.scores == [-0.6, -0.1, -0.5, -0.4, -0.3, -0.2]
    assert answer.layers == [1, 5]
    assert answer.interval is not None and all(
        low < score < high for score, (low, high) in zip(answer.scores, answer.interval, strict=True)
    )


def test_kl_ls_ranks_by_held_out_text_where_the_training_loss_is_not_known(tmp_path: Path) -> None:
    data = every_layer(scores_file(), "redistilled", "text", "kl", [0.6, 0.1, 0.5, 0.4, 0.3, 0.2])
    assert rank(tmp_path, "kl-ls", data=data).ranking == [1, 5, 4, 3, 2, 0]


def test_kl_ls_without_a_budget_ranks_the_aligned_student_as_it_is(tmp_path: Path) -> None:
    data = every_layer(scores_file(redistilled=[]), "restored", "text", "kl", [6.0, 5.0, 4.0, 1.0, 2.0, 3.0])
    answer = rank(tmp_path, "kl-ls", data=data, budget="none")
    assert answer.ranking == [3, 4, 5, 2, 1, 0] and answer.cost_tokens == 77
    assert make_selector("kl-ls").needs == {"redistilled"}
    assert make_selector("kl-ls", {"budget": "none"}).needs == {"restored"}


def test_lighttransfer_lets_the_lazy_layers_go(tmp_path: Path) -> None:
    data = every_layer(scores_file(), "replaced", "text", "local_attention", [0.9, 0.2, 0.8, 0.3, 0.7, 0.95])
    answer = rank(tmp_path, "lighttransfer", data=data)
    assert answer.layers == [1, 3] and answer.ranking[-1] == 5


@pytest.mark.parametrize(("layers", "keep"), [(9, 3), (10, 4), (7, 6), (8, 1), (11, 2), (5, 5)])
@pytest.mark.parametrize(("slack", "ends"), [(0, True), (1, True), (1, False), (3, True)])
def test_smart_finds_the_best_of_all_near_uniform_sets(layers: int, keep: int, slack: int, ends: bool) -> None:
    scores = np.random.default_rng(layers).normal(size=(20, layers))
    low, high = max(1, layers // keep - slack), -(-layers // keep) + slack
    part = -(-layers // keep)
    allowed = [
        s
        for s in combinations(range(layers), keep)
        if all(low <= b - a <= high for a, b in zip(s, s[1:], strict=False))
        and (not ends or (s[0] < part and s[-1] >= layers - part))
    ]
    for row, found in zip(scores, spread_sets(scores, keep, slack, ends), strict=True):
        assert tuple(found) == max(allowed, key=lambda s: row[list(s)].sum())


def test_smart_spreads_what_its_scores_alone_would_crowd(tmp_path: Path) -> None:
    data = every_layer(scores_file(), "restored", "text", "kl", [0.5, 0.4, 2.0, 2.0, 1.9, 2.5])
    answer = rank(tmp_path, "smart", data=data)
    assert np.argsort(answer.scores)[-2:].tolist() == [0, 1]
    assert answer.layers == [1, 4]  # three apart, give or take one, and one in each half
    assert answer.scores[0] == pytest.approx(data["linear"]["text"]["kl"] - 0.5)
    assert set(answer.ranking[:2]) == set(answer.layers)


def test_smarts_membership_is_that_of_the_best_sets_of_resamples(tmp_path: Path) -> None:
    answer = rank(tmp_path, "smart", keep=2)
    assert answer.layers == [2, 4] and answer.membership is not None
    assert answer.membership[2] > 0.95 and answer.membership[4] > 0.95 and answer.tied == []
    assert sum(answer.membership) == pytest.approx(2)


# Methods that look at nothing ----------------------------------------------------------------------------------------


def chosen(method: str, layers: int, keep: int, seed: int = 0, **options: Any) -> list[int]:
    return make_selector(method, options).rank(Question(layers=layers, keep=keep, seed=seed)).layers


def test_even_keeps_the_last_layer_of_each_part_or_what_stride_and_offset_say() -> None:
    assert chosen("even", 12, 3) == [3, 7, 11]
    assert chosen("even", 12, 3, stride=4) == [0, 4, 8]
    assert chosen("even", 12, 3, stride=4, offset=1) == [1, 5, 9]
    with pytest.raises(UserError, match=r"stride 4 and offset 0 gives 3 of 12 layers, and --keep is 4"):
        chosen("even", 12, 4, stride=4)
    with pytest.raises(UserError, match="without a stride"):
        make_selector("even", {"offset": 3})
    with pytest.raises(UserError, match="stride 0"):
        make_selector("even", {"stride": 0})


def test_the_latter_half_is_spread_over_the_second_half() -> None:
    assert chosen("latter-half", 28, 7) == [15, 17, 19, 21, 23, 25, 27]
    assert chosen("latter-half", 7, 4) == [3, 4, 5, 6]
    with pytest.raises(UserError, match="latter-half has 4 of 7 layers to choose from"):
        chosen("latter-half", 7, 5)


def test_first_and_last_give_the_odd_layer_to_the_first() -> None:
    assert chosen("first-last", 10, 5) == [0, 1, 2, 8, 9]
    assert chosen("first-last", 10, 1) == [0]
    assert chosen("first-last", 3, 3) == [0, 1, 2]


def test_random_follows_the_seed_of_the_question_or_its_own() -> None:
    assert chosen("random", 40, 9, seed=1) == chosen("random", 40, 9, seed=1)
    assert chosen("random", 40, 9, seed=1) != chosen("random", 40, 9, seed=2)
    own = make_selector("random", {"seed": 1})
    assert own.rank(Question(layers=40, keep=9, seed=2)).layers == chosen("random", 40, 9, seed=1)


def test_given_layers_are_kept_and_checked() -> None:
    given = make_selector("given")
    assert given.rank(Question(layers=12, keep=2, given=(7, 1))).layers == [1, 7]
    with pytest.raises(UserError, match="write --layers"):
        given.rank(Question(layers=12, keep=2))
    for wrong in ((1, 1), (3, 12), (-1, 2)):
        with pytest.raises(UserError, match="must be different numbers from 0 to 11"):
            given.rank(Question(layers=12, keep=2, given=wrong))


# Whatever the method -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("method", "keep"),
    [(m, k) for m in [*FROM_SCORES, *FIXED] for k in range(LAYERS + 1 if m != "latter-half" else LAYERS // 2 + 1)],
)
def test_any_number_of_layers_can_be_kept(tmp_path: Path, method: str, keep: int) -> None:
    answer = rank(tmp_path, method, keep)
    assert len(answer.layers) == keep and answer.layers == sorted(set(answer.layers))
    assert sorted(answer.ranking) == list(range(LAYERS)) and len(answer.scores) == LAYERS
    assert set(answer.ranking[:keep]) == set(answer.layers)
    if answer.membership is not None:
        assert sum(answer.membership) == pytest.approx(keep)
    json.dumps(answer.to_json(), allow_nan=False)


@pytest.mark.parametrize("method", FROM_SCORES)
def test_the_layers_that_matter_are_found_and_known_for_certain(tmp_path: Path, method: str) -> None:
    answer = rank(tmp_path, method)
    assert answer.layers == [2, 4]
    assert answer.membership is not None and min(answer.membership[2], answer.membership[4]) > 0.95
    assert answer.tied == [] and answer.stderr is not None and answer.interval is not None


@pytest.mark.parametrize("method", ["kl-drop", "kl-ls", "lighttransfer"])
def test_a_third_layer_can_only_be_guessed_and_the_answer_says_so(tmp_path: Path, method: str) -> None:
    answer = rank(tmp_path, method, keep=3)
    assert {2, 4} < set(answer.layers)
    third = next(i for i in answer.layers if i not in (2, 4))
    assert answer.membership is not None and answer.membership[third] < 0.95
    assert third in (answer.tied or []) and 2 not in (answer.tied or [])


@pytest.mark.parametrize("method", FROM_SCORES)
def test_the_answer_depends_on_the_seed_in_its_uncertainty_alone(tmp_path: Path, method: str) -> None:
    one, same, other = (rank(tmp_path, method, seed=s) for s in (0, 0, 1))
    assert one == same
    assert (one.layers, one.ranking, one.scores) == (other.layers, other.ranking, other.scores)


def test_the_tokens_spent_are_those_of_what_a_method_read(tmp_path: Path) -> None:
    spent = {method: rank(tmp_path, method).cost_tokens for method in FROM_SCORES}
    assert spent == {
        "halo": 910, "jet-nemotron": 700, "nll": 700, "kl-drop": 70, "kl-ls": 6060, "smart": 77, "lighttransfer": 10,
    }  # fmt: skip


def test_every_price_is_known_before_anything_is_measured() -> None:
    prices = Prices(layers=10, keep=3, recall=100, csr=10, text=5, restore=1000, prompt=50)
    found = {method: make_selector(method).price(prices) for method in [*FROM_SCORES, *FIXED, "given"]}
    assert found == {
        "halo": 1210, "jet-nemotron": 1100, "nll": 1100, "kl-drop": 55, "kl-ls": 10050, "smart": 55,
        "lighttransfer": 5, "even": 0, "latter-half": 0, "first-last": 0, "random": 0, "given": 0,
    }  # fmt: skip
    assert make_selector("kl-ls", {"budget": "none"}).price(prices) == 55


# Samples that are not what they should be ----------------------------------------------------------------------------


def samples_cut(data: dict[str, Any], count: int, *layers: int, part: str = "replaced") -> dict[str, Any]:
    changed = copy.deepcopy(data)
    for layer in layers:
        for metrics in changed[part][layer]["samples"].values():
            for name in metrics:
                metrics[name] = metrics[name][:count]
    return changed


@pytest.mark.parametrize("method", FROM_SCORES)
@pytest.mark.parametrize("count", [0, 1, 39])
def test_uneven_samples_give_the_same_ranking_without_an_uncertainty(tmp_path: Path, method: str, count: int) -> None:
    data = scores_file()
    for part in ("replaced", "restored", "redistilled"):
        data = samples_cut(data, count, 3, part=part)
    answer = rank(tmp_path, method, data=data)
    assert answer.layers == rank(tmp_path, method).layers
    assert answer.stderr is None and answer.membership is None


def test_one_sample_a_task_is_no_ground_for_certainty(tmp_path: Path) -> None:
    data = samples_cut(scores_file(), 1, *range(LAYERS))
    data["original_samples"] = {t: {m: v[:1] for m, v in by.items()} for t, by in data["original_samples"].items()}
    assert rank(tmp_path, "halo", data=data).membership is None
    assert rank(tmp_path, "jet-nemotron", data=data).membership is None


@pytest.mark.parametrize("base", [None, {}, {"needles": {"accuracy": [0.5] * 7}}])
def test_the_teachers_samples_matter_to_differences_from_it_alone(tmp_path: Path, base: object) -> None:
    data = scores_file(original_samples=base)
    assert rank(tmp_path, "jet-nemotron", data=data).stderr is None
    assert rank(tmp_path, "halo", data=data).stderr is not None


def test_samples_need_not_average_to_the_score(tmp_path: Path) -> None:
    data = every_layer(scores_file(), "replaced", "text", "kl", [0.1, 0.5, 0.2, 0.4, 0.3, 0.0])
    for entry in data["replaced"]:
        entry["samples"]["text"]["kl"] = [1.0, 2.0, 3.0]
    assert rank(tmp_path, "kl-drop", data=data).layers == [1, 3]


# What cannot be ranked -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("method", "path", "message"),
    [
        ("halo", ("replaced", 3, "scores", "items"), "layer 3 lack the task 'items'"),
        ("halo", ("replaced", 3, "scores", "items", "margin"), "lacks the metric 'margin'"),
        ("jet-nemotron", ("original", "needles"), "the original lack the task 'needles'"),
        ("nll", ("original", "needles", "answer_logprob"), "the original, task 'needles' lacks .*'answer_logprob'"),
        ("nll", ("replaced", 0, "scores", "needles", "answer_logprob"), "layer 0, .* lacks .*'answer_logprob'"),
        ("kl-drop", ("replaced", 1, "scores", "text"), "layer 1 lack the task 'text'"),
        ("lighttransfer", ("replaced", 1, "scores", "text", "local_attention"), "lacks the metric 'local_attention'"),
        ("smart", ("linear", "text"), "the all-linear student .* lack the task 'text'"),
        ("smart", ("restored",), "no restored layers"),
        ("kl-ls", ("redistilled",), "no redistilled layers"),
    ],
)
def test_what_a_selector_lacks_is_named(tmp_path: Path, method: str, path: tuple[Any, ...], message: str) -> None:
    data = scores_file()
    node: Any = data
    for key in path[:-1]:
        node = node[key]
    del node[path[-1]]
    with pytest.raises(UserError, match=message):
        rank(tmp_path, method, data=data)


@pytest.mark.parametrize("method", FROM_SCORES)
def test_a_selector_without_evidence_says_how_to_get_it(method: str) -> None:
    with pytest.raises(UserError, match=f"{method} needs scores: give a run"):
        make_selector(method).rank(Question(layers=4, keep=1))


def test_no_tasks_are_no_zero(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no recall tasks"):
        rank(tmp_path, "jet-nemotron", data=scores_file(recall_tasks=[]))
    with pytest.raises(UserError, match="no csr tasks"):
        rank(tmp_path, "halo", data=scores_file(csr_tasks=[]))


def test_more_layers_than_there_are_cannot_be_kept() -> None:
    with pytest.raises(UserError, match="out of range: the model has 4 layers"):
        Question(layers=4, keep=5)


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("halo", {"epz": 1}, "unknown field in the options of halo 'epz'; did you mean 'eps'"),
        ("halo", {"eps": 0}, "eps of halo is 0.0; it must be 1e-30 or more"),
        ("halo", {"eps": float("nan")}, "eps of halo is nan"),
        ("halo", {"eps": "many"}, "options of halo.eps must be float"),
        ("halo", {"cap": -1}, "cap of halo is -1.0"),
        ("halo", {"denominator": "flored"}, "did you mean 'floored'"),
        ("kl-ls", {"budget": 7}, "redistilled"),
        ("smart", {"slack": -1}, "slack of smart is -1"),
        ("smart", {"ends": 1}, "options of smart.ends must be bool"),
        ("random", {"seed": -3}, "seed of random is -3"),
        ("given", {"layers": [1]}, "unknown field in the options of given"),
        ("hallo", {}, "did you mean 'halo'"),
    ],
)
def test_a_wrong_option_names_the_one_meant(name: str, options: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        make_selector(name, options)


def test_the_defaults_are_the_faithful_forms() -> None:
    assert asdict(make_selector("halo")) == {"eps": 1e-6, "cap": None, "denominator": "plain"}  # type: ignore[call-overload]
    assert asdict(make_selector("kl-ls")) == {"budget": "redistilled"}  # type: ignore[call-overload]
    assert make_selector("halo", {"cap": "50", "eps": "1e-10"}) == make_selector("halo", {"cap": 50, "eps": 1e-10})


@pytest.mark.parametrize("name", SELECTORS.names())
def test_every_selector_says_what_it_is(name: str) -> None:
    selector = make_selector(name)
    assert selector.name == name and selector.label
    assert selector.needs <= set(get_args(Need))
    assert selector.paper == "" or selector.paper.startswith("https://arxiv.org/abs/")
    prices = Prices(layers=12, keep=3, recall=10**4, csr=10**4, text=10**4, restore=10**6, prompt=512)
    assert (selector.price(prices) > 0) == bool(selector.needs)
