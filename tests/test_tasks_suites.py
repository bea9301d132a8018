"""Suites by name: what runs, what comes out, what is refused, and what is known of the work beforehand."""

from __future__ import annotations

import pytest

from halobench.config import from_dict, to_dict
from halobench.errors import HalobenchError, UserError
from halobench.records import Metric
from halobench.tasks.estimate import Estimate, Speed, Work, measure_speed
from halobench.tasks.journal import Journals
from halobench.tasks.suites import (
    SUITES,
    Request,
    SuiteOutcome,
    parse_suites,
    probe_length,
    resolve_suite,
    run_suite,
    settings_of,
    work_of,
)


@pytest.fixture(autouse=True)
def own_cache(tmp_path_factory, monkeypatch) -> None:  # type: ignore[no-untyped-def]
    monkeypatch.setenv("HALOBENCH_CACHE", str(tmp_path_factory.getbasetemp() / "cache"))


def ask(reader, bpe, lengths=(260, 300), limit=2, **more) -> Request:  # type: ignore[no-untyped-def]
    return Request(model=reader, tokenizer=bpe, lengths=list(lengths), limit=limit, **more)


@pytest.mark.parametrize(
    ("suite", "expected"),
    [
        ("niah", {("niah", "multikey-4", 260), ("niah", "multikey-4", 300)}),
        ("kv", {("kv", "keyvalue", 260), ("kv", "keyvalue", 300)}),
        ("ppl", {("ppl", "modern", 260), ("ppl", "novels", 260), ("ppl", "novels", 300)}),
        ("ruler:niah_single_1", {("ruler", "niah_single_1", 460), ("ruler", "niah_single_1", 500)}),
    ],
)
def test_a_suite_measures_its_tasks_at_every_length(suite, expected, reader, bpe) -> None:  # type: ignore[no-untyped-def]
    lengths = sorted({length for _, _, length in expected})
    outcome = run_suite(suite, ask(reader, bpe, lengths, seed=1))
    assert {(m.suite, m.task, m.length) for m in outcome.metrics} == expected
    assert outcome.tokens > 0 and outcome.seconds > 0 and outcome.peak_bytes > 2**20
    for metric in outcome.metrics:
        assert from_dict(Metric, to_dict(metric), "metric") == metric
    if suite != "ppl":
        assert {(r.suite, r.task, r.length) for r in outcome.readings} == expected
        assert sum(r.tokens for r in outcome.readings) == outcome.tokens
        assert all(r.truncated == 0 and r.prompt_tokens <= r.length for r in outcome.readings)
        assert from_dict(SuiteOutcome, to_dict(outcome), "outcome") == outcome


def test_the_whole_of_ruler_says_what_it_leaves_out(reader, bpe, capsys) -> None:  # type: ignore[no-untyped-def]
    outcome = run_suite("ruler", ask(reader, bpe, lengths=[450], limit=1))
    told = capsys.readouterr().err
    assert "left out qa_1" in told and "left out qa_2" in told
    assert {"qa_1", "qa_2"} <= set(outcome.details["left_out"])
    scores = [m for m in outcome.metrics if m.metric == "score"]
    assert {m.task for m in scores} == {r.task for r in outcome.readings} and "niah_single_1" in {
        m.task for m in scores
    }
    short = [name for name in outcome.details["left_out"] if name.endswith(" at 450")]
    assert short and not {name.removesuffix(" at 450") for name in short} & {m.task for m in scores}


def test_the_same_seed_gives_the_same_numbers(reader, bpe) -> None:  # type: ignore[no-untyped-def]
    one, two, other = (run_suite("niah", ask(reader, bpe, [260], seed=seed)).metrics for seed in (5, 5, 6))
    assert one == two != other


def test_names_are_checked_before_work_starts() -> None:
    assert parse_suites(["csr", "lm:arc_easy", "csr", "ruler:vt"]) == ["csr", "lm:arc_easy", "ruler:vt"]
    for name, message in {
        "nia": "unknown suite 'nia'; did you mean 'niah'",
        "lm:": "unknown suite 'lm:'",
        "ruler:vtt": "unknown task of suite ruler 'vtt'; did you mean 'vt'",
        "ppl:novels": "ppl is run as a whole",
    }.items():
        with pytest.raises(UserError, match=message):
            parse_suites([name])
    with pytest.raises(UserError, match="measure ruler:vt twice"):
        parse_suites(["ruler", "ruler:vt"])
    with pytest.raises(UserError, match="csr and continuation measure tiny_continuation twice"):
        parse_suites(["csr", "niah", "continuation"])
    assert parse_suites(["csr", "csr-small", "lm:piqa"])  # told apart by the suite's name


@pytest.mark.parametrize("suite", ["niah", "grid", "ruler", "ppl"])
def test_lengths_are_asked_for_where_they_matter(suite, reader, bpe) -> None:  # type: ignore[no-untyped-def]
    with pytest.raises(UserError, match=f"suite {suite} needs context lengths"):
        run_suite(suite, ask(reader, bpe, []))


def test_a_window_shorter_than_the_prompt_is_refused_and_not_cut(pico, bpe) -> None:  # type: ignore[no-untyped-def]
    model = pico("gpt2", vocab_size=len(bpe), max_position_embeddings=128)
    for work in (run_suite, work_of):
        with pytest.raises(UserError, match="table of 128 positions and cannot read 300 tokens"):
            work("niah", ask(model, bpe))


def test_a_broken_model_names_the_task_and_the_length(reader, bpe) -> None:  # type: ignore[no-untyped-def]
    import torch

    with torch.no_grad():
        reader.lm_head.weight[5] = float("nan")
    with pytest.raises(HalobenchError, match="niah/multikey-4 at 260 tokens: the model's log-likelihoods"):
        run_suite("niah", ask(reader, bpe))


def test_the_novels_are_the_same_text_at_every_length(reader, bpe, monkeypatch) -> None:  # type: ignore[no-untyped-def]
    from halobench.tasks import perplexity

    read: dict[int, list[str]] = {}
    real = perplexity._first_rounds

    def rounds(windows, most):  # type: ignore[no-untyped-def]
        kept = real(windows, most)
        by_novel: dict[int, list[int]] = {}
        for window in sorted(kept, key=lambda w: (w.document, w.place)):
            by_novel.setdefault(window.document, []).extend(window.ids[1:].tolist())
        read.setdefault(len(kept[0].ids) - 1, []).append(str(by_novel))
        return kept

    monkeypatch.setattr(perplexity, "_first_rounds", rounds)
    metrics = run_suite("ppl", ask(reader, bpe, [200, 700, 2000], limit=1)).metrics
    novels = [m for m in metrics if m.task == "novels"]
    assert [(m.length, m.n) for m in novels] == [(200, 4), (700, 4), (2000, 4)]
    assert read[200][1] == read[700][0] == read[2000][0] and len(read[200]) == 2


def test_a_window_longer_than_a_novel_is_left_out_and_said(reader, bpe, capsys) -> None:  # type: ignore[no-untyped-def]
    work = work_of("ppl", ask(reader, bpe, [300, 200_000], limit=1))
    assert [(w.task, w.length) for w in work] == [("modern", 300), ("novels", 300)]
    outcome = run_suite("ppl", ask(reader, bpe, [300, 200_000], limit=1))
    assert {(m.task, m.length) for m in outcome.metrics} == {("modern", 300), ("novels", 300)}
    assert list(outcome.details["left_out"]) == ["novels at 200000"]
    assert "left out novels at 200000: the shortest novel has" in capsys.readouterr().err
    with pytest.raises(UserError, match="no text of suite ppl is as long as 200000"):
        run_suite("ppl", ask(reader, bpe, [200_000], limit=1))


def test_what_runs_out_of_memory_is_noted_and_the_rest_is_measured(reader, bpe, monkeypatch, capsys) -> None:  # type: ignore[no-untyped-def]
    import torch

    from halobench.tasks import scoring

    real = scoring.prefill

    def prefill(model, ids, *rest, **more):  # type: ignore[no-untyped-def]
        if ids.shape[1] > 280:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return real(model, ids, *rest, **more)

    monkeypatch.setattr(scoring, "prefill", prefill)
    outcome = run_suite("niah", ask(reader, bpe, [260, 400]))
    assert {m.length for m in outcome.metrics} == {260}
    assert to_dict(outcome)["failed"] == [
        {"suite": "niah", "task": "multikey-4", "length": 400, "error": "out of memory"}
    ]
    assert "niah/multikey-4 at 400: out of memory; going on" in capsys.readouterr().err


def test_lengths_beyond_the_models_window_are_said_and_read_whole(pico, bpe, capsys) -> None:  # type: ignore[no-untyped-def]
    model = pico(vocab_size=len(bpe), max_position_embeddings=280)
    outcome = run_suite("niah", ask(model, bpe, [260, 300], limit=1))
    assert outcome.details["beyond_window"] == {"window": 280, "lengths": [300]}
    assert "300: beyond the model's window of 280 tokens; prompts are read whole" in capsys.readouterr().err
    assert [(r.prompt_tokens, r.truncated) for r in outcome.readings] == [(260, 0), (300, 0)]


@pytest.mark.parametrize(("suite", "parts"), [("ppl", 3), ("continuation", 1)])
def test_parts_that_were_finished_are_not_measured_again(suite, parts, reader, bpe, tmp_path, capsys) -> None:  # type: ignore[no-untyped-def]
    request = ask(reader, bpe, journals=Journals(folder=tmp_path, identity={"model": "a"}))
    first = run_suite(suite, request)
    assert len(list(tmp_path.glob("*.json"))) == parts
    (lost := sorted(tmp_path.glob("*.json"))[0]).unlink()
    calls = []
    hook = reader.register_forward_pre_hook(lambda *_: calls.append(1))
    again = run_suite(suite, request)
    assert calls and lost.exists() and again.metrics == first.metrics and again.tokens == first.tokens
    calls.clear()
    whole = run_suite(suite, request)
    hook.remove()
    assert not calls and whole.metrics == first.metrics and whole.details == first.details
    assert whole.tokens == first.tokens and "done before, taken as it is" in capsys.readouterr().err
    assert sum(row.missing or 0 for row in work_of(suite, request)) == 0


def test_a_setting_is_noted_where_it_matters(tmp_path) -> None:  # type: ignore[no-untyped-def]
    given = {"lengths": [512], "limit": 3, "data_dir": tmp_path, "seed": 0, "precision": 0.1}
    taken = {name: set(settings_of(name, **given)) - {"limit", "seed", "version"} for name in SUITES.names()}
    assert taken["niah"] == {"lengths", "precision"} and taken["ppl"] == {"lengths"} and taken["continuation"] == set()
    assert taken["csr"] == {"data_dir", "data"} and taken["ruler"] == {"lengths", "precision", "data_dir", "data"}


def test_other_rows_in_a_data_file_are_another_setting(tmp_path) -> None:  # type: ignore[no-untyped-def]
    def settings(name: str) -> dict:
        return settings_of(name, lengths=[512], limit=None, data_dir=tmp_path, seed=0, precision=None)["data"]

    found = []
    for content in (b"one", b"another"):
        (tmp_path / "piqa.validation.jsonl.gz").write_bytes(content)
        (tmp_path / "dev-v2.0.json").write_bytes(content)
        found += [settings("csr"), settings("ruler")]
    assert [set(data) for data in found] == [{"piqa"}, {"qa_1"}] * 2
    assert found[0] != found[2] and found[1] != found[3]


def test_every_registered_suite_can_be_had() -> None:
    for name in SUITES.names():
        assert callable(resolve_suite(name))


def test_a_plain_function_is_a_suite_of_which_nothing_is_known_beforehand(reader, bpe, monkeypatch) -> None:  # type: ignore[no-untyped-def]
    metric = Metric(suite="words", task="all", metric="count", value=3.0, n=1)
    monkeypatch.setattr(SUITES, "_entries", {**SUITES._entries, "words": lambda request: [metric]})
    assert run_suite("words", ask(reader, bpe, [])).metrics == [metric]
    (work,) = work_of("words", ask(reader, bpe, []))
    assert work.tokens is None


@pytest.mark.parametrize("suite", ["niah", "kv", "grid", "ppl"])
def test_the_tokens_of_the_estimate_are_those_that_are_read(suite, reader, bpe) -> None:  # type: ignore[no-untyped-def]
    request = ask(reader, bpe, [500, 700], limit=3)
    assert sum(w.tokens or 0 for w in work_of(suite, request)) == pytest.approx(
        run_suite(suite, request).tokens, rel=0.05
    )


def test_the_tokens_of_local_rows_are_known_roughly_and_of_the_hubs_not(reader, bpe, tmp_path) -> None:  # type: ignore[no-untyped-def]
    request = ask(reader, bpe, [], limit=20, data_dir=tmp_path)
    (offline,) = work_of("csr", request)  # what the folder lacks is left out
    assert offline.tokens == pytest.approx(run_suite("csr", request).tokens, rel=0.35)
    hub = work_of("csr", ask(reader, bpe, []))
    assert hub[0].tokens is not None and {row.tokens for row in hub[1:]} == {None} and len(hub) > 5


def test_time_is_carried_on_from_two_lengths_to_any_other(monkeypatch, reader) -> None:  # type: ignore[no-untyped-def]
    from halobench.tasks import estimate

    monkeypatch.setattr(estimate, "_time_prefill", lambda model, length, device: length * (1e-3 + 1e-6 * length))
    speed = measure_speed(reader, 100_000)
    assert speed.seconds(3 * 65_536, 65_536) == pytest.approx(3 * 65_536 * (1e-3 + 65_536e-6))
    assert measure_speed(reader, 300).slope == 0.0


def test_answers_are_timed_a_token_at_a_time(monkeypatch, reader) -> None:  # type: ignore[no-untyped-def]
    from halobench.tasks import estimate

    monkeypatch.setattr(estimate, "_time_prefill", lambda model, length, device: length * (1e-3 + 1e-6 * length))
    monkeypatch.setattr(estimate, "_time_answer", lambda model, length, device: [0.3, 0.1, 0.05, 0.05, 0.06])
    assert measure_speed(reader, 4096).step == 0.0
    speed = measure_speed(reader, 4096, steps=True)
    assert speed.seconds(0, 2000, 100, 4) == pytest.approx(100 * (0.05 + 2 * 2000e-6) + 4 * 0.3)
    work = Work(suite="ruler", task="vt", length=2000, samples=10, tokens=20_000, known=5, answers=4, steps=200)
    prefill = 10_000 * (1e-3 + 2e-3)
    assert Estimate(model="m", work=[work], speed=speed).seconds == pytest.approx(
        prefill + 100 * (0.05 + 4e-3) + 2 * 0.3
    )


def test_a_step_is_timed_on_the_model_within_its_positions(pico, bpe) -> None:  # type: ignore[no-untyped-def]
    model = pico("gpt2", vocab_size=len(bpe), max_position_embeddings=64)
    for longest in (1, 3, 64):
        assert measure_speed(model, longest, steps=True).step > 0


def test_what_ruler_says_is_part_of_its_estimate(reader, bpe) -> None:  # type: ignore[no-untyped-def]
    (work,) = work_of("ruler:niah_single_1", ask(reader, bpe, [2000], limit=20))
    assert (work.answers, work.steps) == (3, 3 * 128)  # 20 samples, eight at a time


def test_work_without_a_length_is_timed_too_and_a_table_of_positions_not_overrun(pico, reader, bpe) -> None:  # type: ignore[no-untyped-def]
    work = work_of("continuation", ask(reader, bpe, []))
    assert probe_length(reader, work) == 512 and probe_length(reader, []) == 0
    assert probe_length(pico("gpt2", vocab_size=len(bpe), max_position_embeddings=128), work) == 128


def test_a_model_that_is_slow_is_timed_at_a_shorter_length(monkeypatch, reader) -> None:  # type: ignore[no-untyped-def]
    from halobench.tasks import estimate

    timed = []
    monkeypatch.setattr(estimate, "_time_prefill", lambda model, length, device: timed.append(length) or 0.009 * length)
    measure_speed(reader, 100_000)
    assert timed == [512, 512, 2048]


def test_what_was_done_before_is_not_part_of_the_estimate() -> None:
    work = [
        Work(suite="niah", task="a", length=1000, samples=4, tokens=4000, known=3),
        Work(suite="lm", task="b", length=None, samples=None, tokens=None),
    ]
    estimate = Estimate(model="m", work=work, speed=Speed(base=0.5, slope=0.001))
    assert (estimate.tokens, estimate.seconds) == (1000, 1500.0)
    told = "\n".join(estimate.lines())
    assert "3 of 4 done before" in told and "not known beforehand" in told and "25m00s" in told
