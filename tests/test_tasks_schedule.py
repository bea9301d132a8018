"""Sampled tasks in groups: resumed work, early stops, and what the metrics and readings say."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import pytest
import torch

from halobench.errors import HalobenchError, UserError
from halobench.tasks.journal import Journal, Journals, tokenizer_fingerprint
from halobench.tasks.sampled import Scored
from halobench.tasks.schedule import check_precision, measure


class Coin:
    """Two questions a sample; answers by a rule. Remembers what it was asked, and can be interrupted."""

    suite, name = "coin", "flip"

    def __init__(self, rule=lambda i: (1.0, float(i % 3 == 0)), stop_at: int | None = None) -> None:  # type: ignore[no-untyped-def]
        self.rule, self.stop_at = rule, stop_at
        self.asked: list[int] = []

    def sample_tokens(self, length: int) -> int:
        return length + 10

    def score(self, model: object, length: int, indices: Sequence[int]) -> list[Scored]:
        if self.stop_at is not None and self.stop_at in indices:
            raise KeyboardInterrupt
        self.asked += indices
        return [
            Scored(
                values={"accuracy": list(self.rule(i)), "answer_logprob": [-0.1 * i, -1.0]},
                depths=[0.25, 0.75],
                prompt_tokens=length - i % 2,
                tokens=length + 10,
                tokens_plain=2 * length,
                truncated=0,
            )
            for i in indices
        ]


LENGTH = 8192  # four samples to a group
CPU = torch.device("cpu")


def test_metrics_say_which_questions_belong_together_and_where_their_answers_stand() -> None:
    metrics, reading = measure(Coin(), None, LENGTH, 6, device=CPU)  # type: ignore[arg-type]
    accuracy, logprob = metrics
    assert (accuracy.suite, accuracy.task, accuracy.metric, accuracy.length, accuracy.n) == (
        "coin", "flip", "accuracy", LENGTH, 12,
    )  # fmt: skip
    assert accuracy.samples == [1, 1, 1, 0, 1, 0, 1, 1, 1, 0, 1, 0] and accuracy.value == pytest.approx(8 / 12)
    assert accuracy.clusters == logprob.clusters == [0, 0, 1, 1, 2, 2, 3, 3, 4, 4, 5, 5]
    assert accuracy.depths == [0.25, 0.75] * 6 and accuracy.stderr is not None
    assert (reading.samples, reading.questions, reading.stopped) == (6, 12, "count")
    assert (reading.tokens, reading.tokens_plain) == (6 * (LENGTH + 10), 12 * LENGTH)
    assert reading.prompt_tokens == LENGTH


def test_interrupted_work_goes_on_where_it_stopped_and_ends_with_the_same_metrics(tmp_path: Path) -> None:
    whole, _ = measure(Coin(), None, LENGTH, 10, device=CPU)  # type: ignore[arg-type]
    journal = Journal(tmp_path / "new" / "coin.jsonl")
    with pytest.raises(KeyboardInterrupt):
        measure(Coin(stop_at=9), None, LENGTH, 10, device=CPU, journal=journal)  # type: ignore[arg-type]
    again = Coin()
    resumed, reading = measure(again, None, LENGTH, 10, device=CPU, journal=journal)  # type: ignore[arg-type]
    assert again.asked == [8, 9]
    assert resumed == whole and reading.samples == 10 and reading.tokens == 10 * (LENGTH + 10)


@pytest.mark.parametrize("lost", [1, 40])
def test_a_line_torn_by_a_kill_is_scored_again(lost: int, tmp_path: Path) -> None:
    whole, _ = measure(Coin(), None, LENGTH, 8, device=CPU, journal=Journal(tmp_path / "coin.jsonl"))  # type: ignore[arg-type]
    path = tmp_path / "coin.jsonl"
    path.write_bytes(path.read_bytes()[:-lost])
    for asked in ([7], []):  # what is appended behind the torn line must be whole
        again = Coin()
        assert measure(again, None, LENGTH, 8, device=CPU, journal=Journal(path))[0] == whole  # type: ignore[arg-type]
        assert again.asked == asked


def test_looking_at_a_torn_journal_leaves_it_as_it_is(tmp_path: Path) -> None:
    journal = Journal(tmp_path / "coin.jsonl")
    measure(Coin(), None, LENGTH, 3, device=CPU, journal=journal)  # type: ignore[arg-type]
    torn = journal.path.read_bytes()[:-7]
    journal.path.write_bytes(torn)
    assert sorted(journal.read()) == [0, 1] and journal.path.read_bytes() == torn
    journal.mend()
    assert journal.path.read_bytes() == torn[: torn.rfind(b"\n") + 1]


def test_the_peak_of_resumed_work_is_the_highest_of_all_its_samples(tmp_path: Path, monkeypatch) -> None:  # type: ignore[no-untyped-def]
    from halobench.tasks import memory

    journal = Journal(tmp_path / "coin.jsonl")
    monkeypatch.setattr(memory, "peak", lambda device: 900)
    measure(Coin(), None, LENGTH, 4, device=CPU, journal=journal)  # type: ignore[arg-type]
    monkeypatch.setattr(memory, "peak", lambda device: 200)
    _, reading = measure(Coin(), None, LENGTH, 8, device=CPU, journal=journal)  # type: ignore[arg-type]
    assert reading.peak_bytes == 900


def test_a_damaged_journal_names_the_line(tmp_path: Path) -> None:
    path = tmp_path / "coin.jsonl"
    measure(Coin(), None, LENGTH, 3, device=CPU, journal=Journal(path))  # type: ignore[arg-type]
    path.write_text(path.read_text().replace('{"index": 1', "{index: 1"))
    with pytest.raises(HalobenchError, match=r"coin.jsonl line 2 is not JSON; delete the file"):
        Journal(path).read()


def test_work_ends_when_the_interval_is_narrow_enough_and_says_so() -> None:
    task = Coin(rule=lambda i: (1.0, 1.0))
    metrics, reading = measure(task, None, LENGTH, 100, device=CPU, precision=0.12)  # type: ignore[arg-type]
    assert reading.stopped == "precision" and reading.samples == metrics[0].n // 2 == 16
    assert max(task.asked) == 15
    _, whole = measure(Coin(rule=lambda i: (1.0, 1.0)), None, LENGTH, 100, device=CPU)  # type: ignore[arg-type]
    assert (whole.stopped, whole.samples) == ("count", 100)


def test_few_perfect_answers_are_not_certainty() -> None:
    _, reading = measure(Coin(rule=lambda i: (1.0, 1.0)), None, LENGTH, 15, device=CPU, precision=0.2)  # type: ignore[arg-type]
    assert reading.stopped == "count"
    _, short = measure(Coin(rule=lambda i: (0.0, 0.0)), None, LENGTH, 3, device=CPU, precision=0.4)  # type: ignore[arg-type]
    assert (short.stopped, short.samples) == ("count", 3)


def test_where_work_ends_does_not_depend_on_what_was_scored_before(tmp_path: Path) -> None:
    journal = Journal(tmp_path / "coin.jsonl")
    measure(Coin(), None, LENGTH, 50, device=CPU, journal=journal)  # type: ignore[arg-type]
    fresh = measure(Coin(), None, LENGTH, 100, device=CPU, precision=0.15)  # type: ignore[arg-type]
    again = Coin()
    kept = measure(again, None, LENGTH, 100, device=CPU, precision=0.15, journal=journal)  # type: ignore[arg-type]
    assert kept[0] == fresh[0] and kept[1].samples == fresh[1].samples < 50 and again.asked == []


@pytest.mark.parametrize("precision", [0.0, 0.5, -0.1, 7.0])
def test_a_precision_that_no_interval_has_is_refused(precision: float) -> None:
    with pytest.raises(UserError, match="between 0 and 0.5"):
        check_precision(precision)


def test_numbers_that_are_none_name_the_task_and_the_length() -> None:
    with pytest.raises(HalobenchError, match="coin/flip at 8192 tokens: accuracy is not finite"):
        measure(Coin(rule=lambda i: (1.0, float("nan"))), None, LENGTH, 3, device=CPU)  # type: ignore[arg-type]


def test_another_model_seed_task_or_length_has_another_journal(tmp_path: Path, bpe) -> None:  # type: ignore[no-untyped-def]
    identity = {"model": "a", "tokenizer": tokenizer_fingerprint(bpe)}
    settings = {"seed": 0, "version": 1, "data": "ab12"}
    first = Journals(folder=tmp_path, identity=identity).of(Coin(), LENGTH, settings)
    measure(Coin(), None, LENGTH, 4, device=CPU, journal=first)  # type: ignore[arg-type]
    for change in ({"model": "b"}, {"tokenizer": "other"}):
        other = Journals(folder=tmp_path, identity=identity | change).of(Coin(), LENGTH, settings)
        assert other.read() == {} and other.path != first.path
    same = Journals(folder=tmp_path, identity=dict(reversed(identity.items())))
    for change in ({"seed": 1}, {"version": 2}, {"data": "cd34"}):
        assert same.of(Coin(), LENGTH, settings | change).read() == {}
    assert same.of(Coin(), 512, settings).read() == {}
    assert len(same.of(Coin(), LENGTH, settings).read()) == 4


def test_a_tokenizers_fingerprint_sees_another_vocabulary_and_another_opening(bpe) -> None:  # type: ignore[no-untyped-def]
    from copy import deepcopy

    larger, opened = deepcopy(bpe), deepcopy(bpe)
    larger.add_tokens(["zebra"])
    opened.eos_token = opened.convert_ids_to_tokens(5)
    prints = {tokenizer_fingerprint(tokenizer) for tokenizer in (bpe, larger, opened)}
    assert len(prints) == 3 and tokenizer_fingerprint(deepcopy(bpe)) == tokenizer_fingerprint(bpe)
