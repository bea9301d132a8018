"""Models into records: interrupted work goes on, the estimate and its gate, and what a record says of its reading."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
from typer.testing import CliRunner

from halobench import evaluation
from halobench.cli import app
from halobench.errors import HalobenchError, UserError
from halobench.evaluation import (
    EvalRequest,
    Evaluation,
    check_patience,
    estimate_models,
    evaluate_model,
    evaluate_models,
)
from halobench.records import read_record
from halobench.tasks import schedule
from halobench.tasks.estimate import Estimate, Speed, Work
from tests.conftest import make_pico

REQUEST = EvalRequest(suites=("niah", "grid"), lengths=(400, 600), limit=5)  # 20 haystacks


@pytest.fixture(autouse=True)
def own_cache(tmp_path_factory, monkeypatch) -> None:  # type: ignore[no-untyped-def]
    monkeypatch.setenv("HALOBENCH_CACHE", str(tmp_path_factory.getbasetemp() / "cache"))


@pytest.fixture(autouse=True)
def small_groups(monkeypatch) -> None:  # type: ignore[no-untyped-def]
    """Three haystacks of 400 tokens, two of 600."""
    monkeypatch.setattr(schedule, "GROUP_TOKENS", 1200)


@pytest.fixture(scope="module")
def models(tmp_path_factory, bpe) -> list[str]:  # type: ignore[no-untyped-def]
    """Two pico models on disk that differ in their weights."""
    names = []
    for seed in (0, 1):
        folder = tmp_path_factory.mktemp("models") / f"pico{seed}"
        make_pico(vocab_size=len(bpe), num_hidden_layers=1, seed=seed).save_pretrained(folder)
        bpe.save_pretrained(folder)
        names.append(str(folder))
    return names


class Interrupted:
    """Interrupts scoring at the start of the `group`-th group, and counts the haystacks that are scored."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, group: int | None = None) -> None:
        from halobench.tasks import retrieval

        self.group, self.groups, self.haystacks, self.real = group, 0, 0, retrieval.score_each
        monkeypatch.setattr(retrieval, "score_each", self)

    def __call__(self, model, haystacks, **more):  # type: ignore[no-untyped-def]
        self.groups += 1
        if self.groups == self.group:
            raise KeyboardInterrupt
        self.haystacks += len(haystacks)
        return self.real(model, haystacks, **more)


def interrupt(name: str, out: Path, group: int, request: EvalRequest = REQUEST) -> None:
    with pytest.MonkeyPatch.context() as patch:
        Interrupted(patch, group)
        with pytest.raises(KeyboardInterrupt):
            evaluate_model(name, out, request, "cpu")


def haystacks_read(name: str, out: Path, request: EvalRequest = REQUEST) -> int:
    with pytest.MonkeyPatch.context() as patch:
        seen = Interrupted(patch)
        evaluate_model(name, out, request, "cpu")
    return seen.haystacks


def test_an_interrupted_evaluation_reads_only_what_is_missing_and_ends_the_same(models, tmp_path, capsys) -> None:  # type: ignore[no-untyped-def]
    whole = evaluate_model(models[0], tmp_path / "whole", REQUEST, "cpu")
    out = tmp_path / "out"
    interrupt(models[0], out, group=7)  # needles: 3 + 2, then 2 + 2 + 1; the grid: 3, and here it ends
    assert not list(out.glob("*.json")) and list(out.glob(".*.samples/*.jsonl"))
    assert haystacks_read(models[0], out) == 7
    assert "suite niah: done before" in capsys.readouterr().err
    record = read_record(next(out.glob("*.eval.record.json")))
    assert record.metrics == whole.metrics
    plain = {"seconds": 0, "peak_bytes": 0}
    rows, expected = record.details["reading"]["tasks"], whole.details["reading"]["tasks"]
    assert [row | plain for row in rows] == [row | plain for row in expected]
    assert [row.tokens for row in record.ledger] == [row.tokens for row in whole.ledger]
    assert not list(out.glob(".*.samples/suites.json"))


@pytest.mark.parametrize("change", [{"seed": 1}, {"lengths": (401, 601)}])
def test_other_settings_use_nothing_of_an_interrupted_evaluation(change, models, tmp_path) -> None:  # type: ignore[no-untyped-def]
    interrupt(models[0], tmp_path, group=4)
    other = replace(REQUEST, **change)
    assert haystacks_read(models[0], tmp_path, other) == 20


def test_another_model_uses_nothing_of_an_interrupted_evaluation(models, tmp_path, monkeypatch) -> None:  # type: ignore[no-untyped-def]
    monkeypatch.setattr(evaluation, "slug", lambda card: "same")
    interrupt(models[0], tmp_path, group=7)
    assert haystacks_read(models[1], tmp_path) == 20


def test_a_record_says_what_its_numbers_were_read_from(models, tmp_path) -> None:  # type: ignore[no-untyped-def]
    record = evaluate_model(models[0], tmp_path, REQUEST, "cpu")
    reading = record.details["reading"]
    first = reading["tasks"][0]
    assert (first["suite"], first["task"], first["length"], first["samples"], first["questions"]) == (
        "niah", "multikey-4", 400, 5, 20,
    )  # fmt: skip
    assert first["stopped"] == "count" and first["prompt_tokens"] == 400
    total = reading["total"]
    assert total["truncated"] == 0 and record.status == "ok"
    assert total["tokens"] == sum(row.tokens for row in record.ledger)
    assert total["tokens_plain"] == sum(row["tokens_plain"] for row in reading["tasks"]) > 4 * total["tokens"]
    assert min(reading["peak_bytes"].values()) > 2**20


def only(suite: str, **more) -> EvalRequest:  # type: ignore[no-untyped-def]
    return replace(REQUEST, suites=(suite,), **more)


def values(record, suite: str) -> list[float]:  # type: ignore[no-untyped-def]
    return [m.value for m in record.metrics if m.suite == suite]


def test_another_suite_leaves_the_finished_ones_and_their_samples(models, tmp_path) -> None:  # type: ignore[no-untyped-def]
    interrupt(models[0], tmp_path, group=7)  # all needles, and three haystacks of the grid
    first = evaluate_model(models[0], tmp_path, only("kv", lengths=(400,)), "cpu")
    assert {m.suite for m in first.metrics} == {"kv", "niah"}
    assert haystacks_read(models[0], tmp_path, only("grid")) == 7
    record = read_record(next(tmp_path.glob("*.eval.record.json")))
    assert {m.suite for m in record.metrics} == {"kv", "niah", "grid"} == set(record.settings)
    assert len({(m.suite, m.task, m.metric, m.length) for m in record.metrics}) == len(record.metrics)
    assert values(record, "kv") == values(first, "kv") and values(record, "niah") == values(first, "niah")


def test_what_is_finished_is_returned_and_its_record_not_touched(models, tmp_path) -> None:  # type: ignore[no-untyped-def]
    first = evaluate_model(models[0], tmp_path, REQUEST, "cpu")
    (path,) = tmp_path.glob("*.eval.record.json")
    written = path.stat().st_mtime_ns
    assert haystacks_read(models[0], tmp_path) == haystacks_read(models[0], tmp_path, only("grid")) == 0
    assert path.stat().st_mtime_ns == written and evaluate_model(models[0], tmp_path, REQUEST, "cpu") == first


def test_another_length_or_more_samples_read_only_what_is_new(models, tmp_path) -> None:  # type: ignore[no-untyped-def]
    evaluate_model(models[0], tmp_path, only("niah", lengths=(400,)), "cpu")
    assert haystacks_read(models[0], tmp_path, only("niah", lengths=(400, 500))) == 5
    assert haystacks_read(models[0], tmp_path, only("niah", lengths=(400, 500), limit=7)) == 4
    fresh = evaluate_model(models[0], tmp_path / "fresh", only("niah", lengths=(400, 500), limit=7), "cpu")
    assert read_record(next(tmp_path.glob("*.eval.record.json"))).metrics == fresh.metrics


@pytest.mark.parametrize("part", ["device", "dtype", "attention", "tokenizer", "versions", "texts"])
def test_what_was_measured_in_another_way_is_measured_again_and_the_record_kept(part, models, tmp_path, capsys) -> None:  # type: ignore[no-untyped-def]
    request = replace(REQUEST, lengths=(400,), limit=2)
    evaluate_model(models[0], tmp_path, request, "cpu")
    (path,) = tmp_path.glob("*.eval.record.json")
    data = json.loads(path.read_text())
    data["details"]["identity"][part] = "another"
    path.write_text(json.dumps(data))
    rest = tmp_path.joinpath(f".{path.name}.samples")
    for journal in rest.iterdir():
        journal.unlink()
    assert haystacks_read(models[0], tmp_path, replace(request, suites=("niah",))) == 2
    assert {m.suite for m in read_record(path).metrics} == {"niah"}
    (aside,) = set(tmp_path.glob("*.eval.record.json")) - {path}
    assert {m.suite for m in read_record(aside).metrics} == {"niah", "grid"}
    assert f"suite grid, measured otherwise; it is kept as {aside.name}" in capsys.readouterr().err


def test_the_kernels_that_ran_before_an_interruption_stay_in_the_record(models, tmp_path, monkeypatch) -> None:  # type: ignore[no-untyped-def]
    from halobench.surgery import hybrid

    monkeypatch.setattr(hybrid, "backends_of", lambda model: {"lightning": "fla"})
    interrupt(models[0], tmp_path, group=7)
    monkeypatch.setattr(hybrid, "backends_of", lambda model: {})
    assert evaluate_model(models[0], tmp_path, REQUEST, "cpu").backends["mixer lightning"] == "fla"
    monkeypatch.setattr(hybrid, "backends_of", lambda model: {"lightning": "torch"})
    record = evaluate_model(models[0], tmp_path, replace(REQUEST, suites=("grid",), limit=6), "cpu")
    assert record.details["backends"]["grid"]["mixer lightning"] == "fla, torch"
    assert record.details["backends"]["niah"]["mixer lightning"] == "fla"


@pytest.mark.parametrize(("suite", "pair"), [("continuation", "csr"), ("lm:tiny_continuation", "lm")])
def test_the_metrics_of_an_lm_eval_suite_are_found_again_in_the_record(suite, pair, models, tmp_path, capsys) -> None:  # type: ignore[no-untyped-def]
    first = evaluate_model(models[0], tmp_path, only(suite, limit=3), "cpu")
    assert first.details["of"] == {suite: [[pair, "tiny_continuation"]]}
    again = evaluate_model(models[0], tmp_path, only(suite, limit=3), "cpu")
    assert f"suite {suite}: done before" in capsys.readouterr().err and again == first
    both = evaluate_model(models[0], tmp_path, only("niah", lengths=(400,), limit=2), "cpu")
    assert values(both, pair) == values(first, pair) and "lengths" not in both.settings[suite]


def test_two_suites_that_share_a_task_give_its_rows_once(models, tmp_path) -> None:  # type: ignore[no-untyped-def]
    evaluate_model(models[0], tmp_path, only("csr", limit=3, data_dir=tmp_path), "cpu")
    record = evaluate_model(models[0], tmp_path, only("continuation", limit=3), "cpu")
    assert set(record.settings) == {"continuation"} and len({m.metric for m in record.metrics}) == len(record.metrics)
    assert len(list(tmp_path.glob("*.eval.record.json"))) == 2  # csr as a whole is kept beside it


def test_what_ran_out_of_memory_is_in_the_record_and_tried_again(models, tmp_path, monkeypatch) -> None:  # type: ignore[no-untyped-def]
    from halobench.tasks import retrieval

    real = retrieval.score_each

    def small(model, haystacks, **more):  # type: ignore[no-untyped-def]
        if haystacks[0].length > 500:
            raise RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 99 bytes")
        return real(model, haystacks, **more)

    monkeypatch.setattr(retrieval, "score_each", small)
    record = evaluate_model(models[0], tmp_path, only("niah"), "cpu")
    row = {"suite": "niah", "task": "multikey-4", "length": 600, "error": "out of memory"}
    assert record.status == "ok" and record.details["failed"] == [row] and {m.length for m in record.metrics} == {400}
    shown = CliRunner().invoke(
        app, ["eval", models[0], "--suite", "niah", "--lengths", "400,600", "--limit", "5", "-o", str(tmp_path)]
    )
    assert shown.exit_code == 0 and "niah/multikey-4 @600" in shown.output and "out of memory" in shown.output
    monkeypatch.undo()
    monkeypatch.setattr(schedule, "GROUP_TOKENS", 1200)
    assert haystacks_read(models[0], tmp_path, only("niah")) == 5
    assert "failed" not in read_record(next(tmp_path.glob("*.eval.record.json"))).details


def test_one_model_is_in_memory_at_a_time(models, tmp_path, monkeypatch) -> None:  # type: ignore[no-untyped-def]
    import weakref

    loaded, alive = [], []
    real = evaluation.load

    def load(name, **more):  # type: ignore[no-untyped-def]
        alive.append(sum(ref() is not None for ref in loaded))
        model, tokenizer = real(name, **more)
        loaded.append(weakref.ref(model))
        return model, tokenizer

    monkeypatch.setattr(evaluation, "load", load)
    evaluate_models(models, tmp_path, only("continuation", limit=2), "cpu")
    assert alive == [0, 0, 0, 0]  # one after another for the estimates, and again for their turns


def test_what_precision_does_not_end_is_said_once(capsys) -> None:  # type: ignore[no-untyped-def]
    replace(REQUEST, suites=("csr", "niah", "ppl"), precision=0.1).check()
    assert "measured whole without it: csr, ppl" in capsys.readouterr().err
    REQUEST.check()
    assert capsys.readouterr().err == ""


def test_one_task_of_a_suite_is_found_again_in_its_record(models, tmp_path, capsys) -> None:  # type: ignore[no-untyped-def]
    request = EvalRequest(suites=("ruler:niah_single_1",), lengths=(500,), limit=2)
    first = evaluate_model(models[0], tmp_path, request, "cpu")
    again = evaluate_model(models[0], tmp_path, request, "cpu")
    assert "done before" in capsys.readouterr().err and again.metrics == first.metrics


def test_a_prompt_that_was_not_read_whole_spoils_the_record(models, tmp_path, monkeypatch) -> None:  # type: ignore[no-untyped-def]
    from halobench.tasks import scoring

    real = scoring.prefill
    monkeypatch.setattr(scoring, "prefill", lambda model, ids, *rest, **more: real(model, ids[:, 9:], *rest, **more))
    request = replace(REQUEST, lengths=(400,))
    record = evaluate_model(models[0], tmp_path, request, "cpu")
    assert record.status == "error" and "85 prompts were not read whole" in str(record.error)
    shown = CliRunner().invoke(
        app, ["eval", models[0], "--suite", "niah, grid", "--lengths", "400", "--limit", "5", "-o", str(tmp_path)]
    )
    assert shown.exit_code == 1 and "85 prompts were not read whole" in shown.output
    assert Evaluation(models[0], tmp_path, request, "cpu").missing() == ["niah", "grid"]


def test_an_early_stop_is_in_the_record_and_another_precision_is_another_measurement(models, tmp_path) -> None:  # type: ignore[no-untyped-def]
    request = EvalRequest(suites=("niah",), lengths=(300,), limit=30, precision=0.2)
    record = evaluate_model(models[0], tmp_path, request, "cpu")
    (row,) = record.details["reading"]["tasks"]
    assert row["stopped"] == "precision" and row["samples"] < 30
    assert record.settings["niah"]["precision"] == 0.2
    assert haystacks_read(models[0], tmp_path, replace(request, precision=None)) == 30 - row["samples"]


def test_a_full_disk_is_one_line_and_nothing_is_lost(models, tmp_path, monkeypatch) -> None:  # type: ignore[no-untyped-def]
    import errno

    interrupt(models[0], tmp_path, group=2)
    real = Path.open

    def full(self: Path, *args, **more):  # type: ignore[no-untyped-def]
        if self.suffix == ".jsonl" and args == ("a",):
            raise OSError(errno.ENOSPC, "No space left on device")
        return real(self, *args, **more)

    monkeypatch.setattr(Path, "open", full)
    with pytest.raises(HalobenchError, match="no space left to write .*jsonl; free some room and run again to resume"):
        evaluate_model(models[0], tmp_path, REQUEST, "cpu")
    monkeypatch.undo()
    assert haystacks_read(models[0], tmp_path) == 17


def test_a_folder_that_cannot_be_is_said_before_anything_is_read(models, tmp_path) -> None:  # type: ignore[no-untyped-def]
    (tmp_path / "file").touch()
    with pytest.MonkeyPatch.context() as patch:
        seen = Interrupted(patch)
        with pytest.raises(HalobenchError, match="file/x cannot be written"):
            evaluate_model(models[0], tmp_path / "file" / "x", REQUEST, "cpu")
    assert seen.haystacks == 0


def test_numbers_of_other_settings_are_replaced_with_a_word(models, tmp_path, capsys) -> None:  # type: ignore[no-untyped-def]
    small = EvalRequest(suites=("niah",), lengths=(256,), limit=1)
    for request, said in ((small, False), (small, False), (replace(small, limit=2), True)):
        evaluate_model(models[0], tmp_path, request, "cpu")
        assert ("suite niah was measured with other settings before" in capsys.readouterr().err) == said


def test_a_model_without_a_tokenizer_of_its_own_is_refused(tmp_path, pico, bpe) -> None:  # type: ignore[no-untyped-def]
    pico(vocab_size=len(bpe)).save_pretrained(tmp_path / "bare")
    with pytest.raises(UserError, match="bare has no tokenizer"):
        evaluate_model(str(tmp_path / "bare"), tmp_path / "out", REQUEST, "cpu")
    pico(vocab_size=len(bpe) // 2).save_pretrained(tmp_path / "small")
    bpe.save_pretrained(tmp_path / "small")
    with pytest.raises(UserError, match="the tokenizer has token ids up to"):
        evaluate_model(str(tmp_path / "small"), tmp_path / "out", REQUEST, "cpu")


def test_what_is_wrong_is_said_before_any_model_is_loaded() -> None:
    for change, message in (
        ({"precision": 0.5}, "between 0 and 0.5"),
        ({"limit": 0}, "leaves nothing to measure"),
        ({"seed": -1}, "--seed -1 is negative; give 0 or more"),
        ({"seed": 2**32}, "too large; give less than 2\\^32"),
        ({"suites": ("grit",)}, "did you mean 'grid'"),
    ):
        with pytest.raises(UserError, match=message):
            replace(REQUEST, **change).check()  # type: ignore[arg-type]


def test_the_estimate_counts_what_is_missing_and_writes_nothing(models, tmp_path, capsys) -> None:  # type: ignore[no-untyped-def]
    (fresh,) = estimate_models(models[:1], tmp_path, REQUEST, "cpu")
    assert not list(tmp_path.iterdir()) and fresh.seconds > 0
    interrupt(models[0], tmp_path, group=7)
    (rest,) = estimate_models(models[:1], tmp_path, REQUEST, "cpu")
    assert [(w.suite, w.length, w.known) for w in rest.work] == [("grid", 400, 3), ("grid", 600, 0)]
    record = evaluate_model(models[0], tmp_path, REQUEST, "cpu")
    assert fresh.tokens == pytest.approx(record.details["reading"]["total"]["tokens"], rel=0.03)
    assert "3 of 5 done before" in capsys.readouterr().err


def test_more_than_an_hour_is_refused_with_the_way_out(models, tmp_path, monkeypatch) -> None:  # type: ignore[no-untyped-def]
    slow = Estimate(
        model="m",
        work=[Work(suite="niah", task="multikey-4", length=400, samples=5, tokens=2000)],
        speed=Speed(base=2.0, slope=0.0),
    )
    with pytest.raises(UserError, match=r"about 1h06m \(2K tokens\); add --yes .*--limit.*--precision.*--lengths"):
        check_patience([slow])
    check_patience([replace(slow, speed=Speed(base=1.0, slope=0.0))])


def test_the_command_asks_once_more_only_by_an_option(models, tmp_path, monkeypatch) -> None:  # type: ignore[no-untyped-def]
    monkeypatch.setattr(evaluation, "PATIENCE", 0.0)
    command = ["eval", models[0], "--suite", "niah", "--lengths", "300", "--limit", "2", "-o", str(tmp_path)]
    refused = CliRunner().invoke(app, command)
    assert isinstance(refused.exception, UserError) and "--yes" in str(refused.exception)
    assert not list(tmp_path.iterdir())
    told = CliRunner().invoke(app, [*command, "--estimate", "--json"])
    (estimate,) = json.loads(told.stdout)
    assert estimate["tokens"] > 600 and not list(tmp_path.iterdir())
    done = CliRunner().invoke(app, [*command, "--yes", "--json"])
    assert json.loads(done.stdout)[0]["details"]["reading"]["total"]["samples"] == 2
