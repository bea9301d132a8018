"""Files of text: every kind gives the same documents, none is lost, and bad files are named with the place."""

from __future__ import annotations

import gzip
import hashlib
import json
from collections.abc import Callable
from pathlib import Path

import pytest

from halobench.errors import UserError
from halobench.surgery.documents import corpus_hashes, read_documents, source_files

TEXTS = ["One day.", "Two days.\r\n\r\nAnd\u2028more.", "Three — naïve 🌍.\n", "  "]


def as_text(folder: Path) -> None:
    for number, text in enumerate(TEXTS):
        (folder / f"{number}.txt").write_bytes(text.encode())


def as_lines(folder: Path) -> None:
    (folder / "a.jsonl").write_text("\n\n".join(json.dumps({"text": t, "id": 1}) for t in TEXTS))


def as_marked_lines(folder: Path) -> None:
    lines = "\r\n".join(json.dumps({"text": t}, ensure_ascii=False) for t in TEXTS)
    (folder / "a.jsonl").write_bytes(b"\xef\xbb\xbf" + lines.encode())


def as_packed_lines(folder: Path) -> None:
    with gzip.open(folder / "a.jsonl.gz", "wt", encoding="utf-8") as file:
        file.writelines(json.dumps({"text": t}) + "\n" for t in TEXTS)


def as_parquet(folder: Path) -> None:
    import pyarrow
    import pyarrow.parquet

    table = pyarrow.table({"id": list(range(len(TEXTS))), "text": TEXTS})
    pyarrow.parquet.write_table(table, folder / "a.parquet", row_group_size=2)


@pytest.mark.parametrize("write", [as_text, as_lines, as_marked_lines, as_packed_lines, as_parquet])
def test_every_kind_of_file_gives_the_same_documents(tmp_path: Path, write: Callable[[Path], None]) -> None:
    write(tmp_path)
    assert list(read_documents(source_files(str(tmp_path)) or [])) == TEXTS


def test_a_folder_gives_the_files_below_it_by_name(tmp_path: Path) -> None:
    (tmp_path / "deeper").mkdir()
    (tmp_path / "b.txt").write_text("second")
    (tmp_path / "deeper" / "a.txt").write_text("third")
    (tmp_path / "a.txt").write_text("first")
    (tmp_path / "notes.md").write_text("not text for training")
    assert list(read_documents(source_files(str(tmp_path)) or [])) == ["first", "second", "third"]


def test_empty_documents_are_passed_over_and_counted(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "a.jsonl"
    file.write_text('{"text": "a"}\n{"text": ""}\n{"text": "b"}\n{"text": ""}\n')
    assert list(read_documents([file])) == ["a", "b"]
    assert "2 empty documents passed over (line 2, line 4)" in capsys.readouterr().err


def parquet_without_text(path: Path) -> None:
    import pyarrow
    import pyarrow.parquet

    pyarrow.parquet.write_table(pyarrow.table({"id": [1], "content": ["a"]}), path)


def parquet_with_null(path: Path) -> None:
    import pyarrow
    import pyarrow.parquet

    pyarrow.parquet.write_table(pyarrow.table({"text": ["a", None]}), path)


def cut_short(path: Path) -> None:
    path.write_bytes(gzip.compress(b'{"text": "a"}\n' * 1000)[:-20])


def cut_in_the_middle(path: Path) -> None:
    packed = bytearray(gzip.compress(json.dumps({"text": str(list(range(5000)))}).encode()))
    packed[200:260] = bytes(60)
    path.write_bytes(packed)


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.jsonl", '{"text": "a"}\n{"txt": "b"}\n', "line 2: not a JSON object with a field `text` .it has no `text`"),
        ("a.jsonl", '{"text": "a"\n', "line 1: not a JSON object"),
        ("a.jsonl", "[1]\n", "line 1: not a JSON object"),
        ("a.jsonl", '"text"\n', "line 1: not a JSON object"),
        ("a.jsonl", '{"text": 5}\n', "line 1: `text` is int, not a string"),
        ("a.jsonl", '{"text": null}\n', "line 1: `text` is NoneType, not a string"),
        ("a.jsonl", '{"text": "half a character \\ud83c"}\n', "line 1: not a JSON object"),
        ("a.jsonl", '{"text": "a"}\n{"text": "ä"}\n'.encode("latin-1"), "line 2 is not UTF-8 text"),
        ("a.jsonl", "", "holds no text"),
        ("a.jsonl", "\n\n", "holds no text"),
        ("a.jsonl", '{"text": ""}\n', "holds no text"),
        ("a.txt", "", "holds no text"),
        ("a.txt", "naïve".encode("latin-1"), r"not UTF-8 text \(byte 0xef at 2\)"),
        ("a.txt", "wide".encode("utf-16-le"), "not text .a zero byte at character 1"),
        ("a.txt", bytes(range(128, 256)), "not UTF-8 text"),
        ("a.jsonl.gz", b'{"text": "not packed"}\n', "damaged or not packed by gzip"),
        ("a.jsonl.gz", cut_short, "damaged or not packed by gzip"),
        ("a.jsonl.gz", cut_in_the_middle, "damaged or not packed by gzip|is not UTF-8|not a JSON object"),
        ("a.parquet", b"PAR1 but nothing else", "damaged or not Parquet"),
        ("a.parquet", "", "damaged or not Parquet"),
        ("a.parquet", parquet_without_text, "no column `text`, only id, content"),
        ("a.parquet", parquet_with_null, "row 2: `text` is NoneType"),
    ],
)
def test_a_bad_file_is_named_in_one_line(
    tmp_path: Path, name: str, content: str | bytes | Callable[[Path], None], message: str
) -> None:
    path = tmp_path / name
    if callable(content):
        content(path)
    else:
        path.write_bytes(content.encode() if isinstance(content, str) else content)
    with pytest.raises(UserError, match=message) as seen:
        list(read_documents([path]))
    assert str(path) in str(seen.value)
    assert "\n" not in str(seen.value)


@pytest.mark.parametrize(
    "source", ["no/such/place", "missing.txt", "./nothing", "/none/*.txt", "owner/", "one", "owner/data.jsonl"]
)
def test_a_source_that_is_not_there_is_refused(source: str) -> None:
    with pytest.raises(UserError, match="not found"):
        source_files(source)


def test_a_folder_without_text_and_a_file_of_another_kind_are_refused(tmp_path: Path) -> None:
    (tmp_path / "image.png").write_bytes(b"\x89PNG")
    with pytest.raises(UserError, match="holds no text"):
        source_files(str(tmp_path))
    for source in ("image.png", "*.png"):
        with pytest.raises(UserError, match="of no known kind"):
            source_files(str(tmp_path / source))
    with pytest.raises(UserError, match="matches no file"):
        source_files(str(tmp_path / "*.txt"))


@pytest.mark.parametrize("source", ["owner/name", "HuggingFaceFW/fineweb-edu:sample-10BT", "owner/name.v1.5"])
def test_a_hub_name_has_an_owner_a_name_and_perhaps_a_configuration(source: str) -> None:
    assert source_files(source) is None
    assert corpus_hashes(source) == [{"hub": source}]


def test_the_hashes_of_a_source_name_every_file_and_follow_its_content(tmp_path: Path) -> None:
    (tmp_path / "deeper").mkdir()
    (tmp_path / "a.txt").write_text("one")
    (tmp_path / "deeper" / "b.txt").write_text("two")
    before = corpus_hashes(str(tmp_path))
    assert before == [
        {"file": "a.txt", "sha256": hashlib.sha256(b"one").hexdigest()[:16]},
        {"file": "deeper/b.txt", "sha256": hashlib.sha256(b"two").hexdigest()[:16]},
    ]
    assert corpus_hashes(str(tmp_path / "a.txt")) == before[:1]
    (tmp_path / "a.txt").write_text("other")
    assert corpus_hashes(str(tmp_path))[0] != before[0]
    assert corpus_hashes("sample:heldout")[0]["file"] == "heldout.jsonl.gz"
