"""Profiles as records: a fresh process, rows that are not measured twice, memory that runs out, two models in turns."""

import os
from pathlib import Path

import pytest
import torch

from halobench import profile_team, profiling
from halobench.errors import HalobenchError, UserError
from halobench.profile_rows import MeasuredRows
from halobench.profile_team import Team
from halobench.profiling import Job, ProfileRequest, measure_apart, profile_models
from halobench.surgery.plan import SurgeryPlan
from halobench.surgery.transplant import transplant
from halobench.tasks.profile import profile_at
from tests.conftest import make_pico
from tests.test_profile_shapes import MACHINE


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:  # type: ignore[no-untyped-def]
    """A pico teacher and a hybrid of it."""
    place = tmp_path_factory.mktemp("models")
    teacher = make_pico()
    teacher.save_pretrained(place / "teacher")
    torch.manual_seed(0)
    transplant(teacher, SurgeryPlan.for_model(teacher, keep=[1])).save_pretrained(place / "hybrid")
    return place


@pytest.fixture
def known_machine(monkeypatch) -> None:  # type: ignore[no-untyped-def]
    monkeypatch.setattr(profile_team, "measure_machine", lambda *_: MACHINE)


def request(**changes: object) -> ProfileRequest:
    fields = {"contexts": (16, 32), "device": "cpu", "new_tokens": 2, "repeats": 2}
    return ProfileRequest(**{**fields, **changes})  # type: ignore[arg-type]


def job(folder: Path, out: Path, *names: str, **changes: object) -> Job:
    paths = tuple(str(folder / name) for name in names)
    return Job(names=paths, out=out, request=request(**changes), paired=len(names) > 1)


def test_a_model_is_profiled_in_a_process_of_its_own(folder: Path, tmp_path: Path) -> None:
    preset = f"preset:{folder / 'hybrid'}"
    (record,) = profile_models([preset], tmp_path, request(contexts=(16,)))
    assert record.details["process"] not in (os.getpid(), None)
    assert (
        record.model.name == "hybrid (random weights)" and "random weights" in record.details["random_weights"]["note"]
    )
    assert record.backends["mixer lightning"] and record.backends["attention in decode"] == "flash_for_cpu"
    assert record.details["machine"]["bytes_per_s"] > 0 and record.details["missing"] == []
    (row,) = record.details["rows"]
    assert row["tpot_over_floor"] == pytest.approx(row["tpot_ms"] / row["theory"]["tpot_floor_ms"])


@pytest.mark.usefixtures("known_machine")
def test_an_interrupted_profile_leaves_its_rows_and_goes_on_from_there(folder, tmp_path, monkeypatch) -> None:  # type: ignore[no-untyped-def]
    asked = []

    def stopping(models: object, context: int, **more: object) -> object:
        asked.append(context)
        if asked == [16, 32]:
            raise KeyboardInterrupt
        return profile_at(models, context, **more)  # type: ignore[arg-type]

    monkeypatch.setattr(profile_team, "profile_at", stopping)
    with pytest.raises(KeyboardInterrupt):
        Team(job(folder, tmp_path, "teacher")).run()
    left = profiling.read_record(next(tmp_path.glob("*.profile.record.json")))
    assert [row["context"] for row in left.details["rows"]] == [16] and left.details["missing"] == [[32, 1]]
    (path,) = Team(job(folder, tmp_path, "teacher")).run()
    assert asked == [16, 32, 32]
    assert [row["context"] for row in profiling.read_record(path).details["rows"]] == [16, 32]
    assert profiling.read_record(path).details["rows"][0] == left.details["rows"][0]


@pytest.mark.usefixtures("known_machine")
@pytest.mark.parametrize("changes", [{"new_tokens": 3}, {"dtype": "bf16"}])
def test_other_settings_are_measured_anew(changes, folder, tmp_path, monkeypatch) -> None:  # type: ignore[no-untyped-def]
    Team(job(folder, tmp_path, "teacher", contexts=(16,))).run()
    asked = []
    monkeypatch.setattr(
        profile_team, "profile_at", lambda m, context, **k: asked.append(context) or profile_at(m, context, **k)
    )
    Team(job(folder, tmp_path, "teacher", contexts=(16,), **changes)).run()
    assert asked == [16]


@pytest.mark.usefixtures("known_machine")
def test_two_models_get_ratios_and_the_contexts_of_overtaking(folder: Path, tmp_path: Path) -> None:
    paths = Team(job(folder, tmp_path, "teacher", "hybrid", contexts=(16, 64))).run()
    first, second = map(profiling.read_record, paths)
    assert "ratios" not in first.details and second.details["against"] == "teacher"
    assert [row["context"] for row in second.details["ratios"]] == [16, 64]
    assert all(row["tpot"]["low"] <= row["tpot"]["value"] <= row["tpot"]["high"] for row in second.details["ratios"])
    found = {one["what"]: one for one in second.details["overtakes"]}
    assert set(found) == {"tpot", "prefill", "cache"}
    # The teacher keeps 4 layers of 2 * 24 numbers a token; the hybrid one, and 3 states of 4 * 12 * 12.
    assert found["cache"]["context"] == 3 * 4 * 12 * 12 // (3 * 2 * 24) + 1 and found["cache"]["state"] == "within"
    Team(job(folder, tmp_path, "teacher", "hybrid", contexts=(16, 64))).run()  # nothing is left to be measured
    again = profiling.read_record(paths[1])
    assert again.details["rows"] == second.details["rows"] and again.backends == second.backends
    assert again.backends["mixer lightning"] == "torch"
    assert first.settings["in_turns"] == second.settings["in_turns"] == [str(folder / n) for n in ("teacher", "hybrid")]


@pytest.mark.usefixtures("known_machine")
def test_a_batch_without_memory_is_a_row_and_the_others_stand(folder, tmp_path, monkeypatch) -> None:  # type: ignore[no-untyped-def]
    members = Team(job(folder, tmp_path, "teacher", contexts=(16,), batches=(1, 2)))
    original = members.models[0].forward

    def forward(input_ids: torch.Tensor, **more: object) -> object:
        if len(input_ids) > 1:
            raise RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 1 bytes.")
        return original(input_ids=input_ids, **more)

    monkeypatch.setattr(members.models[0], "forward", forward)
    (path,) = members.run()
    record = profiling.read_record(path)
    assert [(row["batch"], row["status"]) for row in record.details["rows"]] == [(1, "ok"), (2, "oom")]
    assert record.status == "ok" and "can't allocate" in record.error
    assert {m.metric for m in record.metrics} == {"batch-1"}


@pytest.mark.usefixtures("known_machine")
def test_what_the_host_cannot_hold_is_not_tried(folder, tmp_path, monkeypatch) -> None:  # type: ignore[no-untyped-def]
    monkeypatch.setattr(profile_team, "available_bytes", lambda _: 100_000)
    (path,) = Team(job(folder, tmp_path, "teacher", contexts=(16, 4096))).run()
    small, large = profiling.read_record(path).details["rows"]
    assert small["status"] == "ok" and large["status"] == "oom"
    assert large["error"].startswith("not tried: cache and activations need") and large["error"].endswith(
        "97.7 KiB are free"
    )


@pytest.mark.usefixtures("known_machine")
def test_a_process_that_the_system_ends_is_a_row_and_another_goes_on(folder, tmp_path, monkeypatch) -> None:  # type: ignore[no-untyped-def]
    runs = []

    def one_process(asked: Job) -> tuple[dict, int]:  # type: ignore[type-arg]
        members = Team(asked)
        runs.append(members)
        if len(runs) == 1:
            members.measured.begin(32, 1)
            return {"rows": members.measured.folder}, -9
        return {"rows": members.measured.folder, "records": members.run()}, 0

    monkeypatch.setattr(profiling, "_run", one_process)
    (record,) = measure_apart(job(folder, tmp_path, "teacher", contexts=(16, 32, 64)))
    assert [row["status"] for row in record.details["rows"]] == ["ok", "oom", "oom"]
    assert "the system ended the process at 32 tokens, batch 1" in record.error


def test_a_process_that_dies_before_it_measures_is_an_error(folder, tmp_path, monkeypatch) -> None:  # type: ignore[no-untyped-def]
    monkeypatch.setattr(profiling, "_run", lambda _: ({"rows": MeasuredRows(tmp_path).folder}, -11))
    with pytest.raises(HalobenchError, match="was ended by signal 11; run again to resume"):
        measure_apart(job(folder, tmp_path, "teacher"))


@pytest.mark.parametrize(
    ("changes", "vs", "names", "message"),
    [
        ({"dtype": "bf17"}, None, ["tiny"], "unknown dtype 'bf17'; did you mean 'bf16'"),
        ({"batches": (0,)}, None, ["tiny"], "--batch 0 leaves nothing to measure"),
        ({"repeats": 0}, None, ["tiny"], "--repeats 0 leaves nothing"),
        ({}, None, ["preset:qwen3-9b"], "unknown preset 'qwen3-9b'; did you mean"),
        ({}, None, ["tyni"], "'tyni' not found"),
        ({}, "tyni", ["tiny"], "'tyni' not found"),
        ({}, "tiny", ["tiny"], "name another to hold against it"),
    ],
)
def test_a_mistake_is_told_before_anything_starts(changes, vs, names, message, tmp_path) -> None:  # type: ignore[no-untyped-def]
    with pytest.raises(UserError, match=message):
        profile_models(names, tmp_path, request(**changes), vs=vs)
    assert not any(tmp_path.iterdir())
