"""Text streamed from a dataset: windows of any lengths continue one another, and held-out documents stay out."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from halobench.errors import HalobenchError, UserError
from halobench.surgery.streamed import StreamedText

NAME = "owner/name"
DOCUMENTS = [f"Document {i} tells of {i * 37 % 101} and ends." + " More." * (i % 7) for i in range(600)]


def write(folder: Path, rows: list[dict[str, Any]], files: int = 3) -> None:
    """A dataset of several files that `datasets` finds under the name of a hub dataset."""
    (folder / NAME).mkdir(parents=True)
    for number in range(files):
        part = rows[number * len(rows) // files : (number + 1) * len(rows) // files]
        lines = "\n".join(json.dumps(row) for row in part)
        (folder / NAME / f"train-{number}.jsonl").write_text(lines)


@pytest.fixture(autouse=True)
def dataset(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write(tmp_path, [{"text": text, "id": i} for i, text in enumerate([*DOCUMENTS, DOCUMENTS[0], ""])])
    monkeypatch.chdir(tmp_path)


def stream(bpe: Any, seed: int = 0, held_out: int = 700) -> StreamedText:
    return StreamedText(NAME, bpe, seed, held_out=held_out)


def all_of(text: StreamedText, lengths: list[int]) -> np.ndarray:
    """Windows of these lengths in turn, joined, until the stream ends."""
    pieces: list[np.ndarray] = []
    position = 0
    while True:
        length = lengths[len(pieces) % len(lengths)]
        try:
            pieces.append(text.window(position, length))
        except UserError as error:
            assert "ended after" in str(error)
            return np.concatenate(pieces)
        position += length


def documents_of(bpe: Any, tokens: np.ndarray) -> list[str]:
    return [text for text in bpe.decode(tokens).split("<|endoftext|>") if text]


def test_windows_of_any_lengths_give_the_same_text_without_overlap_or_gap(bpe: Any) -> None:
    ones, mixed = all_of(stream(bpe), [1024]), all_of(stream(bpe), [32, 7, 300])
    shared = min(len(ones), len(mixed))
    assert np.array_equal(ones[:shared], mixed[:shared])
    assert abs(len(ones) - len(mixed)) < 1024


def test_held_out_and_training_documents_are_all_of_them_each_once_in_one_place(bpe: Any) -> None:
    text = stream(bpe)
    trained = documents_of(bpe, all_of(text, [1]))
    held = documents_of(bpe, text.held_out(0, 700))[:-1]
    assert held == DOCUMENTS[: len(held)] and len(held) > 10
    assert not set(held) & set(trained)  # though the first document comes again at the end of the dataset
    missing = set(DOCUMENTS) - set(trained) - set(held)
    assert len(missing) <= 1  # the one that the first held-out window cuts
    assert len(trained) == len(set(trained))


def test_held_out_documents_do_not_depend_on_the_seed_and_the_order_of_training_does(bpe: Any) -> None:
    one, two = stream(bpe, seed=0), stream(bpe, seed=1)
    assert np.array_equal(one.held_out(1, 64), two.held_out(1, 64))
    assert not np.array_equal(one.window(0, 256), two.window(0, 256))
    assert documents_of(bpe, all_of(one, [64])) != DOCUMENTS


def test_a_stream_gives_the_same_windows_when_it_is_entered_later_or_entered_again(bpe: Any) -> None:
    text = stream(bpe)
    windows = [text.window(i * 32, 32) for i in range(40)]
    later = stream(bpe)
    for i in (13, 14, 14, 30, 2, 39):
        assert np.array_equal(later.window(i * 32, 32), windows[i])


def test_processes_that_take_turns_see_what_one_process_sees(bpe: Any) -> None:
    alone = stream(bpe)
    whole = [alone.window(i * 48, 48) for i in range(30)]
    team = [stream(bpe) for _ in range(3)]
    assert all(np.array_equal(team[i % 3].window(i * 48, 48), whole[i]) for i in range(30))


def test_a_stream_that_ends_says_how_far_it_went(bpe: Any) -> None:
    with pytest.raises(UserError, match=r"owner/name ended after [\d,]+ training tokens, before 10,000,064"):
        stream(bpe).window(10**7, 64)


def test_a_dataset_smaller_than_what_is_held_out_is_refused(bpe: Any) -> None:
    with pytest.raises(UserError, match="too few to set 1,100,000 aside"):
        StreamedText(NAME, bpe, 0)


@pytest.mark.parametrize(
    ("row", "message"), [({"content": "a"}, "`text`"), ({"text": None, "id": 1}, "has no string `text`")]
)
def test_a_dataset_without_text_is_refused(
    bpe: Any, row: dict[str, Any], message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "other").mkdir()
    monkeypatch.chdir(tmp_path / "other")
    write(Path.cwd(), [row] * 6)
    with pytest.raises(UserError, match=message):
        stream(bpe)


def test_a_name_that_cannot_be_opened_is_said_in_one_line(bpe: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    import datasets

    def fail(*args: Any, **options: Any) -> None:
        raise ConnectionError("no route\nto the hub")

    monkeypatch.setattr(datasets, "load_dataset", fail)
    with pytest.raises(HalobenchError, match=r"'owner/name' could not be opened .*ConnectionError: no route\)") as seen:
        stream(bpe)
    assert "\n" not in str(seen.value)
