"""Checkpoints: stopped or killed at any moment, a run ends with the bits of one that was left alone."""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from halobench.errors import HalobenchError, UserError
from halobench.surgery import training_state
from tests.pico_training import ENVIRONMENT, checkpoints, config, losses, make_loop, moments, rows, same, train, weights

OFTEN = {"tokens": 64 * 60, "save_every_seconds": 0.0}  # a checkpoint after every step


def run_and_kill(folder: Path, condition: str, steps: int = 60) -> None:
    """Trains in a process of its own that is killed (SIGKILL) in the place that `condition` says."""
    script = f"""
import os, signal, sys
from pathlib import Path
from halobench.surgery import training_state
from tests.pico_training import make_loop
def die(): os.kill(os.getpid(), signal.SIGKILL)
folder = Path({str(folder)!r})
loop = make_loop(folder, tokens=64 * {steps}, save_every_seconds=0.0)
{condition}
loop.run()
"""
    process = subprocess.run([sys.executable, "-c", script], env=ENVIRONMENT, capture_output=True, text=True)
    assert process.returncode == -signal.SIGKILL, process.stderr


# Each begins where the one before was killed.
KILLS = {
    "between two steps": """
one_step = loop._one_step
def stop(steps, first):
    if loop.step == 7: die()
    return one_step(steps, first)
loop._one_step = stop
""",
    "in the middle of a file": """
save_file = training_state.save_file
def half(tensors, path):
    save_file(tensors, path)
    if loop.step == 15 and path.name == "optimizer.safetensors":
        os.truncate(path, path.stat().st_size // 2)
        die()
training_state.save_file = half
""",
    "before the renaming": """
write_json = training_state.write_json
def stop(path, value):
    write_json(path, value)
    if loop.step == 22: die()
training_state.write_json = stop
""",
}


def test_killed_between_steps_and_in_the_middle_of_saving_it_ends_with_the_same_bits(tmp_path: Path) -> None:
    for condition in KILLS.values():
        run_and_kill(tmp_path / "killed", condition)
    assert len(losses(tmp_path / "killed")) == 22 and len(checkpoints(tmp_path / "killed")) == 2
    result = train(tmp_path / "killed", **OFTEN)
    train(tmp_path / "whole", tokens=OFTEN["tokens"])
    assert result.resumed
    assert same(weights(tmp_path / "whole"), weights(tmp_path / "killed"))
    assert same(moments(tmp_path / "whole"), moments(tmp_path / "killed"))
    assert losses(tmp_path / "whole") == losses(tmp_path / "killed") == result.losses
    assert [row["step"] for row in rows(tmp_path / "killed")] == list(range(1, 61))
    assert not list((tmp_path / "killed" / "checkpoints").glob(".*"))


@pytest.mark.slow
def test_killed_at_twenty_random_moments_it_ends_with_the_same_bits(tmp_path: Path) -> None:
    """A process reports when it begins to train, and is killed a random time after."""
    script = f"""
from pathlib import Path
from tests.pico_training import make_loop
loop = make_loop(Path({str(tmp_path / "killed")!r}), tokens=64 * 4000, save_every_seconds=0.02)
print(flush=True)
loop.run()
"""
    rng = random.Random(0)
    kills = 0
    while kills < 20:
        process = subprocess.Popen(
            [sys.executable, "-c", script], env=ENVIRONMENT, stdout=subprocess.PIPE, stderr=subprocess.PIPE
        )
        assert process.stdout is not None
        process.stdout.readline()
        time.sleep(rng.uniform(0.0, 2.0))
        assert process.poll() is None, "it ended before it was killed twenty times: give it more steps"
        process.kill()
        process.communicate()
        kills += 1
    done = len(losses(tmp_path / "killed"))
    assert done > 20
    # The steps that were made, and no more, are what an uninterrupted run would have made of them.
    loop = make_loop(tmp_path / "killed", tokens=64 * 4000, save_every_seconds=0.02)
    loop._resume()
    reached = loop.step
    whole = make_loop(tmp_path / "whole", tokens=64 * 4000, save_every_seconds=1e9)
    one_step = whole._one_step

    def stop(steps: int, first: bool) -> object:
        if whole.step == reached - 1:
            whole._interrupted = lambda: True
        return one_step(steps, first)

    whole._one_step = stop  # type: ignore[method-assign, assignment]
    with pytest.raises(KeyboardInterrupt):
        whole.run()
    assert same(dict(loop.named), dict(whole.named))
    assert loop.result.losses == whole.result.losses


def test_a_signal_lets_the_step_end_saves_and_stops(tmp_path: Path) -> None:
    train(tmp_path / "whole")
    loop = make_loop(tmp_path / "cut")
    one_step = loop._one_step

    def stopping(steps: int, first: bool) -> object:
        if loop.step == 4:
            os.kill(os.getpid(), signal.SIGINT)
        return one_step(steps, first)

    loop._one_step = stopping  # type: ignore[method-assign, assignment]
    with pytest.raises(KeyboardInterrupt):
        loop.run()
    assert [path.name for path in checkpoints(tmp_path / "cut")] == ["step-000005"]
    train(tmp_path / "cut")
    assert same(weights(tmp_path / "whole"), weights(tmp_path / "cut"))


def test_the_last_checkpoints_are_kept_and_no_more(tmp_path: Path) -> None:
    train(tmp_path, save_every_seconds=0.0, keep_checkpoints=3)
    assert [path.name for path in checkpoints(tmp_path)] == ["step-000008", "step-000009", "step-000010"]


def cut(path: Path) -> None:
    os.truncate(path / "weights.safetensors", 5000)


def lose(path: Path) -> None:
    (path / "optimizer.safetensors").unlink()


def garble(path: Path) -> None:
    (path / "state.json").write_text("{")


def empty(path: Path) -> None:
    (path / "state.json").write_text("{}")


def flip(path: Path) -> None:
    whole = bytearray((path / "weights.safetensors").read_bytes())
    whole[-1] ^= 1
    (path / "weights.safetensors").write_bytes(whole)


@pytest.mark.parametrize(
    ("damage", "reason"),
    [
        (cut, "weights.safetensors has 5,000 bytes of"),
        (lose, "optimizer.safetensors is missing"),
        (garble, "state.json is missing or is not JSON"),
        (empty, "state.json lacks its fields"),
        (flip, "the bytes of weights.safetensors have changed"),
    ],
)
def test_a_damaged_checkpoint_is_passed_over_aloud(
    tmp_path: Path, capfd: pytest.CaptureFixture[str], damage: object, reason: str
) -> None:
    whole = train(tmp_path, save_every_seconds=0.0)
    final = weights(tmp_path)
    damage(checkpoints(tmp_path)[-1])  # type: ignore[operator]
    capfd.readouterr()
    result = train(tmp_path, save_every_seconds=0.0)
    said = capfd.readouterr().err
    assert f"step-000010 is damaged ({reason}" in said and "in favour of step-000009" in said
    assert result.losses == whole.losses and same(final, weights(tmp_path))
    assert [row["step"] for row in rows(tmp_path)] == list(range(1, 11))


def test_when_every_checkpoint_is_damaged_the_run_says_so_and_touches_nothing(tmp_path: Path) -> None:
    train(tmp_path, save_every_seconds=0.0)
    for path in checkpoints(tmp_path):
        cut(path)
    with pytest.raises(HalobenchError, match=r"step-000010 is damaged .*step-000009 is damaged .*none is left"):
        train(tmp_path)
    assert len(checkpoints(tmp_path)) == 2 and len(rows(tmp_path)) == 10


def test_a_disk_that_fills_up_is_one_clear_error_and_the_checkpoint_before_stays(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    save_file = training_state.save_file

    def full(tensors: dict, path: Path) -> None:
        if "step-000004" in str(path):
            raise OSError(28, "No space left on device")
        save_file(tensors, path)

    monkeypatch.setattr(training_state, "save_file", full)
    with pytest.raises(HalobenchError, match="no space left to write .*step-000004"):
        train(tmp_path, save_every_seconds=0.0)
    assert {path.name for path in (tmp_path / "checkpoints").iterdir()} == {"step-000002", "step-000003"}
    monkeypatch.undo()
    train(tmp_path, save_every_seconds=0.0)
    train(tmp_path.parent / f"{tmp_path.name}-whole")
    assert same(weights(tmp_path), weights(tmp_path.parent / f"{tmp_path.name}-whole"))


def test_the_error_of_safetensors_on_a_full_disk_is_understood(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from safetensors import SafetensorError

    def full(tensors: dict, path: Path) -> None:
        raise SafetensorError("Error while serializing: I/O error: No space left on device (os error 28)")

    monkeypatch.setattr(training_state, "save_file", full)
    with pytest.raises(HalobenchError, match="no space left to write"):
        train(tmp_path)


def test_resuming_with_other_settings_says_which_with_both_values(tmp_path: Path) -> None:
    train(tmp_path, tokens=128)
    changed = config(lengths=[16]).optim
    with pytest.raises(UserError) as caught:
        train(tmp_path, tokens=128, lengths=[16], optim=type(changed)(rate=0.5))
    assert "lengths is [16, 32] there and [16] here" in str(caught.value)
    assert "optim.rate is 0.01 there and 0.5 here" in str(caught.value)


def test_a_finished_stage_is_not_trained_again(tmp_path: Path) -> None:
    first = train(tmp_path)
    before = {path: path.read_bytes() for path in checkpoints(tmp_path)[-1].iterdir()}
    second = train(tmp_path)
    assert second.losses == first.losses and second.held_out_after == first.held_out_after
    assert {path: path.read_bytes() for path in checkpoints(tmp_path)[-1].iterdir()} == before


def test_a_checkpoint_holds_what_trains_and_no_teacher(tmp_path: Path) -> None:
    from halobench.surgery.loop import Loop
    from halobench.surgery.stages.distil import Distillation
    from tests.conftest import make_pico
    from tests.pico_training import Numbers

    student, teacher = make_pico(seed=1).train(), make_pico(num_hidden_layers=9).requires_grad_(False)
    Loop(tmp_path, Distillation(student, teacher), Numbers(), config(tokens=64)).run()
    assert weights(tmp_path).keys() == {name for name, _ in student.named_parameters()}
    state = json.loads((checkpoints(tmp_path)[-1] / "state.json").read_text())
    assert state["step"] == 1 and state["result"]["sequences"] and state["result"]["position"]
