"""The shelf: settings with exact keys, names with near names, files whole or not at all, records that read back."""

from __future__ import annotations

import errno
import json
from dataclasses import dataclass
from pathlib import Path

import pytest

from halobench.config import apply_overrides, from_dict, read_yaml, to_dict
from halobench.errors import HalobenchError, UserError, is_out_of_memory
from halobench.files import atomic_path, make_folder, read_json, write_json
from halobench.recipe import load_recipe
from halobench.records import LedgerRow, Metric, ModelCard, RunRecord, find_records, read_record
from halobench.registry import Registry
from halobench.run import RunFolder
from halobench.units import format_bytes, format_count, format_length, format_seconds, parse_count, parse_length


@dataclass(frozen=True, kw_only=True)
class Inner:
    rate: float = 1.0


@dataclass(frozen=True, kw_only=True)
class Outer:
    name: str
    inner: Inner
    sizes: list[int]
    share: int | float = 1


def test_settings_make_the_round_trip() -> None:
    given = {"name": "a", "inner": {"rate": "1e-3"}, "sizes": [1, 2], "share": 0.5}
    made = from_dict(Outer, given, "x")
    assert made == Outer(name="a", inner=Inner(rate=1e-3), sizes=[1, 2], share=0.5)
    assert from_dict(Outer, to_dict(made), "x") == made


@pytest.mark.parametrize(
    ("data", "message"),
    [
        ({"name": "a", "inner": {"rat": 1}, "sizes": []}, "did you mean 'rate'"),
        ({"inner": {}, "sizes": []}, "lacks the field 'name'"),
        ({"name": "a", "inner": {}, "sizes": ["b"]}, r"sizes\[0\] must be int, got str 'b'"),
        ({"name": "a", "inner": [], "sizes": []}, "x.inner must be a table"),
        ({"name": True, "inner": {}, "sizes": []}, "name must be str"),
        ({"name": "a", "inner": {}, "sizes": [True]}, "must be int"),
    ],
)
def test_wrong_settings_name_the_field(data: dict, message: str) -> None:
    with pytest.raises(UserError, match=message):
        from_dict(Outer, data, "x")


def test_overrides_reach_inside_and_leave_the_original_alone() -> None:
    data = {"a": {"b": 1}}
    assert apply_overrides(data, ["a.b=2e-1", "c=[1, 2]"]) == {"a": {"b": "2e-1"}, "c": [1, 2]}
    assert data == {"a": {"b": 1}}
    with pytest.raises(UserError, match="not of the form"):
        apply_overrides(data, ["a.b"])


def test_yaml_errors_name_the_line(tmp_path: Path) -> None:
    (tmp_path / "x.yaml").write_text("a: 1\nb: [1,\n")
    with pytest.raises(UserError, match="not valid YAML at line"):
        read_yaml(tmp_path / "x.yaml")


def test_every_shipped_recipe_is_read_and_has_the_published_numbers() -> None:
    published = load_recipe("halo-qwen3-1.7b", [])
    assert published.tokens().training == 2_320_000_000
    assert (published.align.optim.rate, published.distil.optim.rate, published.finetune.optim.rate) == (
        1e-3,
        1e-4,
        1e-5,
    )
    assert published.distil.batch_tokens == 96 * 512 and published.finetune.batch_tokens == 128 * 16384
    assert published.kept_count(28) == 7 and published.kept_count(36) == 9


def test_a_registry_is_lazy_and_knows_near_names() -> None:
    found: Registry = Registry("thing", {"path": "pathlib:Path", "broken": "no.such.module:X"})
    assert found.get("path") is Path
    assert found.names() == ["path", "broken"]
    with pytest.raises(UserError, match="unknown thing 'pth'; did you mean 'path'"):
        found.get("pth")
    with pytest.raises(UserError, match="registered already"):
        found.add("path", Path)


def test_a_failed_write_leaves_the_old_file_and_nothing_else(tmp_path: Path) -> None:
    target = tmp_path / "a.json"
    write_json(target, {"old": 1})
    with pytest.raises(ValueError), atomic_path(target) as temporary:
        temporary.write_text("half")
        raise ValueError
    with pytest.raises(ValueError):
        write_json(target, {"x": float("nan")})
    assert read_json(target) == {"old": 1}
    assert [p.name for p in tmp_path.iterdir()] == ["a.json"]


def test_a_folder_is_replaced_whole(tmp_path: Path) -> None:
    for content in ("one", "two"):
        with atomic_path(tmp_path / "model") as temporary:
            temporary.mkdir()
            (temporary / content).write_text(content)
    assert [p.name for p in tmp_path.rglob("*")] == ["model", "two"]


def test_a_full_disk_is_one_clear_line(tmp_path: Path) -> None:
    with pytest.raises(HalobenchError, match="no space left to write .*; free some room"), atomic_path(tmp_path / "a"):
        raise OSError(errno.ENOSPC, "No space left on device")


def test_a_place_that_cannot_be_is_one_clear_line(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    for make in (make_folder, lambda path: write_json(path / "a", "")):
        with pytest.raises(HalobenchError, match="cannot be written .*; choose another folder"):
            make(tmp_path / "file" / "folder")


def test_damaged_json_is_named(tmp_path: Path) -> None:
    (tmp_path / "a.json").write_text('{"a": ')
    with pytest.raises(HalobenchError, match="not valid JSON"):
        read_json(tmp_path / "a.json")


def record() -> RunRecord:
    card = ModelCard(
        name="a", path="p", hash="h", layers=3, parameters=5, teacher="t", kept=[1],
        ledger=[LedgerRow(what="align", tokens=3, seconds=1.0), LedgerRow(what="distil", tokens=4, seconds=2.0)],
    )  # fmt: skip
    metric = Metric(suite="niah", task="m", metric="accuracy", value=0.5, n=3, stderr=0.1, length=512)
    return RunRecord(kind="eval", model=card, metrics=[metric])


def test_a_record_reads_back_as_it_was_written(tmp_path: Path) -> None:
    path = record().save(tmp_path / "a.record.json")
    assert read_record(path) == record().__class__(**{**vars(record()), "created": read_record(path).created})
    assert find_records(tmp_path)[0].model.tokens == 7
    assert read_record(path).environment["versions"]["halobench"]


def test_a_record_of_another_version_or_kind_is_refused(tmp_path: Path) -> None:
    path = record().save(tmp_path / "a.record.json")
    data = json.loads(path.read_text())
    path.write_text(json.dumps({**data, "schema": 99}))
    with pytest.raises(UserError, match="version 99"):
        read_record(path)
    path.write_text("{}")
    with pytest.raises(UserError, match="not a halobench record"):
        read_record(path)


def test_lengths_and_sizes_read_as_people_write_them() -> None:
    assert [parse_length(t) for t in ("512", "4k", "1m", 7)] == [512, 4096, 1 << 20, 7]
    assert [parse_count(t) for t in ("500k", "1.5M", "2B", 3)] == [500_000, 1_500_000, 2_000_000_000, 3]
    assert (format_length(4096), format_length(1 << 20), format_length(700)) == ("4K", "1M", "700")
    assert (format_bytes(1536), format_count(1234567), format_seconds(125)) == ("1.5 KiB", "1.23M", "2m05s")
    for wrong in ("4q", "", "0", "-3", "1.5k"):
        with pytest.raises(UserError):
            parse_length(wrong)


def test_memory_that_runs_out_is_known_by_its_words() -> None:
    assert is_out_of_memory(RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried"))
    assert is_out_of_memory(RuntimeError("CUDA out of memory. Tried to allocate 2 GiB"))
    assert is_out_of_memory(MemoryError())
    assert not is_out_of_memory(RuntimeError("shapes differ"))


def test_checkpoints_of_finished_stages_are_dropped_and_those_of_others_stay(tmp_path: Path) -> None:
    """A run that was killed between its note and its checkpoints goes on without them."""
    run = RunFolder(tmp_path / "run", {"recipe": 1}, "tiny")
    for stage in ("align", "distil"):
        (run.path / stage / "checkpoints" / "step-1").mkdir(parents=True)
    write_json(run.path / "align" / "stage.json", {})
    run.sweep()
    assert not (run.path / "align" / "checkpoints").exists()
    assert (run.path / "distil" / "checkpoints" / "step-1").exists()
