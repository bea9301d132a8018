"""The benchmark scripts run at small sizes, and the README's speed tables say what their records say."""

from __future__ import annotations

import importlib.util
import io
import json
import re
import shlex
from contextlib import redirect_stdout
from pathlib import Path
from typing import Any

import pytest
import torch

from halobench.benchmarking import Timed, in_turns, ratio
from halobench.mixers import MIXERS
from halobench.reports.readme_speed import speed
from halobench.tasks import machine

ROOT = Path(__file__).resolve().parents[1]


def module_of(name: str) -> Any:
    spec = importlib.util.spec_from_file_location(f"benchmark_{name}", ROOT / "benchmarks" / f"{name}.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def script(name: str, out: Path, *arguments: str) -> dict[str, Any]:
    """The record that a script writes; run in this process, which has what it imports."""
    module, printed = module_of(name), io.StringIO()
    with pytest.MonkeyPatch.context() as patch, redirect_stdout(printed):
        patch.setitem(machine.BUFFER, "cpu", 2**20)
        patch.setitem(machine.MATMUL, "cpu", 64)
        module.main(["--device", "cpu", "-o", str(out / f"{name}.json"), *arguments])
    record = json.loads((out / f"{name}.json").read_text())
    assert record == json.loads(printed.getvalue().splitlines()[-1])
    return record


@pytest.fixture(scope="module")
def records(tmp_path_factory: pytest.TempPathFactory) -> dict[tuple[str, str], dict[str, Any]]:
    out, quick = tmp_path_factory.mktemp("records"), ("--rounds", "1", "--seconds", "1")
    return {
        ("operators", "cpu"): script("operators", out, "--lengths", "64,128", "--gradients-up-to", "64", *quick),
        ("prefill", "cpu"): script("prefill", out, "--lengths", "64", *quick),
        ("decode", "cpu"): script("decode", out, "--contexts", "64", *quick),
        ("loss", "cpu"): script("loss", out, "--tokens", "16", "--vocabulary", "400", "--width", "8", "--rounds", "1"),
        ("training", "cpu"): script("training", out, "--length", "32", "--batch", "1", *quick),
    }


def test_a_record_has_machine_versions_and_what_ran(records: dict[tuple[str, str], dict[str, Any]]) -> None:
    for record in records.values():
        assert record["environment"]["versions"]["torch"] == torch.__version__
        assert record["environment"]["hardware"]["threads"] == torch.get_num_threads()
    operators = records["operators", "cpu"]
    assert operators["ours"] == "torch" and set(operators["not here"]) == {"triton", "fla"}
    assert operators["sdpa kernels"] == ["flash_for_cpu"]
    assert records["prefill", "cpu"]["backends"]["mixers"] == {"lightning": "torch", "softmax": "sdpa"}
    assert [row["stage"] for row in records["training", "cpu"]["rows"]] == ["align", "distil"]


def test_every_linear_mixer_is_measured_against_its_definition(tmp_path, capsys, monkeypatch) -> None:  # type: ignore[no-untyped-def]
    module = module_of("surgery")
    monkeypatch.setattr(module, "SHAPES", ((2, 8),))
    module.main(["mixers", "--tokens", "70", "-o", str(tmp_path)])
    rows = json.loads((tmp_path / "mixers.json").read_text())["rows"]
    linear = set(MIXERS.built_in()) - {"softmax", "sliding_window"}
    assert {row["mixer"] for row in rows} == linear and all(row["naive over torch"] > 0 for row in rows)
    assert capsys.readouterr().out.count("in chunks") == len(linear)


def test_the_commands_of_the_page_are_the_scripts() -> None:
    lines = re.findall(r"python benchmarks/(\w+)\.py (.*)", (ROOT / "docs" / "kernels.md").read_text())
    assert len(lines) == 6
    for name, words in lines:
        module_of(name).arguments(shlex.split(words, comments=True))


def test_what_cannot_be_measured_or_written_is_one_line(tmp_path, capsys) -> None:  # type: ignore[no-untyped-def]
    short = ["--contexts", "64", "--rounds", "1", "--seconds", "1"]
    (tmp_path / "file").touch()
    for words in (["--generate-up-to", "0"], ["-o", str(tmp_path / "file" / "r.json")], ["--device", "cuda"]):
        if words == ["--device", "cuda"] and torch.cuda.is_available():
            continue
        with pytest.raises(SystemExit) as exit_:
            module_of("decode").main(["--device", "cpu", *short, *words])
        assert exit_.value.code in (1, 2)
        assert len([line for line in capsys.readouterr().err.splitlines() if line.startswith("error: ")]) == 1


def test_gradients_are_measured_as_far_as_asked(records: dict[tuple[str, str], dict[str, Any]]) -> None:
    short, long = records["operators", "cpu"]["rows"]
    assert set(short["forward and gradients"]) == {"torch", "sdpa"} and not long["forward and gradients"]
    assert short["forward and gradients"]["torch"]["min"] > short["forward"]["torch"]["min"]


def test_the_tables_say_what_the_records_say(records: dict[tuple[str, str], dict[str, Any]]) -> None:
    text = speed(records)
    row = records["operators", "cpu"]["rows"][0]
    row["forward"]["torch"]["median"], row["sdpa over ours"] = 0.0125, 6.25
    records["decode", "cpu"]["rows"][0]["of the bytes"] = 0.815
    records["loss", "cpu"]["time"]["torch"]["speed"] = 7.75
    changed = speed(records)
    assert "0.815" in changed and "7.75x" in changed
    assert "12.5" in changed and "6.25x" in changed and changed != text
    assert "2 of 10 layers softmax" in text and "8 heads x 64" in text


def test_what_has_no_record_is_said_to_be_unmeasured(records: dict[tuple[str, str], dict[str, Any]]) -> None:
    assert "Unmeasured on a GPU" in speed(records) and "Unmeasured on a CPU" not in speed(records)
    assert "Unmeasured on a CPU" in speed({})
    on_gpu = {**records["training", "cpu"], "device": "cuda"}
    on_gpu["environment"] = {**on_gpu["environment"], "hardware": {"gpu": "H200"}}
    gpu_missing = speed({**records, ("training", "cuda"): on_gpu}).split("Unmeasured on a GPU")[1]
    assert "benchmarks/training.py" not in gpu_missing and "benchmarks/prefill.py" in gpu_missing


def test_forms_take_turns_in_alternating_order_and_running_out_of_memory_is_a_result() -> None:
    order: list[str] = []

    def fail() -> None:
        raise torch.OutOfMemoryError("CUDA out of memory")

    forms = {"a": lambda: order.append("a"), "b": lambda: order.append("b"), "c": fail}
    found = in_turns(forms, torch.device("cpu"), seconds=60, rounds=3)
    assert "".join(order) == "ab" + "ba" + "ab" + "ba"
    assert found["a"].n == 3 and found["c"] == Timed(error="out of memory")
    assert ratio(found["c"], found["a"]) is None


def test_a_fault_that_is_no_lack_of_memory_is_not_hidden() -> None:
    def fail() -> None:
        raise RuntimeError("shapes do not match")

    with pytest.raises(RuntimeError, match="shapes"):
        in_turns({"a": fail}, torch.device("cpu"), seconds=1, rounds=1)
