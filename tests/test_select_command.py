"""`halobench select`: the published sweep, files of every shape, and one clear line for what cannot be ranked."""

from __future__ import annotations

import copy
import json
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from halobench.surgery.selection import Prices, Question
from halobench.surgery.selection.scores_file import read_scores
from tests.test_selection import FIXED, FROM_SCORES, LAYERS, scores_file

PUBLISHED = Path(__file__).resolve().parents[2] / "shared" / "sweeps" / "qwen3-1.7b.json"
published = pytest.mark.skipif(not PUBLISHED.exists(), reason="no ../shared/sweeps beside the repository")


@dataclass
class Outcome:
    """What a command left behind."""

    code: int
    out: str
    err: str

    @property
    def json(self) -> Any:
        """stdout, which must be one JSON document by the letter of the standard."""

        def refuse(name: str) -> None:
            raise AssertionError(f"{name} is not JSON")

        return json.loads(self.out, parse_constant=refuse)


Select = Callable[..., Outcome]


@pytest.fixture
def select(capsys, monkeypatch) -> Select:  # type: ignore[no-untyped-def]
    """Runs `halobench select ...` as a shell would start it, but in this process."""

    def run(*arguments: object) -> Outcome:
        from halobench.cli import main

        monkeypatch.setattr(sys, "argv", ["halobench", "select", *map(str, arguments)])
        capsys.readouterr()
        with pytest.raises(SystemExit) as ended:
            main()
        captured = capsys.readouterr()
        return Outcome(int(ended.value.code or 0), captured.out, captured.err)

    return run


@pytest.fixture
def scores(tmp_path: Path) -> Callable[..., Path]:
    """A file of scores, changed as asked; text is written as it is."""

    def write(data: Any = None, **changes: object) -> Path:
        path = tmp_path / "scores.json"
        if isinstance(data, bytes):
            path.write_bytes(data)
        else:
            path.write_text(data if isinstance(data, str) else json.dumps(data or scores_file(**changes)))
        return path

    return write


# The published sweep -------------------------------------------------------------------------------------------------


@published
def test_the_published_sweep_gives_the_released_layers(select: Select) -> None:
    found = select("--scores", PUBLISHED, "--keep", 7, "--json")
    assert found.code == 0
    assert found.json["keep"] == 7
    methods = found.json["methods"]
    assert methods["halo"]["layers"] == [2, 3, 6, 8, 9, 21, 25]
    assert methods["jet-nemotron"]["ranking"][:7] == [0, 21, 25, 19, 6, 11, 9]
    assert methods["halo"]["stderr"] is None and len(methods["halo"]["scores"]) == 28


@published
def test_the_published_sweep_feeds_what_it_has_scores_for_and_says_what_it_does_not(select: Select) -> None:
    found = select("--scores", PUBLISHED, "--json")
    assert list(found.json["methods"]) == ["halo", "jet-nemotron", "even", "latter-half", "first-last", "random"]
    assert "nll is left out: layer 0, task 'fda' lacks the metric 'answer_logprob' (it has contains)" in found.err
    for name in ("kl-drop", "kl-ls", "smart", "lighttransfer"):
        assert f"{name} is left out: " in found.err
    assert found.json["keep"] == 7  # a quarter


@published
@pytest.mark.parametrize("keep", [1, 14, 27, 0.5])
def test_the_published_sweep_can_be_asked_for_any_number(select: Select, keep: float) -> None:
    found = select("--scores", PUBLISHED, "--keep", keep, "--method", "halo", "--method", "jet-nemotron", "--json").json
    whole = select("--scores", PUBLISHED, "--keep", 28, "--method", "halo", "--json").json
    count = 14 if keep == 0.5 else keep
    assert found["keep"] == count and len(found["methods"]["halo"]["layers"]) == count
    assert found["methods"]["halo"]["layers"] == sorted(whole["methods"]["halo"]["ranking"][:count])


@published
def test_a_floored_denominator_drops_the_layer_that_leads_by_noise(select: Select) -> None:
    asked = ("--scores", PUBLISHED, "--keep", 7, "--method", "halo", "--json")
    assert 3 in select(*asked).json["methods"]["halo"]["layers"]  # the largest commonsense, hardly any recall lost
    floored = select(*asked, "--option", "halo.denominator=floored").json["methods"]["halo"]["layers"]
    assert 3 not in floored and {2, 6, 9, 21, 25} < set(floored)


@published
def test_the_released_codes_cap_does_not_change_the_published_choice(select: Select) -> None:
    options = ("--option", "halo.eps=1e-10", "--option", "halo.cap=50")
    found = select("--scores", PUBLISHED, "--keep", 7, "--method", "halo", *options, "--json").json["methods"]["halo"]
    assert max(found["scores"]) == 50 and found["layers"] == [2, 3, 6, 8, 9, 21, 25]


# What it prints ------------------------------------------------------------------------------------------------------


def test_a_file_with_everything_feeds_every_method_that_ranks_by_scores(select: Select, scores) -> None:  # type: ignore[no-untyped-def]
    found = select("--scores", scores(), "--keep", 2, "--json")
    assert set(found.json["methods"]) == {*FROM_SCORES, *FIXED}
    for name in FROM_SCORES:
        answer = found.json["methods"][name]
        assert answer["layers"] == [2, 4] and len(answer["stderr"]) == LAYERS and answer["cost_tokens"] > 0
    assert "joint is left out" in found.err and "give a run with an aligned checkpoint" in found.err


def test_agreement_is_of_every_two_methods(select: Select, scores) -> None:  # type: ignore[no-untyped-def]
    methods = ("--method", "kl-drop", "--method", "jet-nemotron", "--method", "first-last")
    found = select("--scores", scores(), "--keep", 2, *methods, "--json").json
    assert found["agreement"]["methods"] == ["kl-drop", "jet-nemotron", "first-last"] == list(found["methods"])
    assert found["agreement"]["overlap"] == [[2, 2, 0], [2, 2, 0], [0, 0, 2]]
    tau = found["agreement"]["tau"]
    assert [tau[i][i] for i in range(3)] == pytest.approx([1, 1, 1])
    assert tau[0][1] == pytest.approx(tau[1][0]) and tau[0][1] > 0.5 > 0 > tau[0][2]


def test_a_method_alone_agrees_with_itself(select: Select, scores) -> None:  # type: ignore[no-untyped-def]
    found = select("--scores", scores(), "--keep", 2, "--method", "halo", "--method", "halo", "--json").json
    assert found["agreement"]["methods"] == ["halo"] and found["agreement"]["overlap"] == [[2]]


def test_people_get_a_table_in_plain_words(select: Select, scores) -> None:  # type: ignore[no-untyped-def]
    found = select("--scores", scores(), "--keep", 3)
    assert found.code == 0
    kl = next(line for line in found.out.splitlines() if "KL drop" in line)
    assert "2: 100%" in kl and "70" in kl
    assert "cannot be told apart: layers on both sides of the cut" in found.out
    assert "how many kept layers two methods share, of 3" in found.out
    alone = select("--scores", scores(), "--keep", 3, "--method", "halo")
    assert "share, of 3" not in alone.out and "HALO" in alone.out


def test_the_seed_moves_the_bootstrap_and_the_draw(select: Select, scores) -> None:  # type: ignore[no-untyped-def]
    def answer(seed: int) -> Any:
        methods = ("--method", "kl-drop", "--method", "random")
        return select("--scores", scores(), "--keep", 2, "--seed", seed, *methods, "--json").json["methods"]

    assert answer(1) == answer(1)
    assert answer(1)["kl-drop"]["stderr"] != answer(2)["kl-drop"]["stderr"]
    assert answer(1)["random"]["layers"] != answer(4)["random"]["layers"]


def test_layers_given_by_hand_stand_beside_the_methods(select: Select, scores) -> None:  # type: ignore[no-untyped-def]
    found = select("--scores", scores(), "--layers", "5,1,0", "--json").json
    assert found["keep"] == 3 and found["methods"]["given"]["layers"] == [0, 1, 5]
    assert len(found["methods"]["halo"]["layers"]) == 3


def test_options_reach_their_selector(select: Select, scores) -> None:  # type: ignore[no-untyped-def]
    options = ("--option", "even.stride=3", "--option", "even.offset=1", "--option", "kl-ls.budget=none")
    found = select("--scores", scores(redistilled=[]), "--keep", 2, *options, "--json").json["methods"]
    assert found["even"]["layers"] == [1, 4]
    assert found["kl-ls"]["cost_tokens"] == 77


@pytest.mark.parametrize("layers", [1, 2, 3, 61])
def test_files_of_any_depth_are_ranked_up_to_all_layers_but_one(select: Select, scores, layers: int) -> None:  # type: ignore[no-untyped-def]
    entries = [
        {"layer": i, "scores": {"a": {"x": 0.5 - i / 100}, "b": {"y": i / 100}}} for i in reversed(range(layers))
    ]
    data = {
        "teacher": "t", "mixer": "m", "num_layers": layers,
        "csr_metric": "y", "csr_tasks": ["b"], "recall_tasks": ["a"],
        "original": {"a": {"x": 0.6}, "b": {"y": 0.7}}, "replaced": entries,
    }  # fmt: skip
    for keep in {0, 1, layers - 1} - {layers}:
        found = select("--scores", scores(data), "--keep", keep, "--json").json["methods"]
        assert found["jet-nemotron"]["layers"] == list(range(layers - keep, layers))
        assert all(len(answer["layers"]) == keep for answer in found.values())
    default = select("--scores", scores(data), "--json").json
    assert default["keep"] == max(1, layers // 4)


# What a file may have wrong ------------------------------------------------------------------------------------------


def put(*path_and_value: Any) -> Callable[[dict[str, Any]], dict[str, Any]]:
    """Changes one place of the file."""
    *path, last, value = path_and_value

    def change(data: dict[str, Any]) -> dict[str, Any]:
        changed = copy.deepcopy(data)
        node: Any = changed
        for key in path:
            node = node[key]
        node[last] = value
        return changed

    return change


NAN, INF = float("nan"), float("inf")
SCORE = ("replaced", 3, "scores", "needles")
SAMPLES = ("replaced", 3, "samples", "needles", "accuracy")
WRONG_FILES: dict[str, tuple[Callable[[dict[str, Any]], Any], str]] = {
    "not JSON": (lambda d: "layer 3 is best", "not valid JSON"),
    "empty": (lambda d: "", "not valid JSON"),
    "half a file": (lambda d: json.dumps(d)[:500], "not valid JSON"),
    "binary": (lambda d: b"\x80\x02\xff\xfe\x00\x01", "not valid JSON"),
    "UTF-16": (lambda d: json.dumps(d).encode("utf-16"), "not valid JSON"),
    "too deep": (lambda d: "[" * 200_000, "scores.json"),
    "a number too long": (lambda d: json.dumps(d).replace('"num_layers": 6', '"num_layers": ' + "9" * 5000), "scores"),
    "a score too large": (put(*SCORE, "accuracy", 10**400), "scores"),
    "a list": (lambda d: [d], "must be a table of fields, got list"),
    "a number": (lambda d: "7", "must be a table of fields, got int"),
    "null": (lambda d: "null", "must be a table of fields, got nothing"),
    "an empty table": (lambda d: "{}", "lacks the field 'teacher'"),
    "no mixer": (lambda d: {k: v for k, v in d.items() if k != "mixer"}, "lacks the field 'mixer'"),
    "an unknown field": (put("recal_tasks", []), "did you mean 'recall_tasks'"),
    "an unknown field of a layer": (put("replaced", 3, "score", {}), "did you mean 'scores'"),
    "layers in words": (put("num_layers", "six"), "num_layers must be int"),
    "layers that are true": (put("num_layers", True), "num_layers must be int"),
    "half a layer": (put("num_layers", 6.5), "num_layers must be int"),
    "no layers": (put("num_layers", 0), "num_layers is 0"),
    "fewer than no layers": (put("num_layers", -6), "num_layers is -6"),
    "a billion layers": (put("num_layers", 10**9), "num_layers is 1000000000"),
    "layers that are NaN": (put("num_layers", NAN), "num_layers is nan"),
    "one layer more": (put("num_layers", 7), "must hold each of 7 layers once; got 6 entries, missing layers [6]"),
    "a layer twice": (put("replaced", 3, "layer", 2), "missing layers [3]"),
    "a layer beyond": (put("replaced", 5, "layer", 6), "missing layers [5]"),
    "a layer below": (put("replaced", 0, "layer", -1), "missing layers [0]"),
    "a layer too many": (lambda d: put("replaced", [*d["replaced"], d["replaced"][0]])(d), "repeated"),
    "a layer that is null": (put("replaced", 2, "layer", None), "replaced[2].layer must be int"),
    "a layer lost": (lambda d: put("replaced", d["replaced"][:3])(d), "missing layers [3, 4, 5]"),
    "replaced as a table": (lambda d: put("replaced", dict(enumerate(d["replaced"])))(d), "replaced must be a list"),
    "a restored layer lost": (lambda d: put("restored", d["restored"][:5])(d), "restored scores must hold each of 6"),
    "a NaN": (put(*SCORE, "accuracy", NAN), "layer 3, task 'needles': accuracy is nan"),
    "a number beyond arithmetic": (put(*SCORE, "accuracy", -1e308), "layer 3, task 'needles': accuracy is -1e+308"),
    "infinity": (put(*SCORE, "accuracy", -INF), "layer 3, task 'needles': accuracy is -inf"),
    "a NaN of the teacher": (put("original", "needles", "accuracy", NAN), "the original, task 'needles': accuracy is"),
    "a NaN of the student": (put("linear", "text", "kl", NAN), "the all-linear student, task 'text': kl is nan"),
    "a NaN sample": (
        put(*SAMPLES, 7, NAN),
        "layer 3, task 'needles': a sample of accuracy is nan",
    ),
    "an infinite sample of the teacher": (
        put("original_samples", "items", "margin", 0, INF),
        "the original, task 'items': a sample of margin is inf",
    ),
    "a NaN of a restored layer": (
        put("restored", 1, "samples", "text", "kl", 0, NAN),
        "layer 1 restored, task 'text': a sample of kl is nan",
    ),
    "a score that is null": (put(*SCORE, "accuracy", None), "scores.needles.accuracy must be float, got nothing"),
    "a score that is true": (put(*SCORE, "accuracy", True), "must be float, got bool True"),
    "a score in words": (put(*SCORE, "accuracy", "high"), "must be float, got str 'high'"),
    "a list for a score": (put(*SCORE, "accuracy", [1.0]), "must be float, got list"),
    "a number for metrics": (put("replaced", 3, "scores", "needles", 0.5), "needles must be a table"),
    "a list for scores": (put("replaced", 3, "scores", []), "scores must be a table"),
    "a sample that is null": (put(*SAMPLES, 7, None), "accuracy[7] must be float"),
    "a number for samples": (put(*SAMPLES, 0.5), "accuracy must be a list"),
    "tasks as text": (put("recall_tasks", "needles"), "recall_tasks must be a list"),
    "costs as text": (put("costs", "replaced", "needles", "many"), "must be int"),
}  # fmt: skip


@pytest.mark.parametrize("name", WRONG_FILES)
@pytest.mark.parametrize("method", [(), ("--method", "halo")], ids=["every method", "halo"])
def test_a_wrong_file_is_one_clear_line(select: Select, scores, name: str, method: tuple[str, ...]) -> None:  # type: ignore[no-untyped-def]
    change, expected = WRONG_FILES[name]
    path = scores(change(scores_file()))
    found = select("--scores", path, "--keep", 2, *method, "--json")
    assert found.code == 2 and found.out == ""
    assert found.err.startswith("error: ") and found.err.count("\n") == 1
    assert expected in found.err and len(found.err) < 600


def test_a_folder_or_a_missing_file_is_no_file_of_scores(select: Select, tmp_path: Path) -> None:
    for path, expected in ((tmp_path, "is not a file"), (tmp_path / "none.json", "does not exist")):
        found = select("--scores", path)
        assert found.code == 2 and expected in found.err and found.err.count("\n") == 1


LACKING: dict[str, tuple[Callable[[dict[str, Any]], Any], set[str]]] = {
    "a recall task of one layer": (
        lambda d: put("replaced", 3, "scores", {k: d["replaced"][3]["scores"][k] for k in ("items", "text")})(d),
        {"halo", "jet-nemotron", "nll"},
    ),
    "a metric of one layer": (put("replaced", 3, "scores", "items", {"acc": 0.5}), {"halo"}),
    "the teacher's scores": (put("original", {}), {"jet-nemotron", "nll"}),
    "the recall metric": (put("recall_metric", "exact"), {"halo", "jet-nemotron"}),
    "a choice of metric": (put("recall_metric", None), {"halo", "jet-nemotron"}),
    "the names of recall tasks": (put("recall_tasks", []), {"halo", "jet-nemotron", "nll"}),
    "the student's scores": (put("linear", {}), {"smart"}),
    "restored layers": (put("restored", []), {"smart"}),
    "re-distilled layers": (put("redistilled", []), {"kl-ls"}),
    "held-out text of a layer": (put("replaced", 0, "scores", "text", {}), {"kl-drop", "lighttransfer"}),
}  # fmt: skip


@pytest.mark.parametrize("name", LACKING)
def test_what_is_lacking_leaves_out_the_methods_that_read_it(select: Select, scores, name: str) -> None:  # type: ignore[no-untyped-def]
    change, lost = LACKING[name]
    path = scores(change(scores_file()))
    found = select("--scores", path, "--keep", 2, "--json")
    assert found.code == 0
    assert {*FROM_SCORES, *FIXED} - set(found.json["methods"]) == lost
    for method in sorted(lost):
        assert f"{method} is left out: " in found.err
        named = select("--scores", path, "--keep", 2, "--method", "even", "--method", method)
        assert named.code == 2 and named.err.startswith("error: ") and named.err.count("\n") == 1


def test_no_replaced_layers_rank_nothing_by_replacement(select: Select, scores) -> None:  # type: ignore[no-untyped-def]
    found = select("--scores", scores(replaced=[]), "--keep", 2, "--method", "halo")
    assert found.code == 2 and "replaced" in found.err and found.err.count("\n") == 1


def test_samples_that_cannot_be_resampled_are_said_to_give_no_uncertainty(select: Select, scores) -> None:  # type: ignore[no-untyped-def]
    data = scores_file()
    data["replaced"][2]["samples"]["needles"]["accuracy"].pop()
    found = select("--scores", scores(data), "--keep", 2, "--json")
    assert found.json["methods"]["halo"]["stderr"] is None and "halo: no uncertainty" in found.err
    assert found.json["methods"]["kl-drop"]["stderr"] is not None and "kl-drop: no uncertainty" not in found.err


# What a request may have wrong ---------------------------------------------------------------------------------------

WRONG_REQUESTS: list[tuple[list[object], str]] = [
    (["--keep", 7], "--keep 7 is out of range: the model has 6 layers"),
    (["--keep", -1], "--keep -1 is neither"),
    (["--keep", 2.5], "--keep 2.5 is neither a number of layers nor a share below 1"),
    (["--keep", "nan"], "--keep nan is neither"),
    (["--keep", "inf"], "--keep inf is neither"),
    (["--keep", 0.1], "--keep 0.1 of 6 layers is less than one"),
    (["--keep", "two"], "Invalid value for '--keep'"),
    (["--method", "hallo"], "did you mean 'halo'"),
    (["--method", "given"], "write --layers"),
    (["--method", "joint"], "give a run with an aligned checkpoint"),
    (["--method", "flashmorph"], "give a run with an aligned checkpoint"),
    (["--method", "postnas"], "give a run with an aligned checkpoint"),
    (["--method", "latter-half", "--keep", 4], "latter-half has 3 of 6 layers to choose from"),
    (["--seed", -1], "--seed -1 is below 0"),
    (["--layers", "1,2", "--keep", 3], "--keep 3 means 3 layers and --layers names 2"),
    (["--layers", "1,2", "--method", "halo"], "--layers is for the method `given`"),
    (["--layers", "1,9", "--method", "given"], "must be different numbers from 0 to 5"),
    (["--layers", "1,x"], "is not a list of layer numbers"),
    (["--option", "halo.eps"], "not of the form method.option=value"),
    (["--option", "eps=1"], "not of the form method.option=value"),
    (["--option", "hallo.eps=1"], "did you mean 'halo'"),
    (["--option", "halo.epz=1"], "did you mean 'eps'"),
    (["--option", "halo.eps=[1"], "is not a value that YAML can read"),
    (["--option", "halo.denominator=none"], "the options of halo.denominator"),
    (["--option", "halo.eps=0"], "must be 1e-30 or more"),
    (["--method", "nll", "--option", "halo.eps=1"], "halo is not among the methods asked for (nll)"),
    (["--method", "even", "--option", "even.stride=4", "--keep", 3], "gives 2 of 6 layers, and --keep is 3"),
    (["some-run"], "not both"),
]


@pytest.mark.parametrize(("arguments", "expected"), WRONG_REQUESTS)
def test_a_wrong_request_is_one_clear_line(select: Select, scores, arguments: list[object], expected: str) -> None:  # type: ignore[no-untyped-def]
    found = select("--scores", scores(), *arguments)
    assert found.code == 2 and found.out == ""
    assert found.err.startswith("error: ") and found.err.count("\n") == 1
    assert expected in found.err


# From a run ----------------------------------------------------------------------------------------------------------


@pytest.fixture
def asked(monkeypatch, tmp_path: Path) -> list[tuple[Any, ...]]:  # type: ignore[no-untyped-def]
    """A run of six layers whose evidence is the file above; every question to it is written down."""
    import halobench.cli.select as command
    import halobench.evidence as gathering

    path = tmp_path / "evidence.json"
    path.write_text(json.dumps(scores_file()))
    recipe = SimpleNamespace(kept_count=lambda layers: 2, selector_options={"halo": {"cap": 1.5}}, seed=3)
    conversion = SimpleNamespace(layers=LAYERS, recipe=recipe, timed=lambda selector, asked: selector.rank(asked))
    questions: list[tuple[Any, ...]] = []

    def question(run: Any, needs: Any, keep: int, given: Any = None) -> Question:
        questions.append((set(needs), keep, given))
        return Question(layers=LAYERS, keep=keep, seed=recipe.seed, evidence=read_scores(path), given=given)

    prices = Prices(layers=LAYERS, keep=2, recall=70_000, csr=3_000, text=2_000, restore=10**6, prompt=512)
    monkeypatch.setattr(command, "_conversion", lambda run, device: conversion)
    monkeypatch.setattr(gathering, "prices", lambda run: prices)
    monkeypatch.setattr(gathering, "question", question)
    return questions


def test_a_run_says_what_each_method_costs_and_trains_nothing_unasked(select: Select, asked) -> None:  # type: ignore[no-untyped-def]
    found = select("a-run", "--json")
    assert set(found.json["methods"]) == {*FROM_SCORES, *FIXED} - {"kl-ls"}
    assert asked == [({"recall", "csr", "text", "restored"}, 2, None)]
    assert "halo: about 511K tokens\n" in found.err
    assert "kl-ls: about 6.01M tokens; not run unless named, for it trains or searches: --method kl-ls" in found.err
    assert "even: " not in found.err


def test_a_method_that_trains_runs_when_it_is_named(select: Select, asked) -> None:  # type: ignore[no-untyped-def]
    found = select("a-run", "--method", "kl-ls", "--method", "even", "--keep", 0.5, "--json")
    assert set(found.json["methods"]) == {"kl-ls", "even"} and found.json["keep"] == 3
    assert asked == [({"redistilled"}, 3, None)]
    assert "kl-ls: about 6.01M tokens\n" in found.err


def test_an_option_can_make_a_method_one_that_trains_nothing(select: Select, asked) -> None:  # type: ignore[no-untyped-def]
    found = select("a-run", "--option", "kl-ls.budget=none", "--json")
    assert "kl-ls: about 14K tokens\n" in found.err and "kl-ls" in found.json["methods"]


def test_options_of_the_recipe_hold_until_the_command_line_says_otherwise(select: Select, asked) -> None:  # type: ignore[no-untyped-def]
    def highest(*more: str) -> float:
        return max(select("a-run", "--method", "halo", *more, "--json").json["methods"]["halo"]["scores"])

    assert highest() == 1.5
    assert highest("--option", "halo.cap=1") == 1
    assert highest("--option", "halo.cap=null") > 1.5


def test_the_seed_of_a_run_is_its_recipes_unless_given(select: Select, asked) -> None:  # type: ignore[no-untyped-def]
    def draw(*more: object) -> Any:
        return select("a-run", "--method", "random", *more, "--json").json["methods"]["random"]["layers"]

    assert draw() == draw("--seed", 3) != draw("--seed", 4)


def test_too_many_layers_are_refused_before_anything_is_measured(select: Select, asked) -> None:  # type: ignore[no-untyped-def]
    found = select("a-run", "--keep", 9)
    assert found.code == 2 and "the model has 6 layers" in found.err and asked == []


def test_a_folder_that_is_no_aligned_run_says_how_to_get_one(select: Select, tmp_path: Path) -> None:
    found = select(tmp_path)
    assert found.code == 2 and "--until align` makes one" in found.err and found.err.count("\n") == 1
