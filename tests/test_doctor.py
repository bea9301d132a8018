"""`halobench doctor`: what it says of each operator is what runs."""

from __future__ import annotations

import pytest
import torch
from typer.testing import CliRunner

from halobench.cli import app, doctor
from halobench.mixers.contract import MixerContext
from halobench.mixers.forms import used
from halobench.surgery.transplant import build_mixers
from tests.conftest import make_pico

OPERATORS = (
    "attention prefill", "attention decode", "scalar_decay", "vector_decay", "delta_rule", "dplr", "window attention",
    "loss",
)  # fmt: skip


def test_every_operator_has_a_form_and_a_reason() -> None:
    found = dict(doctor.forms(torch.device("cpu")))
    assert tuple(found) == OPERATORS
    for operator, told in found.items():
        form, _, reason = told.partition(" (")
        assert form in ("torch", "sdpa") and len(reason) > 8, (operator, told)


@pytest.mark.parametrize("mixer, operator", [("lightning", "scalar_decay"), ("kda", "delta_rule"), ("rwkv7", "dplr")])
def test_the_form_it_names_is_the_one_a_mixer_runs_in(mixer: str, operator: str) -> None:
    layer = build_mixers(make_pico(), mixer)[0]
    with torch.no_grad():
        layer(torch.randn(1, 6, 48), position_embeddings=None, context=MixerContext.plain(6))
    told = dict(doctor.forms(torch.device("cpu")))[operator]
    assert told.startswith(used(layer)[mixer])


def test_what_torch_picks_for_attention_is_looked_at_and_not_assumed(monkeypatch: pytest.MonkeyPatch) -> None:
    assert "flash_for_cpu" in dict(doctor.forms(torch.device("cpu")))["attention prefill"]
    from torch.nn.attention import SDPBackend, sdpa_kernel

    with sdpa_kernel(SDPBackend.MATH):
        assert "math" in dict(doctor.forms(torch.device("cpu")))["attention prefill"]


def test_a_package_that_is_missing_is_named_with_what_it_is_for(monkeypatch: pytest.MonkeyPatch) -> None:
    from halobench import provenance

    versions = {"halobench": "1", "flash-attn": "2.8.3"}
    monkeypatch.setattr(provenance, "environment", lambda: {"versions": versions, "hardware": {"cores": 2}})
    printed = CliRunner().invoke(app, ["doctor"]).output
    assert "flash-linear-attention  not installed (GPU kernels of the delta rules" in printed
    assert "triton  not installed (our GPU kernels need it" in printed
    assert "flash-attn  2.8.3" in printed and "flash-attn  not installed" not in printed
