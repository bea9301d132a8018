"""The shipped text and the items made of it."""

import gzip
import json
from pathlib import Path

import pytest

from halobench.assets import CONTINUATIONS, TEXT_HELDOUT, TEXT_LONG, TEXT_TRAIN
from halobench.errors import UserError
from halobench.tasks.continuation import load_items, read_items
from halobench.tasks.text import build_continuations, build_sample, read_jsonl, write_jsonl


def test_the_shipped_sample_is_small_and_its_parts_do_not_overlap() -> None:
    files = (TEXT_TRAIN, TEXT_HELDOUT, TEXT_LONG)
    assert sum(path.stat().st_size for path in files) <= 2_000_000
    train, heldout, long = ({d.id for d in read_jsonl(path)} for path in files)
    assert train and heldout and long
    assert not train & heldout and not train & long
    assert not {d.id for d in read_jsonl(TEXT_TRAIN)} & {i.rpartition("/")[0] for i in heldout}
    ends = {d.id: d.text for d in read_jsonl(TEXT_LONG)}
    for piece in read_jsonl(TEXT_HELDOUT):
        if piece.kind == "novel":
            assert piece.text[:200] not in ends[piece.id.rpartition("/")[0]]


def test_the_training_sample_is_half_novels_and_half_pages() -> None:
    characters = {"novel": 0, "modern": 0}
    for document in read_jsonl(TEXT_TRAIN):
        characters[document.kind] += len(document.text)
    assert 0.8 < characters["novel"] / characters["modern"] < 1.25


def test_items_are_four_different_continuations_of_like_length() -> None:
    items = read_items()
    assert len(items) == 600
    assert sum(item.source.startswith("eltec/") for item in items) == 300
    for item in items:
        assert 240 <= len(item.context) <= 400
        assert item.context.rstrip('"”’)')[-1] in ".!?"
        assert len(set(item.choices)) == 4 and 0 <= item.label < 4
        lengths = [len(choice) for choice in item.choices]
        assert min(lengths) >= 80 and max(lengths) <= 120 and max(lengths) - min(lengths) <= 15


def test_the_true_choice_follows_the_context_and_the_others_do_not() -> None:
    texts = {d.id: d.text for d in read_jsonl(TEXT_HELDOUT)}
    for item in read_items()[:100]:
        follows = [f"{item.context} {choice}" in texts[item.source] for choice in item.choices]
        assert follows == [i == item.label for i in range(4)]


def test_a_larger_limit_adds_items_to_a_smaller_one() -> None:
    assert load_items(50, seed=3)[:20] == load_items(20, seed=3)
    assert load_items(20, seed=3) != load_items(20, seed=4)


def test_selection_and_evaluation_share_no_item() -> None:
    selection, evaluation = load_items(part="selection"), load_items()
    assert len(selection) == 150 and len(evaluation) == 450
    assert not {item.context for item in selection} & {item.context for item in evaluation}


def test_items_are_rebuilt_byte_for_byte(tmp_path: Path) -> None:
    build_continuations(TEXT_HELDOUT, tmp_path / "items.jsonl.gz")
    assert (tmp_path / "items.jsonl.gz").read_bytes() == CONTINUATIONS.read_bytes()


def test_a_sample_is_built_from_whole_documents_and_again_the_same(tmp_path: Path) -> None:
    def source(name: str, rows: list[tuple[str, str]]) -> None:
        write_jsonl(({"id": i, "text": t} for i, t in rows), tmp_path / "in" / f"{name}.jsonl.gz")

    source("novels_pd.train", [("eltec/A", "Once. " * 900), ("eltec/B", "Twice. " * 900)])
    source("usgov_cc0.train", [("18f/a", "Page one."), ("digitalgov/b", "Page two.")])
    source("modern.heldout", [("18f/c", "Held out."), ("openstax/d", "Not free enough.")])
    source("novels_pd.heldout_long", [("eltec/C", "\n\n".join(f"Paragraph {i}. {'word ' * 99}" for i in range(90)))])
    sizes = build_sample(tmp_path / "in", tmp_path / "out")
    heldout = [document.id for document in read_jsonl(tmp_path / "out" / "heldout.jsonl.gz")]
    assert "18f/c" in heldout and "openstax/d" not in heldout and "eltec/C/00" in heldout
    assert len(read_jsonl(tmp_path / "out" / "train.jsonl.gz")) == 4
    (long,) = read_jsonl(tmp_path / "out" / "heldout_long.jsonl.gz")
    pieces = [d.text for d in read_jsonl(tmp_path / "out" / "heldout.jsonl.gz") if d.id.startswith("eltec/")]
    assert sum(map(len, pieces)) + len(long.text) > 0.99 * len(
        read_jsonl(tmp_path / "in" / "novels_pd.heldout_long.jsonl.gz")[0].text
    )
    again = build_sample(tmp_path / "in", tmp_path / "again")
    assert sizes == again
    for name in sizes:
        assert (tmp_path / "out" / f"{name}.jsonl.gz").read_bytes() == (
            tmp_path / "again" / f"{name}.jsonl.gz"
        ).read_bytes()


def test_a_missing_source_is_named(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="novels_pd.train.jsonl.gz does not exist"):
        build_sample(tmp_path, tmp_path / "out")


def test_written_lines_are_json(tmp_path: Path) -> None:
    write_jsonl([{"id": "a", "text": "ü\n"}], tmp_path / "x.jsonl.gz")
    with gzip.open(tmp_path / "x.jsonl.gz", "rt", encoding="utf-8") as file:
        assert [json.loads(line) for line in file] == [{"id": "a", "text": "ü\n"}]
