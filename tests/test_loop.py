"""The training loop: exact resume, the same curve however the batch is cut, and errors that say where."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from halobench.errors import HalobenchError, UserError
from halobench.surgery.loop import Loop, LoopConfig
from halobench.surgery.optim import OptimConfig, rate_factor
from halobench.surgery.parallel import Team
from halobench.surgery.planted import Mixture
from halobench.surgery.stages.distil import Distillation
from halobench.surgery.stages.language import LanguageModelling
from tests.conftest import make_pico

PLAIN = OptimConfig(rate=1e-3, warmup_steps=2)


class Numbers:
    """Endless text of a small vocabulary, by index."""

    def window(self, index: int, length: int) -> np.ndarray:
        return np.random.default_rng(index).integers(3, 101, length)


def mixture() -> Mixture:
    return Mixture(Numbers(), None, 0.0, 0)


def config(**changes: object) -> LoopConfig:
    fields: dict = {
        "tokens": 640,
        "batch_tokens": 64,
        "lengths": [16, 32],
        "optim": OptimConfig(rate=1e-2, matrix_rate=1e-2, warmup_steps=2),
        "precision": "fp32",
    }
    return LoopConfig(**{**fields, **changes})


def trained(folder: Path, **changes: object) -> dict[str, torch.Tensor]:
    """A fresh pico model trained in `folder`, as its last checkpoint has it."""
    model = make_pico().train()
    Loop(folder, LanguageModelling(model, "test"), mixture(), config(**changes)).run()
    return load_file(folder / "checkpoint" / "weights.safetensors")


def losses(folder: Path) -> list[float]:
    return [json.loads(line)["loss"] for line in (folder / "metrics.jsonl").read_text().splitlines()]


def test_a_run_stopped_and_resumed_ends_with_the_same_bits(tmp_path: Path) -> None:
    whole = trained(tmp_path / "whole")
    model = make_pico().train()
    loop = Loop(tmp_path / "cut", LanguageModelling(model, "test"), mixture(), config())
    steps = iter(range(4))
    one_step = loop._one_step

    def until_stopped(total: int) -> float:
        if next(steps, None) is None:
            os.kill(os.getpid(), signal.SIGINT)
        return one_step(total)

    loop._one_step = until_stopped  # type: ignore[method-assign]
    with pytest.raises(KeyboardInterrupt):
        loop.run()
    resumed = trained(tmp_path / "cut")
    assert all(torch.equal(whole[name], resumed[name]) for name in whole)
    rows = [json.loads(line) for line in (tmp_path / "cut" / "metrics.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows] == list(range(1, 11))


KILLED = """
import sys
from pathlib import Path
from dataclasses import replace
import tests.test_loop as t
t.trained(Path(sys.argv[1]), tokens=64 * 400, save_every_seconds=0.05)
"""


def test_a_killed_process_resumes_to_the_same_bits(tmp_path: Path) -> None:
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(Path(__file__).resolve().parents[1])}
    process = subprocess.Popen([sys.executable, "-c", KILLED, str(tmp_path / "cut")], env=environment)
    log = tmp_path / "cut" / "metrics.jsonl"
    deadline = time.monotonic() + 120
    while time.monotonic() < deadline and not (log.exists() and log.read_text().count("\n") > 40):
        time.sleep(0.02)
    process.kill()
    process.wait()
    assert 0 < log.read_text().count("\n") < 400
    resumed = trained(tmp_path / "cut", tokens=64 * 400, save_every_seconds=0.05)
    whole = trained(tmp_path / "whole", tokens=64 * 400)
    assert all(torch.equal(whole[name], resumed[name]) for name in whole)


def test_resuming_with_another_recipe_says_what_changed(tmp_path: Path) -> None:
    trained(tmp_path)
    with pytest.raises(UserError, match="another lengths"):
        trained(tmp_path, lengths=[16])


def test_micro_batches_change_nothing_but_memory(tmp_path: Path) -> None:
    for name, size in (("whole", None), ("cut", 16)):
        trained(tmp_path / name, lengths=[16], optim=PLAIN, micro_batch_tokens=size)
    whole, cut = (losses(tmp_path / name) for name in ("whole", "cut"))
    assert whole == pytest.approx(cut, rel=1e-5)
    assert len(whole) == 10


def test_two_processes_share_every_batch_without_overlap() -> None:
    shares = [list(Team(rank, 2).share(5)) for rank in (0, 1)]
    assert sorted(shares[0] + shares[1]) == list(range(5))


TWO = """
import sys
from pathlib import Path
import tests.test_loop as t
team = t.Team.join()
model = t.make_pico().train()
settings = t.config(lengths=[16], optim=t.PLAIN)
t.Loop(Path(sys.argv[1]), t.LanguageModelling(model, "test"), t.mixture(), settings, team=team).run()
"""


def test_two_processes_make_the_curve_of_one(tmp_path: Path) -> None:
    (tmp_path / "two.py").write_text(TWO)
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(Path(__file__).resolve().parents[1])}
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    subprocess.run([*launch, str(tmp_path / "two.py"), str(tmp_path / "two")], env=environment, check=True)
    trained(tmp_path / "one", lengths=[16], optim=PLAIN)
    assert losses(tmp_path / "two") == pytest.approx(losses(tmp_path / "one"), rel=1e-5)


def test_numbers_that_stop_being_finite_stop_the_run_and_name_the_tensor(tmp_path: Path) -> None:
    model = make_pico().train()
    with torch.no_grad():
        model.model.layers[2].mlp.up_proj.weight[0, 0] = float("nan")
    with pytest.raises(HalobenchError, match=r"test: numbers stopped being finite at step 0 .* first at "):
        Loop(tmp_path, LanguageModelling(model, "test"), mixture(), config()).run()


def test_distillation_of_a_copy_starts_at_zero_and_leaves_the_teacher_alone(tmp_path: Path) -> None:
    teacher, student = make_pico().requires_grad_(False), make_pico().train()
    before = {n: p.clone() for n, p in teacher.named_parameters()}
    tokens = torch.from_numpy(np.stack([Numbers().window(i, 17) for i in range(4)]))
    loss, weight = Distillation(student, teacher).loss(tokens, torch.ones(4, 17))
    assert float(weight) == 4 * 16
    assert abs(loss.item()) < 1e-5
    Loop(tmp_path, Distillation(student, teacher), mixture(), config()).run()
    assert all(torch.equal(before[n], p) for n, p in teacher.named_parameters())


def test_every_token_counts_in_the_distillation_loss() -> None:
    teacher, student = make_pico(seed=0).requires_grad_(False), make_pico(seed=1).train()
    tokens = torch.from_numpy(np.stack([Numbers().window(i, 33) for i in range(3)]))
    loss, weight = Distillation(student, teacher).loss(tokens, torch.ones(3, 33))
    with torch.no_grad():
        p, q = (torch.log_softmax(m(input_ids=tokens[:, :-1]).logits.double(), -1) for m in (teacher, student))
        expected = (p.exp() * (p - q)).sum(-1)
    assert float(loss) == pytest.approx(float(expected.sum()), rel=1e-5)
    assert float(weight) == expected.numel()


def test_the_schedules_meet_their_ends() -> None:
    cosine = OptimConfig(rate=1.0, final=0.1, warmup_steps=10)
    assert rate_factor(cosine, 0, 100) == pytest.approx(0.1)
    assert rate_factor(cosine, 10, 100) == pytest.approx(1.0)
    assert rate_factor(cosine, 100, 100) == pytest.approx(0.1)
    wsd = OptimConfig(rate=1.0, final=0.0, schedule="wsd", decay=0.5, warmup_steps=0)
    assert rate_factor(wsd, 49, 100) == 1.0
    assert rate_factor(wsd, 75, 100) == pytest.approx(0.5)
