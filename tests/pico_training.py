"""What the tests of training share: numbers as text, a pico model in a loop, and scripts that other processes run."""

from __future__ import annotations

import json
import os
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import load_file

from halobench.surgery.loop import Loop, LoopConfig, StageResult
from halobench.surgery.optim import OptimConfig
from halobench.surgery.planted import Sequence
from halobench.surgery.stages.language import LanguageModelling
from tests.conftest import make_pico

PLAIN = OptimConfig(rate=1e-3, warmup_steps=2)
ENVIRONMENT = {
    **os.environ,
    "OMP_NUM_THREADS": "1",
    "PYTHONPATH": str(Path(__file__).resolve().parents[1]),
}


class Numbers:
    """Endless sequences over a small vocabulary; what stands at a place depends on the position alone."""

    def sequence(self, index: int, length: int, position: int) -> Sequence:
        tokens = np.random.default_rng(position).integers(3, 101, length)
        return Sequence(tokens, np.ones(length))

    def held_out(self, index: int, length: int) -> Sequence:
        return Sequence(np.random.default_rng((index, 9)).integers(3, 101, length), np.ones(length))


def config(**changes: object) -> LoopConfig:
    """Ten steps of 64 tokens at two lengths, Muon and AdamW, in fp32."""
    fields: dict = {
        "tokens": 640,
        "batch_tokens": 64,
        "lengths": [16, 32],
        "optim": OptimConfig(rate=1e-2, matrix_rate=1e-2, warmup_steps=2),
        "precision": "fp32",
        "held_out_sequences": 2,
        "trackers": [],
    }
    return LoopConfig(**{**fields, **changes})


def make_loop(folder: Path, **changes: object) -> Loop:
    """A fresh pico model about to train in `folder`."""
    return Loop(folder, LanguageModelling(make_pico().train(), "test"), Numbers(), config(**changes))


def train(folder: Path, **changes: object) -> StageResult:
    """A pico model trained in `folder`, from where it was left."""
    return make_loop(folder, **changes).run()


def checkpoints(folder: Path) -> list[Path]:
    """The checkpoints in a stage's folder, oldest first."""
    return sorted((folder / "checkpoints").glob("step-*"))


def _tensors(path: Path) -> dict[str, torch.Tensor]:
    """Copies, for load_file maps the file, and tests damage files."""
    return {name: tensor.clone() for name, tensor in load_file(path).items()}


def weights(folder: Path) -> dict[str, torch.Tensor]:
    """The weights in the newest checkpoint of a stage."""
    return _tensors(checkpoints(folder)[-1] / "weights.safetensors")


def moments(folder: Path) -> dict[str, torch.Tensor]:
    """The optimisers' moments in the newest checkpoint of a stage."""
    return _tensors(checkpoints(folder)[-1] / "optimizer.safetensors")


def rows(folder: Path) -> list[dict]:
    """The steps in a stage's log."""
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def losses(folder: Path) -> list[float]:
    """The loss of each step in a stage's log."""
    return [row["loss"] for row in rows(folder)]


def same(first: dict[str, torch.Tensor], second: dict[str, torch.Tensor]) -> bool:
    """Whether two sets of tensors are the same, bit for bit."""
    return first.keys() == second.keys() and all(torch.equal(first[name], second[name]) for name in first)
