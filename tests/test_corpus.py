"""Text to windows: every token once an epoch, the same order for the same seed, and clear words for bad files."""

from __future__ import annotations

import gzip
import json
from pathlib import Path

import numpy as np
import pytest

from halobench.errors import UserError
from halobench.surgery.corpus import PackedText, StreamedText, encode_corpus, open_text, read_documents, source_files
from halobench.surgery.planted import ANSWER_WEIGHT, Mixture, Planted, nouns


@pytest.fixture(autouse=True)
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HALOBENCH_CACHE", str(tmp_path / "cache"))


def write_all(folder: Path) -> list[str]:
    """The same three documents as text, JSON lines, packed JSON lines and Parquet."""
    import pyarrow
    import pyarrow.parquet

    texts = ["One day.", "Two days.\n\nAnd more.", "Three — naïve."]
    (folder / "a.txt").write_text(texts[0])
    (folder / "b.jsonl").write_text(json.dumps({"text": texts[1]}) + "\n\n")
    with gzip.open(folder / "c.jsonl.gz", "wt") as file:
        file.write(json.dumps({"text": texts[2], "id": 3}))
    pyarrow.parquet.write_table(pyarrow.table({"text": texts}), folder / "d.parquet")
    return texts


def test_every_kind_of_file_gives_its_documents(tmp_path: Path) -> None:
    texts = write_all(tmp_path)
    assert list(read_documents(source_files(str(tmp_path)) or [])) == texts + texts


def test_documents_are_joined_by_end_of_text(tmp_path: Path, bpe) -> None:  # type: ignore[no-untyped-def]
    texts = write_all(tmp_path)
    tokens = encode_corpus([tmp_path / "d.parquet"], bpe)
    assert bpe.decode(tokens) == "<|endoftext|>".join(texts) + "<|endoftext|>"
    assert np.array_equal(encode_corpus([tmp_path / "d.parquet"], bpe), tokens)


def test_an_epoch_holds_every_window_once_and_the_next_is_in_another_order() -> None:
    text = PackedText(np.arange(1001), seed=3)
    first = [text.window(i, 10) for i in range(100)]
    second = [text.window(i, 10) for i in range(100, 200)]
    for epoch in (first, second):
        starts = sorted(int(w[0]) for w in epoch)
        assert [b - a for a, b in zip(starts, starts[1:], strict=False)] == [10] * 99
        assert all(np.array_equal(w, np.arange(w[0], w[0] + 10)) for w in epoch)
    assert [int(w[0]) for w in first] != [int(w[0]) for w in second]
    again = PackedText(np.arange(1001), seed=3)
    assert all(np.array_equal(again.window(i, 10), first[i]) for i in (57, 3, 99))


def test_too_little_text_says_how_much_there_is() -> None:
    with pytest.raises(UserError, match="has 8 tokens, fewer than one window of 16"):
        PackedText(np.arange(8), 0).window(0, 16)


def test_a_stream_gives_the_same_windows_when_it_is_entered_later(bpe, monkeypatch) -> None:  # type: ignore[no-untyped-def]
    import datasets

    rows = datasets.Dataset.from_list([{"text": f"Document number {i} of many."} for i in range(200)])
    monkeypatch.setattr(datasets, "load_dataset", lambda *a, **k: rows.to_iterable_dataset())
    stream = StreamedText("owner/name", bpe, seed=0)
    windows = [stream.window(i, 32) for i in range(20)]
    later = StreamedText("owner/name", bpe, seed=0)
    assert np.array_equal(later.window(13, 32), windows[13])
    assert np.array_equal(later.window(2, 32), windows[2])


@pytest.mark.parametrize(
    ("content", "message"),
    [('{"text": "a"}\n{"txt": "b"}\n', "line 2"), ('{"text": "a"\n', "line 1"), ("[1]\n", "line 1")],
)
def test_a_damaged_line_is_named(tmp_path: Path, content: str, message: str) -> None:
    path = tmp_path / "bad.jsonl"
    path.write_text(content)
    with pytest.raises(UserError, match=message):
        list(read_documents([path]))


@pytest.mark.parametrize("source", ["no/such/place", "missing.txt", "./nothing", "/none/*.txt"])
def test_a_source_that_is_not_there_is_refused(source: str) -> None:
    with pytest.raises(UserError, match="not found"):
        source_files(source)


def test_planted_sequences_have_the_asked_length_and_true_answers(bpe) -> None:  # type: ignore[no-untyped-def]
    planted = Planted(bpe, open_text("sample:heldout", bpe, 0), seed=0)
    for kind in ("needles", "lists", "separators"):
        draw = planted.kinds[kind][1]
        for index in range(6):
            sequence = draw(np.random.default_rng(index), index, 700)
            assert len(sequence.tokens) == len(sequence.weights) == 700
            text = bpe.decode(sequence.tokens)
            answers = sequence.weights == ANSWER_WEIGHT
            assert answers.any()
            runs = np.split(np.flatnonzero(answers), np.flatnonzero(np.diff(np.flatnonzero(answers)) > 1) + 1)
            for run in runs[:-1]:
                assert text.count(bpe.decode(sequence.tokens[run]).strip()) >= 2, kind


def test_a_repeat_is_a_repeat(bpe) -> None:  # type: ignore[no-untyped-def]
    planted = Planted(bpe, open_text("sample:heldout", bpe, 0), seed=0)
    sequence = planted.kinds["repeats"][1](np.random.default_rng(1), 1, 200)
    periods = [p for p in range(4, 130) if np.array_equal(sequence.tokens[p:], sequence.tokens[:-p])]
    assert periods


def test_the_mixture_keeps_its_proportion_and_its_order(bpe) -> None:  # type: ignore[no-untyped-def]
    text = open_text("sample:heldout", bpe, 0)
    mixture = Mixture(text, Planted(bpe, text, 0), 0.4, seed=0)
    sequences = [mixture.sequence(i, 64) for i in range(200)]
    share = np.mean([not (s.weights == 1).all() for s in sequences])
    assert 0.3 < share < 0.5
    assert np.array_equal(mixture.sequence(7, 64).tokens, sequences[7].tokens)


def test_words_of_training_and_evaluation_are_disjoint() -> None:
    assert not set(nouns("train")) & set(nouns("eval"))
    assert min(len(nouns("train")), len(nouns("eval"))) > 500
