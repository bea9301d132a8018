"""Selectors: the faithful formulas, their uncertainty, and clear words for scores that cannot be ranked."""

from __future__ import annotations

import copy
import json
from pathlib import Path

import numpy as np
import pytest

from halobench.errors import UserError
from halobench.surgery.selection import SELECTORS, Question
from halobench.surgery.selection.evidence import read_evidence
from halobench.surgery.selection.halo import halo_scores

LAYERS = 6


def scores_file(**changes: object) -> dict:
    """A sweep of six layers with 40 samples a task: layer 2 and layer 4 carry the recall."""
    rng = np.random.default_rng(0)
    needles, items = rng.random(40), rng.normal(size=40)
    drop = {2: 0.6, 4: 0.3}

    def entry(layer: int | None) -> tuple[dict, dict]:
        recall = needles - drop.get(layer if layer is not None else -1, 0.0)
        csr = items - (0.05 if layer in (2, 4) else 0.1 if layer is not None else 0.0) - 0.001 * (layer or 0)
        samples = {"needles": {"accuracy": recall.tolist()}, "text": {"margin": csr.tolist()}}
        return {t: {m: float(np.mean(v)) for m, v in by.items()} for t, by in samples.items()}, samples

    original, original_samples = entry(None)
    replaced = [dict(zip(("layer", "scores", "samples"), (i, *entry(i)), strict=True)) for i in range(LAYERS)]
    return {
        "teacher": "t", "mixer": "lightning", "num_layers": LAYERS, "csr_metric": "margin", "csr_tasks": ["text"],
        "recall_tasks": ["needles"], "original": original, "original_samples": original_samples,
        "replaced": replaced, "tokens": 1000, 
        "restored": [{"layer": i, "kl": 1.0 + i, "stderr": 0.1} for i in range(6)],
        "restored_tokens": 77, **changes,
    }  # fmt: skip


def evidence(tmp_path: Path, data: dict):  # type: ignore[no-untyped-def]
    path = tmp_path / "scores.json"
    path.write_text(json.dumps(data))
    return read_evidence(path)


def rank(tmp_path: Path, method: str, keep: int = 2, **changes: object):  # type: ignore[no-untyped-def]
    found = evidence(tmp_path, scores_file(**changes))
    return SELECTORS.get(method)().rank(Question(layers=LAYERS, keep=keep, evidence=found))


def test_halo_divides_the_recall_lost_by_the_commonsense_lost() -> None:
    recall, csr = np.array([0.9, 0.5, 0.8]), np.array([0.60, 0.58, 0.50])
    assert halo_scores(recall, csr, 0.0 + 1e-6, None) == pytest.approx([0.0, 0.4 / 0.020001, 0.1 / 0.100001])
    assert halo_scores(recall, csr, 1e-10, 5.0).max() == 5.0


def test_the_layers_that_carry_recall_are_found_and_known_for_certain(tmp_path: Path) -> None:
    for method in ("halo", "jet-nemotron"):
        answer = rank(tmp_path, method)
        assert answer.layers == [2, 4]
        assert set(answer.ranking[:2]) == {2, 4}
        assert answer.membership is not None and min(answer.membership[2], answer.membership[4]) > 0.9
        assert answer.cost_tokens == 1000


def test_the_recall_drop_is_measured_from_the_teacher(tmp_path: Path) -> None:
    answer = rank(tmp_path, "jet-nemotron")
    assert answer.scores == pytest.approx([0, 0, 0.6, 0, 0.3, 0])
    assert answer.stderr == pytest.approx([0.0] * 6, abs=1e-9)  # the same questions: a constant drop has no noise


def test_restoring_ranks_the_lowest_kl_first(tmp_path: Path) -> None:
    answer = rank(tmp_path, "kl-ls")
    assert answer.layers == [0, 1]
    assert answer.scores == [-1.0, -2.0, -3.0, -4.0, -5.0, -6.0]
    assert answer.cost_tokens == 77


def test_selectors_that_look_at_nothing(tmp_path: Path) -> None:
    question = Question(layers=12, keep=3, seed=1)
    assert SELECTORS.get("even")().rank(question).layers == [3, 7, 11]
    chosen = SELECTORS.get("random")().rank(question).layers
    assert chosen == SELECTORS.get("random")().rank(question).layers
    assert chosen != SELECTORS.get("random")().rank(Question(layers=12, keep=3, seed=2)).layers
    given = Question(layers=12, keep=2, given=(7, 1))
    assert SELECTORS.get("given")().rank(given).layers == [1, 7]


def without(data: dict, *path: object) -> dict:
    changed = copy.deepcopy(data)
    node = changed
    for key in path[:-1]:
        node = node[key]  # type: ignore[index]
    del node[path[-1]]  # type: ignore[arg-type]
    return changed


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda d: without(d, "mixer"), "lacks the field 'mixer'"),
        (lambda d: without(d, "replaced", 3), r"missing layers \[3\]"),
        (lambda d: without(d, "replaced", 3, "scores", "text"), "layer 3 lack the task 'text'"),
        (lambda d: without(d, "replaced", 3, "scores", "text", "margin"), "lacks the metric 'margin'"),
        (lambda d: {**d, "recal_tasks": []}, "did you mean 'recall_tasks'"),
        (lambda d: {**d, "num_layers": "six"}, "must be int"),
        (lambda d: {**d, "num_layers": 7}, r"missing layers \[6\]"),
    ],
)
def test_scores_that_cannot_be_ranked_say_why(tmp_path: Path, change, message: str) -> None:  # type: ignore[no-untyped-def]
    with pytest.raises(UserError, match=message):
        found = evidence(tmp_path, change(scores_file()))
        SELECTORS.get("halo")().rank(Question(layers=LAYERS, keep=2, evidence=found))


def test_a_nan_is_not_ranked(tmp_path: Path) -> None:
    data = scores_file()
    data["replaced"][1]["scores"]["needles"]["accuracy"] = float("nan")
    with pytest.raises(UserError, match="layer 1, task 'needles': accuracy is nan"):
        SELECTORS.get("halo")().rank(Question(layers=LAYERS, keep=2, evidence=evidence(tmp_path, data)))


def test_what_a_selector_lacks_is_named(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="needs scores"):
        SELECTORS.get("halo")().rank(Question(layers=4, keep=1))
    with pytest.raises(UserError, match="no KL of restored layers"):
        rank(tmp_path, "kl-ls", restored=[])
    with pytest.raises(UserError, match="out of range: the model has 4 layers"):
        Question(layers=4, keep=5)
