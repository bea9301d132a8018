"""Several processes: the curve and weights of one, by DDP and by FSDP2, and what happens when their number changes."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from halobench.errors import UserError
from halobench.surgery.loop import Loop
from halobench.surgery.optim import OptimConfig
from halobench.surgery.parallel import Team, membership
from halobench.surgery.stages.align import Alignment
from halobench.surgery.stages.distil import Distillation
from halobench.surgery.stages.language import LanguageModelling
from halobench.surgery.transplant import build_mixers
from tests.conftest import make_pico
from tests.pico_training import ENVIRONMENT, PLAIN, Numbers, checkpoints, config, losses, moments, rows, train, weights

# 5 sequences a step in micro-batches of 2: one process of two has 3 of them, the other 2.
UNEVEN = {"tokens": 480, "batch_tokens": 80, "lengths": [16], "micro_batch_tokens": 32, "optim": PLAIN}
ADAM = {"tokens": 384, "optim": PLAIN}
MUON = {"tokens": 256, "optim": OptimConfig(rate=1e-2, matrix_rate=1e-2, warmup_steps=2)}


def language(folder: Path, **changes: object) -> None:
    train(folder, **changes)


def distil(folder: Path, **changes: object) -> None:
    student, teacher = make_pico(seed=1).train(), make_pico().requires_grad_(False)
    objective = Distillation(student, teacher, temperature=2.0, ce_share=0.25)
    Loop(folder, objective, Numbers(), config(**changes)).run()
    assert not any(hasattr(p, "placements") for p in student.state_dict().values())  # whole, so that it can be saved


def align(folder: Path, **changes: object) -> None:
    teacher = make_pico().requires_grad_(False)
    torch.manual_seed(0)
    mixers = {layer: mixer.train() for layer, mixer in build_mixers(teacher, "lightning").items()}
    Loop(folder, Alignment(teacher, mixers, relative=True), Numbers(), config(**changes)).run()


def resumed(folder: Path, **changes: object) -> None:
    """Stops in the middle by a signal to this process alone, then goes on."""
    loop = Loop(folder, LanguageModelling(make_pico().train(), "test"), Numbers(), config(**changes))
    one_step = loop._one_step

    def stopped(steps: int, first: bool) -> object:
        if loop.step == 2 and loop.team.rank == 1:
            os.kill(os.getpid(), 15)
        return one_step(steps, first)

    loop._one_step = stopped  # type: ignore[method-assign, assignment]
    with pytest.raises(KeyboardInterrupt):
        loop.run()
    assert loop.step == 3
    train(folder, **changes)


WORK: dict[str, tuple[Callable[..., None], dict]] = {
    "language": (language, UNEVEN),
    "distil": (distil, ADAM),
    "align": (align, ADAM),
    "muon": (language, MUON),
    "resumed": (resumed, ADAM),
}


def work(folder: Path, rank: int, ports: list[int]) -> None:
    """What one of two processes does: everything by DDP, then everything by FSDP2, then alone."""
    for kind, port in zip(("ddp", "fsdp2"), ports, strict=True):
        if kind == "fsdp2":
            os.environ |= {"ACCELERATE_USE_FSDP": "true", "FSDP_VERSION": "2"}
        with membership(rank, 2, port):
            assert Team.join() == Team(rank, 2, kind == "fsdp2")
            for name, (job, changes) in WORK.items():
                job(folder / kind / name, **changes)
    assert Team.join() == Team()
    del os.environ["ACCELERATE_USE_FSDP"]
    if rank == 0:
        train(folder / "alone", **ADAM)


def _free_ports(count: int) -> list[int]:
    sockets = [socket.socket() for _ in range(count)]
    for each in sockets:
        each.bind(("127.0.0.1", 0))
    ports = [each.getsockname()[1] for each in sockets]
    for each in sockets:
        each.close()
    return ports


@pytest.fixture(scope="module")
def two(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of two processes' work."""
    folder = tmp_path_factory.mktemp("two")
    ports = _free_ports(2)
    calls = [f"from tests.test_parallel import work, Path; work(Path({str(folder)!r}), {r}, {ports})" for r in (0, 1)]
    commands = [[sys.executable, "-c", call] for call in calls]
    processes = [subprocess.Popen(c, env=ENVIRONMENT, stderr=subprocess.PIPE, text=True) for c in commands]
    said = [process.communicate(timeout=300)[1] for process in processes]
    assert [process.returncode for process in processes] == [0, 0], "\n".join(said)
    return folder


@pytest.fixture(scope="module")
def one(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of the same work by one process."""
    folder = tmp_path_factory.mktemp("one")
    for name, (job, changes) in WORK.items():
        (language if job is resumed else job)(folder / name, **changes)
    return folder


@pytest.mark.parametrize("kind", ["ddp", "fsdp2"])
@pytest.mark.parametrize("name", ["language", "distil", "align", "resumed"])
def test_two_processes_make_the_curve_and_the_weights_of_one(one: Path, two: Path, kind: str, name: str) -> None:
    assert losses(two / kind / name) == pytest.approx(losses(one / name), rel=1e-5)
    first, second = weights(one / name), weights(two / kind / name)
    assert first.keys() == second.keys()
    for tensor in first:
        torch.testing.assert_close(second[tensor], first[tensor], rtol=0, atol=1e-5)
    for tensor, value in moments(one / name).items():
        torch.testing.assert_close(moments(two / kind / name)[tensor], value, rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize("kind", ["ddp", "fsdp2"])
def test_muon_makes_the_same_curve_within_the_rounding_of_its_bf16(one: Path, two: Path, kind: str) -> None:
    """Muon orthogonalises in bf16, so that another order of sums is seen in the third digit of an update."""
    assert losses(two / kind / "muon") == pytest.approx(losses(one / "muon"), rel=1e-3)


def test_a_process_that_leaves_its_team_trains_alone_as_one_that_never_joined(two: Path, tmp_path: Path) -> None:
    train(tmp_path, **ADAM)
    assert losses(two / "alone") == losses(tmp_path)


def test_held_out_loss_is_the_same_whoever_shares_it(one: Path, two: Path) -> None:
    def measured(folder: Path) -> tuple[float, float]:
        result = json.loads((checkpoints(folder)[-1] / "state.json").read_text())["result"]
        return result["held_out_before"], result["held_out_after"]

    for kind in ("ddp", "fsdp2"):
        assert measured(two / kind / "distil") == pytest.approx(measured(one / "distil"), rel=1e-5)


def test_resuming_with_another_number_of_processes_says_both_and_loses_nothing(two: Path) -> None:
    folder = two / "ddp" / "language"
    before = [path.read_bytes() for path in checkpoints(folder)[-1].iterdir()]
    with pytest.raises(UserError, match="begun with 2 processes and there are 1 now; start 2"):
        train(folder, **UNEVEN)
    assert [path.read_bytes() for path in checkpoints(folder)[-1].iterdir()] == before
    assert len(rows(folder)) == 6


def test_every_sequence_of_a_batch_is_one_processes_own() -> None:
    shares = [list(Team(rank, 2).share(5)) for rank in (0, 1)]
    assert sorted(shares[0] + shares[1]) == list(range(5))
    assert Team(0, 2).passes(5, 2) == Team(1, 2).passes(5, 2) == 2


def test_fsdp_of_the_first_version_is_refused(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("ACCELERATE_USE_FSDP", "true")
    monkeypatch.setenv("FSDP_VERSION", "1")
    with pytest.raises(UserError, match="--fsdp_version 2"):
        train(tmp_path)
