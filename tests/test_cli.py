"""The command line as a user runs it: a Llama folder in, a leaderboard out, and one clear line for every mistake."""

from __future__ import annotations

import io
import json
import os
import re
import signal
import subprocess
import sys
import time
from contextlib import redirect_stderr, redirect_stdout
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from tests.conftest import make_pico
from tests.released_hypenet import write_released

ROOT = Path(__file__).resolve().parents[1]
SHARED = ROOT.parent / "shared"
HALOBENCH = [sys.executable, "-m", "halobench"]
SMALL = [
    "align.tokens=2048", "align.batch_tokens=512", "align.lengths=[128]",
    "selection.length=320", "selection.haystacks=2", "selection.items=4",
    "selection.kl_sequences=2", "selection.kl_length=64",
    "distil.tokens=2048", "distil.batch_tokens=512", "distil.lengths=[128]",
    "finetune.tokens=1024", "finetune.batch_tokens=512", "finetune.lengths=[256]",
    "scale.lengths=[256]", "scale.sequences=1", "scale.candidates=[100, 500]",
]  # fmt: skip


def sets(values: list[str]) -> list[str]:
    return [part for value in values for part in ("--set", value)]


@pytest.fixture(scope="module")
def place(tmp_path_factory) -> Path:  # type: ignore[no-untyped-def]
    return tmp_path_factory.mktemp("cli")


@pytest.fixture(scope="module")
def llama(place: Path, bpe) -> Path:  # type: ignore[no-untyped-def]
    """A Llama-architecture model folder, as one would download it."""
    folder = place / "llama"
    make_pico("llama", vocab_size=len(bpe), bos_token_id=0, eos_token_id=0, pad_token_id=0).save_pretrained(folder)
    bpe.save_pretrained(folder)
    return folder


def run(place: Path, *arguments: object, check: bool = True) -> subprocess.CompletedProcess[str]:
    """The command line's own entry in this process: what a shell would start, without its seconds of imports."""
    from halobench.cli import main

    out, err = io.StringIO(), io.StringIO()
    with pytest.MonkeyPatch.context() as patch, redirect_stdout(out), redirect_stderr(err):
        patch.setattr(sys, "argv", ["halobench", *map(str, arguments)])
        patch.setenv("HALOBENCH_CACHE", str(place / "cache"))
        patch.chdir(place)
        with pytest.raises(SystemExit) as stopped:
            main()
    found = subprocess.CompletedProcess(arguments, int(stopped.value.code or 0), out.getvalue(), err.getvalue())
    if check:
        assert found.returncode == 0, found.stderr
    return found


def in_a_shell(place: Path, *arguments: object) -> subprocess.CompletedProcess[str]:
    """The command as a user starts it."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "HALOBENCH_CACHE": str(place / "cache"), "COLUMNS": "120"}
    found = subprocess.run(
        [*HALOBENCH, *map(str, arguments)], cwd=place, env=environment, capture_output=True, text=True, check=False
    )
    assert found.returncode == 0, found.stderr
    return found


@pytest.fixture(scope="module")
def converted(place: Path, llama: Path) -> Path:
    """The Llama turned into a hybrid by the command line."""
    run(place, "convert", llama, "-o", "run", "--keep", 2, *sets(SMALL))
    return place / "run"


def test_a_llama_folder_becomes_a_hybrid_that_transformers_loads(converted: Path) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    import halobench.surgery  # noqa: F401

    model = AutoModelForCausalLM.from_pretrained(converted / "model")
    tokenizer = AutoTokenizer.from_pretrained(converted / "model")
    answer = model.generate(**tokenizer("The capital", return_tensors="pt"), max_new_tokens=4, do_sample=False)
    assert answer.shape[1] > 4
    card = json.loads((converted / "model" / "halobench.json").read_text())
    assert len(card["kept"]) == 2
    assert [row["what"].split()[0] for row in card["ledger"]] == ["align", "select", "distil", "finetune", "scale"]
    assert all(row["tokens"] > 0 and row["seconds"] > 0 for row in card["ledger"])


def test_a_stage_without_a_budget_is_passed_over(place: Path, llama: Path, converted: Path) -> None:
    more = sets([*SMALL, "finetune.tokens=0", "scale=null"])
    run(place, "convert", llama, "-o", "short", "--layers", "1,2", "--aligned", "run", *more)
    card = json.loads((place / "short" / "model" / "halobench.json").read_text())
    assert card["trained_length"] == 128
    distilled, finished = (load_file(place / "short" / d / "model.safetensors") for d in ("distil/model", "model"))
    assert all(torch.equal(distilled[name], finished[name]) for name in distilled)


def test_every_stage_names_the_weights_it_came_from(converted: Path) -> None:
    notes = {s: json.loads((converted / s / "stage.json").read_text()) for s in ("align", "distil", "finetune")}
    assert notes["distil"]["came_from"] == notes["align"]["hash"]
    assert notes["finetune"]["came_from"] == notes["distil"]["hash"]


def test_repeating_the_command_does_no_work_twice(place: Path, llama: Path, converted: Path) -> None:
    before = {p: p.stat().st_mtime_ns for p in converted.rglob("*.safetensors")}
    run(place, "convert", llama, "-o", "run", "--keep", 2, *sets(SMALL))
    assert before == {p: p.stat().st_mtime_ns for p in converted.rglob("*.safetensors")}


def test_selectors_rank_the_aligned_run(place: Path, converted: Path) -> None:
    from halobench.surgery.selection import SELECTORS

    found = json.loads(run(place, "select", "run", "--json").stdout)
    assert found["keep"] == 2
    trained = {"flashmorph", "postnas", "joint", "given"}  # these run only when named, or have no layers
    assert set(found["methods"]) == set(SELECTORS.names()) - trained
    for answer in found["methods"].values():
        assert len(answer["layers"]) == 2 and len(answer["scores"]) == 4
    assert found["methods"]["kl-ls"]["cost_tokens"] > 0
    assert len(found["methods"]["halo"]["stderr"]) == 4


def test_teacher_and_hybrid_are_measured_and_reported_together(place: Path, llama: Path, converted: Path) -> None:
    run(place, "eval", llama, "run", "-o", "eval", "--suite", "csr,niah,ppl", "--lengths", "300", "--limit", 3)
    again = run(place, "eval", "run", "-o", "eval", "--suite", "csr,niah,ppl", "--lengths", "300", "--limit", 3)
    assert again.stderr.count("done before") == 3
    run(place, "profile", llama, "run", "--context", "128,512", "-o", "eval")
    run(place, "report", "eval", "-o", "report")
    text = (place / "report" / "leaderboard.md").read_text()
    assert "llama" in text and "HALO" in text and "±" in text
    assert (place / "report" / "needles.png").stat().st_size > 10_000
    record = json.loads(next((place / "eval").glob("halo*.eval.record.json")).read_text())
    assert record["environment"]["versions"]["torch"] and record["model"]["kept"] is not None
    assert {m["suite"] for m in record["metrics"]} == {"csr", "niah", "ppl"}


def test_a_conversion_killed_half_way_resumes_to_the_same_weights(place: Path, llama: Path, converted: Path) -> None:
    command = [*HALOBENCH, "convert", str(llama), "-o", "killed", "--keep", "2", *sets(SMALL)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "HALOBENCH_CACHE": str(place / "cache")}
    process = subprocess.Popen(command, cwd=place, env=environment, stderr=subprocess.DEVNULL)
    deadline = time.monotonic() + 120
    while not (place / "killed" / "distil" / "metrics.jsonl").exists() and time.monotonic() < deadline:
        time.sleep(0.02)
    process.send_signal(signal.SIGKILL)
    process.wait()
    unfinished = run(place, "eval", "killed", check=False)
    assert unfinished.returncode == 2 and "is not finished" in unfinished.stderr
    run(place, *command[3:])
    whole, resumed = (
        load_file(place / name / "finetune" / "model" / "model.safetensors") for name in ("run", "killed")
    )
    assert all(torch.equal(whole[name], resumed[name]) for name in whole)


def test_ctrl_c_leaves_a_run_that_the_same_command_resumes(place: Path, llama: Path) -> None:
    command = ["convert", str(llama), "-o", "stopped", "--until", "align", *sets([*SMALL, "align.tokens=40000"])]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "HALOBENCH_CACHE": str(place / "cache")}
    process = subprocess.Popen([*HALOBENCH, *command], cwd=place, env=environment, stderr=subprocess.PIPE, text=True)
    log = place / "stopped" / "align" / "metrics.jsonl"
    deadline = time.monotonic() + 120
    while not (log.exists() and log.read_text().count("\n") > 3) and time.monotonic() < deadline:
        time.sleep(0.02)
    process.send_signal(signal.SIGINT)
    _, said = process.communicate(timeout=60)
    assert process.returncode == 130
    assert said.strip().splitlines()[-1] == "error: interrupted; run the same command again to resume"
    steps = log.read_text().count("\n")
    assert 0 < steps < 78
    run(place, *command)
    assert log.read_text().count("\n") == 78


def test_plan_needs_no_weights_and_knows_the_released_size(place: Path) -> None:
    found = json.loads(run(place, "plan", "qwen3-1.7b", "--recipe", "halo-qwen3-1.7b", "--json").stdout)
    assert found["hybrid_parameters"] == pytest.approx(1.926e9, rel=2e-3)
    assert sum(row["becomes"] == "softmax" for row in found["layers"]) == 7
    row = next(m for m in found["memory"] if m["length"] == 128 * 1024)
    assert row["teacher"] == 28 * 2 * 8 * 128 * 2 * 128 * 1024
    assert row["kv"] * 4 == row["teacher"]


def test_plan_prints_one_json_document_and_nothing_else_on_stdout(place: Path) -> None:
    found = in_a_shell(place, "plan", "qwen3-8b", "--budget", "kv=4GB@128k", "--lengths", "4k,128k", "--json")
    assert found.stdout.count("\n") == 1
    drawn = json.loads(found.stdout)
    assert drawn["budget"]["keep"] == len(drawn["kept"]) == 7 and drawn["budget"]["budget"]["size"] == 4 * 10**9
    assert [row["length"] for row in drawn["flops"]] == [4096, 131072]
    assert {kind["mixer"] for kind in drawn["mixers"]} == {"lightning", "softmax"}
    assert [row["stage"] for row in drawn["stages"]] == ["align", "distil", "finetune"] and drawn["assumption"]


def test_plan_fits_a_screen_of_100_columns_and_merges_layers_that_are_alike(place: Path) -> None:
    text = run(place, "plan", "qwen3-8b", "--layers", "1,2,4,6,7,10,24,33,34", "--mixer", "lightning").stdout
    lines = text.splitlines()
    assert max(map(len, lines)) <= 100 and len(lines) < 60
    named = [line.split()[1] for line in lines if "heads of 128" in line]
    assert named == ["0", "1-2", "3", "4", "5", "6-7", "8-9", "10", "11-23", "24", "25-32", "33-34", "35"]
    assert "300 TFLOP/s (an estimate)" in text and "evenly spaced" not in text


def test_plan_takes_a_config_file_alone(place: Path, llama: Path) -> None:
    alone = place / "alone.json"
    alone.write_text((llama / "config.json").read_text())
    found = json.loads(run(place, "plan", alone, "--json").stdout)
    assert found == {**json.loads(run(place, "plan", llama, "--json").stdout), "teacher": str(alone)}


PLAN_MISTAKES: list[tuple[list[str], str]] = [
    (["qwen3-9b"], "did you mean 'qwen3-8b'? give a model folder"),
    (["nothing"], "or a shape: llama-3.2-3b, qwen3-0.6b, qwen3-1.7b, qwen3-4b, qwen3-8b"),
    (["tiny", "--mixer", "lightening"], "did you mean 'lightning'"),
    (["tiny", "--mixer", "softmax"], "nothing to convert"),
    (["tiny", "--layers", "99"], "keep names layer 99; the model's layers are 0 to"),
    (["tiny", "--layers", "two"], "write --layers 2,7"),
    (["tiny", "--keep", "99"], "keep=99 layers of"),
    (["tiny", "--keep", "0.01"], "less than one"),
    (["tiny", "--keep", "2", "--layers", "1"], "--layers and --keep each say"),
    (["tiny", "--keep", "2", "--budget", "kv=1MB@4k"], "--keep and --budget each say"),
    (["tiny", "--layers", "1", "--budget", "kv=1MB@4k"], "--layers and --budget each say"),
    (["tiny", "--budget", "4GB"], "write --budget kv=4GB@128k"),
    (["tiny", "--budget", "kv=4@128k"], "write 4GB, 3.5GiB or 512MiB"),
    (["qwen3-8b", "--budget", "kv=500MB@128k"], "no softmax layer fits; one needs 512 MiB of KV"),
    (["tiny", "--budget", "kv=1TB@4k"], "nothing needs converting"),
    (["tiny", "--lengths", "4q"], "not a number of tokens"),
]


@pytest.mark.parametrize(("arguments", "expected"), PLAN_MISTAKES)
def test_a_mistake_in_a_plan_is_one_clear_line(place: Path, arguments: list[str], expected: str) -> None:
    found = run(place, "plan", *arguments, check=False)
    assert found.returncode == 2 and found.stdout == ""
    assert found.stderr.startswith("error: ") and found.stderr.count("\n") == 1
    assert expected in found.stderr


def test_a_hybrid_is_no_teacher_for_a_plan(place: Path, converted: Path) -> None:
    found = run(place, "plan", converted, check=False)
    assert found.returncode == 2 and "is a hybrid already" in found.stderr


@pytest.mark.skipif(not SHARED.exists(), reason="the published sweep is not here")
def test_published_scores_give_the_released_layers(place: Path) -> None:
    scores = SHARED / "sweeps" / "qwen3-1.7b.json"
    found = json.loads(run(place, "select", "--scores", scores, "--keep", 7, "--json").stdout)["methods"]
    assert found["halo"]["layers"] == [2, 3, 6, 8, 9, 21, 25]
    assert found["jet-nemotron"]["ranking"][:7] == [0, 21, 25, 19, 6, 11, 9]


def mistakes(llama: Path) -> list[tuple[list[object], str]]:
    broken = llama.parent / "broken"
    if not broken.exists():
        broken.mkdir()
        (broken / "config.json").write_text((llama / "config.json").read_text())
        (broken / "model.safetensors").write_bytes((llama / "model.safetensors").read_bytes()[:5000])
        (llama.parent / "odd.yaml").write_text("name: odd\nmixr: lightning\n")
        (llama.parent / "empty.jsonl").write_text("")
        (llama.parent / "full").mkdir()
        (llama.parent / "full" / "note.txt").write_text("mine")
    return [
        (["convert", "/no/such/model", "-o", "x"], "not found"),
        (["convert", "tyni", "-o", "x"], "not found"),
        (["convert", llama, "-o", "x", "--mixer", "lightening"], "did you mean 'lightning'"),
        (["convert", llama, "-o", "x", "--select", "hallo"], "did you mean 'halo'"),
        (["convert", llama, "-o", "x", "--keep", "9", *sets(SMALL)], "keep=9 layers of 4"),
        (["convert", llama, "-o", "x", "--until", "destil"], "did you mean 'distil'"),
        (["convert", llama, "-o", "x", "--recipe", "halo-tini"], "did you mean 'halo-tiny'"),
        (["convert", llama, "-o", "x", "--recipe", "odd.yaml"], "did you mean 'mixer'"),
        (["convert", llama, "-o", "x", "--set", "distil.tokns=3"], "did you mean 'tokens'"),
        (["convert", llama, "-o", "x", "--set", "distil.tokens=many"], "must be int"),
        (["convert", llama, "-o", "x", "--data", "no/such/file.txt"], "not found"),
        (["convert", llama, "-o", "y", "--data", "empty.jsonl", *sets(SMALL)], "no text"),
        (["convert", llama, "-o", "full"], "choose another -o"),
        (["convert", "broken", "-o", "x"], "damaged"),
        (["eval", llama, "-o", "x", "--suite", "nia"], "did you mean 'niah'"),
        (["eval", llama, "-o", "x", "--lengths", "4q"], "not a number of tokens"),
        (["eval", llama, "-o", "x", "--suite", "niah", "--lengths", "20"], "no room"),
        (["select", "run", "--scores", "file"], "not both"),
        (["select", "full"], "no aligned checkpoint"),
        (["report", "full"], "no records"),
        (["profile", llama, "--device", "tpu"], "use cpu or cuda"),
        (["convrt"], "convert"),
        (["eval", llama, "--limt", "3"], "--limit"),
    ]


@pytest.mark.parametrize("number", range(23))
def test_a_mistake_is_one_clear_line(place: Path, llama: Path, number: int) -> None:
    arguments, expected = mistakes(llama)[number]
    found = run(place, *arguments, check=False)
    lines = found.stderr.strip().splitlines()
    assert expected in lines[-1], found.stderr
    assert lines[-1].startswith("error: ") and "Traceback" not in found.stderr
    assert found.returncode == (1 if "no records" in expected else 2)
    assert not list(place.rglob("*.tmp"))


def test_another_run_in_the_output_folder_is_refused(place: Path, llama: Path, converted: Path) -> None:
    found = run(place, "convert", llama, "-o", "run", "--keep", 1, *sets(SMALL), check=False)
    assert found.returncode == 2
    assert "holds another run: recipe.keep is 2 there and 1 here" in found.stderr


def test_help_answers_at_once() -> None:
    times = []
    for _ in range(5):
        started = time.perf_counter()
        subprocess.run([*HALOBENCH, "--help"], check=True, capture_output=True)
        times.append(time.perf_counter() - started)
    assert min(times) < 0.5


def shape_of(model: Path, folder: Path) -> Path:
    """A folder with a model's config and no weights."""
    folder.mkdir(exist_ok=True)
    (folder / "config.json").write_bytes((model / "config.json").read_bytes())
    return folder


def test_the_readmes_commands_run(place: Path, llama: Path) -> None:
    """Every halobench command of README.md, on a pico model and a small budget."""
    text = (ROOT / "README.md").read_text()
    commands = re.findall(r"^    halobench (.*?)(?:  #.*)?$", text, flags=re.MULTILINE)
    assert len(commands) >= 7
    small = [*SMALL, "selection.restore_tokens=1024"]
    hypenet = write_released(place / "hypenet")
    if SHARED.exists():
        (place / "scores.json").write_text((SHARED / "sweeps" / "qwen3-1.7b.json").read_text())
    for command in commands:
        words = [str(llama) if word == "MODEL" else word for word in command.split()]
        words = [str(hypenet) if word == "HYPENET" else word for word in words]
        words = [
            f"preset:{shape_of(llama, place / word[7:])}" if word.startswith("preset:") else word for word in words
        ]
        words = ["300,512" if word == "4k,32k" else word for word in words]
        if words[0] == "convert":
            words += ["--data", "sample", *sets(small)]
        if words[0] == "eval":
            words += ["--limit", "2"]
        if words[0] == "tune-scale":
            words[words.index("--lengths") + 1] = "300,512"
            words += ["--sequences", "2", "--candidates", "none,100", "--refine", "0"]
        if words[0] == "oracle":
            continue  # tests/test_oracle.py runs it
        if words[:2] == ["select", "runs/mine"]:
            words[words.index("--keep") + 1] = "1"
        if "scores.json" in words and not SHARED.exists():
            continue
        in_a_shell(place, *words)
    assert (place / "runs" / "mine-report" / "leaderboard.md").exists()


def test_kl_ls_re_distils_each_candidate_when_it_has_a_budget(place: Path, llama: Path) -> None:
    more = [*SMALL, "selection.restore_tokens=1024", "selector_options.kl-ls.budget=redistilled"]
    run(place, "convert", llama, "-o", "again", "--keep", 1, "--select", "kl-ls", "--until", "select", *sets(more))
    choice = json.loads((place / "again" / "select" / "choice.json").read_text())
    assert choice["cost_tokens"] == 4 * (2 * 64 + 1024)
    (folder,) = (place / "again" / "select").glob("redistilled-*")
    answers = [json.loads((folder / f"layer-{layer}.json").read_text()) for layer in range(4)]
    assert len({answer["train_kl"] for answer in answers}) == 4
    assert all(answer["tokens"] == 2 * 64 + 1024 for answer in answers)
    assert choice["layers"] == [min(range(4), key=lambda layer: answers[layer]["train_kl"])]


def test_a_stage_killed_after_its_training_is_finished_by_the_same_command(place: Path, llama: Path) -> None:
    """The last checkpoint is there, and what a finished stage leaves is not."""
    import shutil

    command = ["convert", llama, "-o", "late", "--until", "align", *sets(SMALL)]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("halobench.run.RunFolder.finish", lambda *_: sys.exit(9))
        assert run(place, *command, check=False).returncode == 9
    shutil.rmtree(place / "late" / "align" / "mixers")
    run(place, *command)
    note = json.loads((place / "late" / "align" / "stage.json").read_text())
    assert len(note["details"]["relative_error"]) == 4
    assert not (place / "late" / "align" / "checkpoints").exists()
