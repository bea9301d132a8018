"""The oracle's verdicts: regret against the best judged set, its uncertainty, and the page that tells it."""

from __future__ import annotations

import dataclasses
from itertools import combinations
from pathlib import Path

import numpy as np
import pytest

from halobench.errors import HalobenchError
from halobench.records import ModelCard, RunRecord
from halobench.reports import write_oracle, write_report
from halobench.reports.oracle_page import Study, oracle_page
from halobench.reports.regret import ACCURACY, RECALL, TEXT, Oracle

LAYERS = 5
BEST, GOOD, BAD = (1, 3), (1, 2), (0, 4)
SELECTORS = {"joint": ("joint", BEST), "halo": ("HALO", GOOD), "even": ("even", BAD)}


def value(kept: tuple[int, ...]) -> float:
    """What a set is truly worth: layers 1 and 3 carry the recall, layer 2 a little of it."""
    return -10.0 + 4.0 * (1 in kept) + 4.0 * (3 in kept) + 3.0 * (2 in kept)


def cell(kept: tuple[int, ...], seed: int, noise: float, worth: float = 1.0, world: int = 0) -> dict:
    shift = noise * np.random.default_rng((world, seed, *kept)).normal()
    metrics = []
    for place, length in enumerate((512, 1024)):
        haystacks = np.random.default_rng(place).normal(size=8)  # the same questions for every set
        recall = worth * value(kept) + shift + haystacks
        for metric, samples in (("accuracy", 1 / (1 + np.exp(-recall - 5))), ("answer_logprob", recall)):
            metrics.append({"suite": "niah", "task": "multikey-4", "metric": metric, "length": length})
            metrics[-1] |= {"value": float(samples.mean()), "samples": samples.tolist()}
    text = 2.0 - 0.01 * value(kept) + np.array([0.1, -0.1, 0.0])
    metrics.append({"suite": "ppl", "task": "modern", "metric": "bits_per_byte", "length": 512})
    metrics[-1] |= {"value": float(text.mean()), "samples": text.tolist()}
    return {"kept": list(kept), "seed": seed, "metrics": metrics}


def record(
    noise: float = 0.1,
    teacher: str = "tiny",
    judged: tuple = (BEST, GOOD, BAD),
    worth: float = 1.0,
    world: int = 0,
) -> RunRecord:
    methods = {
        name: {"label": label, "layers": list(kept), "scores": [0.0] * LAYERS, "cost_tokens": 1000, "stability": 0.5}
        for name, (label, kept) in SELECTORS.items()
    }
    cells = [cell(kept, 0, noise, worth, world) for kept in combinations(range(LAYERS), 2)]
    cells += [cell(kept, seed, noise, worth, world) for seed in (1, 2, 3) for kept in judged]
    table = np.eye(3).tolist()
    return RunRecord(
        kind="oracle",
        model=ModelCard(name=teacher, path=teacher, hash="h", layers=LAYERS, parameters=1, teacher=teacher),
        settings={"oracle": {"judges": 3, "leaders": 1, "lengths": [1, 2], "haystacks": 8}},
        details={
            "oracle": {
                "keep": 2, "layers": LAYERS, "tokens": 1000, "methods": methods, "cells": cells,
                "agreement": {"methods": list(methods), "tau": table, "overlap": table},
            }
        },
    )  # fmt: skip


def test_the_best_judged_set_has_no_regret_and_others_what_they_lost() -> None:
    oracle = Oracle(record(noise=0.0), RECALL)
    assert oracle.best == BEST
    assert oracle.regret(BEST).value == pytest.approx(0.0, abs=1e-9)
    assert oracle.regret(GOOD).value == pytest.approx(1.0)
    assert oracle.regret(BAD).value == pytest.approx(8.0)
    assert oracle.regret(BEST).best == 1.0


def test_chance_is_the_mean_over_all_sets() -> None:
    oracle = Oracle(record(noise=0.0), RECALL)
    haystacks = np.mean([np.random.default_rng(place).normal(size=8).mean() for place in (0, 1)])
    mean = np.mean([value(kept) for kept in combinations(range(LAYERS), 2)]) + haystacks
    assert oracle.chance == pytest.approx(mean, abs=1e-4)


def test_less_text_loss_is_better() -> None:
    assert Oracle(record(noise=0.0), TEXT).regret(BAD).value == pytest.approx(0.08)
    assert Oracle(record(noise=0.0), ACCURACY).regret(BAD).value > 0.5


def test_training_noise_widens_the_interval_and_is_measured_between_seeds() -> None:
    calm, wild = Oracle(record(noise=0.01), RECALL), Oracle(record(noise=2.0), RECALL)
    assert calm.noise < 0.05
    assert 0.7 < wild.noise < 4.0
    widths = [o.regret(BAD).high - o.regret(BAD).low for o in (calm, wild)]
    assert widths[1] > 10 * widths[0]


def test_the_same_haystacks_are_drawn_for_every_set() -> None:
    lost = Oracle(record(noise=0.0), RECALL).regret(BAD)
    assert (lost.low, lost.high) == pytest.approx((8.0, 8.0))  # a constant difference has no noise


def test_seed_0_has_no_say_in_who_is_judged_best() -> None:
    made = record(noise=0.0)
    for entry in made.details["oracle"]["cells"]:
        if entry["seed"] == 0 and tuple(entry["kept"]) == BAD:
            entry["metrics"] = cell((1, 3), 0, 0.0)["metrics"]
    assert Oracle(made, RECALL).best == BEST
    assert Oracle(made, RECALL).regret(BAD).value == pytest.approx(8.0)


def test_the_page_names_real_differences_and_keeps_quiet_of_others() -> None:
    page = oracle_page([record(noise=0.05)])
    assert "**joint** loses less than HALO" in page
    assert "**HALO** loses less than even" in page


def test_differences_of_pure_noise_are_seldom_named() -> None:
    named = 0
    for world in range(30):
        page = oracle_page([record(noise=1.0, worth=0.0, world=world)])
        assert "Every other difference between selectors is within noise" in page
        named += "loses less than" in page
    assert named <= 5  # one in twenty by design, and the estimate of the noise is itself noisy


def test_the_page_says_whether_our_selector_does_what_it_is_for() -> None:
    def said(kept: tuple[int, ...], tokens: int) -> str:
        made = record(noise=0.05)
        methods = made.details["oracle"]["methods"]
        methods["kl-ls"] = {**methods["halo"], "label": "KL-LS", "cost_tokens": tokens}
        methods["joint"]["layers"] = list(kept)
        made.details["oracle"]["agreement"] = {
            "methods": list(methods), "tau": np.eye(4).tolist(), "overlap": np.eye(4).tolist()
        }  # fmt: skip
        return next(line for line in oracle_page([made]).splitlines() if "was to lose less" in line)

    assert "Its regret is the lowest" in said(BEST, 20_000) and "which is real. It reads 5% of" in said(BEST, 20_000)
    assert "Its regret is not the lowest" in said(BAD, 1_000) and "100% of KL-LS's" in said(BAD, 1_000)
    assert "was to lose" not in oracle_page([record()])


def test_equal_choices_are_said_to_be_equal_and_never_compared() -> None:
    made = record(noise=0.05)
    made.details["oracle"]["methods"]["even"]["layers"] = list(GOOD)
    page = oracle_page([made])
    assert "HALO = even" in page
    assert "**HALO** loses less than even" not in page


def test_regrets_of_several_teachers_are_averaged() -> None:
    other = record(noise=0.0, teacher="sister")
    other.details["oracle"]["methods"]["halo"]["layers"] = list(BEST)
    study = Study(RECALL, [Oracle(record(noise=0.0), RECALL), Oracle(other, RECALL)])
    assert study.regret("halo") == pytest.approx(0.5)
    page = oracle_page([record(noise=0.0), other])
    assert "### sister" in page
    assert "{1,2} {1,3}" in page


def swapped() -> RunRecord:
    """A second teacher on which two selectors chose each other's sets."""
    made = record(noise=1.0, teacher="sister")
    methods = made.details["oracle"]["methods"]
    methods["joint"]["layers"], methods["halo"]["layers"] = methods["halo"]["layers"], methods["joint"]["layers"]
    return made


def test_teachers_have_training_noise_of_their_own() -> None:
    def spread(*records: RunRecord) -> float:
        study = Study(RECALL, [Oracle(entry, RECALL) for entry in records])
        return float(np.std(study.regrets("halo") - study.regrets("joint")))

    alone, both = spread(record(noise=1.0)), spread(record(noise=1.0), swapped())
    assert 0.5 * alone < both < 0.9 * alone  # the mean of two independent noises, and not their difference


def test_the_best_of_equal_sets_is_not_called_better_than_it_is() -> None:
    judged = tuple(combinations(range(LAYERS), 2))
    values = []
    for world in range(40):
        oracle = Oracle(record(noise=1.0, judged=judged, worth=0.0, world=world), RECALL, resamples=10)
        everywhere = np.mean([oracle.values(kept) for kept in oracle.judged])
        assert float(np.mean(oracle.values(oracle.best))) - everywhere > 0.2  # what luck makes of ten equal sets
        values.append(oracle.top - everywhere)
    assert abs(np.mean(values)) < 0.2


def test_a_choice_that_was_never_judged_is_left_out_and_named() -> None:
    made = record()
    made.details["oracle"]["methods"]["even"]["layers"] = [2, 4]
    page = oracle_page([made])
    assert "a choice of theirs was not judged: even" in page


def test_one_judge_cannot_tell_the_noise() -> None:
    made = record()
    cells = made.details["oracle"]["cells"]
    made.details["oracle"]["cells"] = [entry for entry in cells if entry["seed"] < 2]
    with pytest.raises(HalobenchError, match="noise of training is not known"):
        oracle_page([made])


def test_studies_of_different_kinds_are_not_averaged() -> None:
    other = record(teacher="sister")
    other.settings["oracle"]["haystacks"] = 16
    with pytest.raises(HalobenchError, match="differ in layers, kept layers or settings"):
        oracle_page([record(), other])


def test_a_conversion_that_diverged_is_left_out_and_told() -> None:
    made = record()
    made.details["oracle"]["cells"][4] = {"kept": [1, 2], "seed": 0, "metrics": [], "error": "diverged"}
    page = oracle_page([made])
    assert "1 conversions diverged" in page
    assert len(Oracle(made, RECALL).screened) == 9


def test_what_is_no_oracle_or_not_yet_judged_says_so() -> None:
    with pytest.raises(HalobenchError, match="is no oracle's"):
        Oracle(dataclasses.replace(record(), kind="eval"), RECALL)
    with pytest.raises(HalobenchError, match="no set of tiny has been judged yet"):
        oracle_page([record(judged=())])


def test_the_page_and_its_picture_are_written_also_by_report(tmp_path: Path) -> None:
    folder = tmp_path / "run"
    record().save(folder / "oracle.record.json")
    page, plot = write_report([folder], tmp_path / "out")
    assert page.read_text().startswith("# Which layers should stay softmax")
    assert plot.read_bytes()[:8] == b"\x89PNG\r\n\x1a\n"
    assert write_oracle([record()], tmp_path / "again")[1].read_bytes() == plot.read_bytes()
