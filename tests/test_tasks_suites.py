"""Suites by name: what runs, what comes out, and what is refused."""

import pytest

from halobench.config import from_dict, to_dict
from halobench.errors import UserError
from halobench.records import Metric
from halobench.tasks.suites import SUITES, SuiteOutcome, evaluate, parse_suites


@pytest.fixture(autouse=True)
def own_cache(tmp_path_factory, monkeypatch) -> None:  # type: ignore[no-untyped-def]
    monkeypatch.setenv("HALOBENCH_CACHE", str(tmp_path_factory.getbasetemp() / "cache"))


def test_all_suites_run_and_are_handed_over_one_by_one(reader, bpe) -> None:  # type: ignore[no-untyped-def]
    seen: list[SuiteOutcome] = []
    outcome = evaluate(reader, bpe, ["csr", "niah", "ppl"], [300, 260], 2, seed=1, on_suite=seen.append)
    assert [one.suite for one in seen] == ["csr", "niah", "ppl"] and outcome.suites == seen
    assert {(m.suite, m.length) for m in outcome.metrics} == {
        ("csr", None), ("niah", 260), ("niah", 300), ("ppl", 260), ("ppl", 300),
    }  # fmt: skip
    assert outcome.tokens == sum(one.tokens for one in seen) > 0 and outcome.seconds > 0
    assert outcome.settings["lengths"] == [260, 300] and outcome.settings["seed"] == 1
    for metric in outcome.metrics:
        assert from_dict(Metric, to_dict(metric), "metric") == metric


def test_the_same_seed_gives_the_same_numbers(reader, bpe) -> None:  # type: ignore[no-untyped-def]
    one, two = (evaluate(reader, bpe, ["niah"], [260], 2, seed=5).metrics for _ in range(2))
    assert one == two


def test_names_are_checked_before_work_starts() -> None:
    assert parse_suites(["csr", "lm:arc_easy", "csr"]) == ["csr", "lm:arc_easy"]
    with pytest.raises(UserError, match="unknown suite 'nia'; did you mean 'niah'"):
        parse_suites(["nia"])
    with pytest.raises(UserError, match="unknown suite 'lm:'"):
        parse_suites(["lm:"])


def test_lengths_are_asked_for_where_they_matter(reader, bpe) -> None:  # type: ignore[no-untyped-def]
    with pytest.raises(UserError, match="need context lengths"):
        evaluate(reader, bpe, ["niah"], [], 2)


def test_every_registered_suite_can_be_had() -> None:
    for name in SUITES.names():
        assert callable(SUITES.get(name))
