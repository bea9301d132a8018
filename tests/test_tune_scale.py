"""The search for a of s_t = log_a(t + a): what it measures, where it looks, what it cannot tell, and what it writes."""

from __future__ import annotations

import json
import math
from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from halobench.cli import app
from halobench.cli.tune_scale import parse_candidates
from halobench.config import to_dict
from halobench.errors import UserError
from halobench.files import write_json
from halobench.models import CARD
from halobench.provenance import model_hash
from halobench.records import ModelCard
from halobench.surgery import SurgeryPlan, transplant
from halobench.surgery.checkpoint import load_model, save_model
from halobench.surgery.planted import Mixture, Sequence
from halobench.surgery.stages.scale import scaled_layers, search_scale


@dataclass(frozen=True, kw_only=True)
class Search:
    candidates: list[float | None]
    lengths: list[int] = field(default_factory=lambda: [8])
    sequences: int = 4
    refine: int = 0


class Landscape:
    """A model of two tokens whose loss is a known function of a, and of the first token of the sequence."""

    def __init__(self, best: float, unscaled: float = 9.0, noise: float = 0.0) -> None:
        self.best, self.unscaled, self.noise = best, unscaled, noise
        self.config = SimpleNamespace(num_hidden_layers=1, vocab_size=2)
        self.mixer = SimpleNamespace(name="softmax", options=SimpleNamespace(rope=False, logits_scale_base=77.0))
        self.tried: list[float | None] = []

    def mixer_modules(self) -> dict[int, Any]:
        return {0: self.mixer}

    def set_logits_scale(self, a: float | None) -> None:
        self.mixer.options.logits_scale_base = a
        self.tried.append(a)

    def final_hidden(self, tokens: Tensor) -> Tensor:
        a = self.mixer.options.logits_scale_base
        loss = self.unscaled if a is None else 1 + math.log(a / self.best) ** 2
        wobble = self.noise * math.sin(7.0 * float(tokens[0, 0]) + (a or 0))
        return torch.full((1, tokens.shape[1], 1), loss + wobble)

    def unembed(self, hidden: Tensor) -> Tensor:
        """Logits under which token 0 costs what the hidden state says."""
        return torch.cat([torch.zeros_like(hidden), torch.log(torch.expm1(hidden))], -1)


class Numbered:
    """Held-out sequences of token 0 behind their own number."""

    def held_out(self, index: int, length: int) -> Sequence:
        return Sequence(np.array([index] + [0] * (length - 1)), np.ones(length))


def search(model: Any, **settings: Any) -> Any:
    data: Any = Numbered()
    return search_scale(model, data, Search(**settings), "cpu")


def test_the_lowest_loss_wins_and_the_model_leaves_as_it_came() -> None:
    model = Landscape(best=120.0)
    found = search(model, candidates=[10.0, 100.0, 1000.0, None])
    assert found.best == 100.0 and found.runner_up == 1000.0
    assert found.losses["100"] == pytest.approx(1 + math.log(100 / 120) ** 2, rel=1e-5)
    assert found.losses["none"] == pytest.approx(9.0, rel=1e-5)
    assert found.difference == pytest.approx(found.losses["1000"] - found.losses["100"])
    assert found.tokens == 4 * 4 * 8 and model.mixer.options.logits_scale_base == 77.0


def test_no_scaling_may_win() -> None:
    assert search(Landscape(best=120.0, unscaled=0.5), candidates=[50.0, 500.0, None]).best is None


@pytest.mark.parametrize("best", [3.0, 140.0, 7000.0])
def test_refinement_closes_in_on_the_best_between_the_candidates_and_beyond_them(best: float) -> None:
    model = Landscape(best=best)
    coarse = search(model, candidates=[10.0, 100.0, 1000.0])
    fine = search(model, candidates=[10.0, 100.0, 1000.0], refine=8)
    assert abs(math.log(fine.best / best)) < 0.1 < abs(math.log(coarse.best / best))
    assert len(fine.losses) <= 11


def test_a_difference_within_the_noise_of_sequences_is_no_difference() -> None:
    clear = search(Landscape(best=100.0, noise=0.0), candidates=[90.0, 100.0, 400.0])
    assert clear.stderr == pytest.approx(0.0, abs=1e-6) and clear.alike == [100.0]
    noisy = search(Landscape(best=100.0, noise=0.3), candidates=[90.0, 100.0, 400.0], sequences=8)
    assert noisy.stderr > 0.02 and set(noisy.alike) == {90.0, 100.0}


def test_one_sequence_says_nothing_of_the_noise() -> None:
    found = search(Landscape(best=100.0), candidates=[90.0, 100.0, 400.0], sequences=1)
    assert found.stderr is None and len(found.alike) == 3


def test_what_is_no_scale_is_refused() -> None:
    with pytest.raises(UserError, match=r"above 1.*got \[1.0\]"):
        search(Landscape(best=9.0), candidates=[1.0, 5.0])
    with pytest.raises(UserError, match="got nothing"):
        search(Landscape(best=9.0), candidates=[])
    with pytest.raises(UserError, match="one or more"):
        search(Landscape(best=9.0), candidates=[5.0], sequences=0)
    assert parse_candidates("none, 50,1k,50") == [None, 50.0, 1000.0]
    with pytest.raises(UserError, match="'1' is not above 1"):
        parse_candidates("1,2")


def hybrid(reader: PreTrainedModel, **plan: Any) -> Any:
    torch.manual_seed(0)
    return transplant(reader, SurgeryPlan.for_model(reader, **plan)).eval()


@pytest.mark.parametrize(
    ("plan", "message"),
    [
        ({"keep": 0}, "no softmax layers"),
        ({"keep": [1, 3], "hype": False}, "softmax layers 1, 3 keep their positions"),
    ],
)
def test_hybrids_without_queries_to_scale_are_refused(
    reader: PreTrainedModel, plan: dict[str, Any], message: str
) -> None:
    with pytest.raises(UserError, match=message):
        scaled_layers(hybrid(reader, **plan))
    with pytest.raises(UserError, match="no hybrid"):
        scaled_layers(reader)


class RandomText:
    """Held-out windows of random tokens."""

    tokens: int | None = 10**6

    def window(self, position: int, length: int) -> np.ndarray:
        raise AssertionError("a scale is found on text that is not trained on")

    def held_out(self, index: int, length: int) -> np.ndarray:
        return np.random.default_rng((index, length)).integers(3, 500, length)


def test_losses_are_those_of_the_model_under_each_scale_at_each_length(reader: PreTrainedModel) -> None:
    student, text = hybrid(reader, keep=[1, 3]), RandomText()
    config = Search(candidates=[3.0, None], lengths=[60, 30], sequences=2)
    found = search_scale(student, Mixture(text, None, 0.0, 0), config, "cpu")
    for name, a in (("3", 3.0), ("none", None)):
        student.set_logits_scale(a)
        means = []
        for length in (30, 60):
            tokens = torch.from_numpy(np.stack([text.held_out(i, length + 1) for i in range(2)]))
            with torch.no_grad():
                expected = float(student(tokens, labels=tokens).loss)
            assert found.by_length[name][str(length)] == pytest.approx(expected, rel=1e-5)
            means.append(expected)
        assert found.losses[name] == pytest.approx(sum(means) / 2, rel=1e-5)
    assert found.losses["3"] != found.losses["none"]


@pytest.fixture
def finished(tmp_path: Path, reader: PreTrainedModel, bpe: PreTrainedTokenizerBase) -> Path:
    """A folder as a conversion leaves it."""
    folder = tmp_path / "model"
    student = hybrid(reader, keep=[1, 3])
    save_model(folder, student, bpe)
    card = ModelCard(name="pico", path="pico", hash="", layers=4, parameters=1, teacher="t", trained_length=64)
    write_json(folder / CARD, to_dict(card))
    return folder


def tune(finished: Path, *words: object) -> None:
    out = finished.parent / "out"
    few = ["--candidates", "none,5,500", "--sequences", "2", "--refine", "1", "--data", "sample:heldout"]
    app(["tune-scale", str(finished), "-o", str(out), *few, *map(str, words)], standalone_mode=False)


def test_the_command_prints_one_document_and_changes_nothing_unless_told(finished: Path, capsys: Any) -> None:
    before = (finished / "config.json").read_bytes()
    tune(finished, "--json", "--device", "cpu")
    printed = json.loads(capsys.readouterr().out)
    assert printed == json.loads((finished.parent / "out" / "tune-scale.json").read_text())
    assert set(printed["losses"]) >= {"none", "5", "500"} and set(printed["by_length"]["5"]) == {"128", "256", "512"}
    assert printed["before"] is None and printed["written"] is False and printed["settings"]["sequences"] == 2
    assert printed["best"] is None or f"{printed['best']:g}" in printed["losses"]
    assert printed["environment"]["versions"]["torch"]
    assert (finished / "config.json").read_bytes() == before


def test_writing_sets_the_best_in_the_config_and_the_model_loads_with_it(finished: Path, capsys: Any) -> None:
    tune(finished, "--write", "--candidates", "40", "--lengths", "96", "--refine", "0")
    assert "best: a = 40" in capsys.readouterr().out
    assert json.loads((finished / CARD).read_text())["hash"] == model_hash(finished)  # it is another model now
    softmax = [m for m in load_model(finished).mixer_modules().values() if m.name == "softmax"]
    assert [mixer.options.logits_scale_base for mixer in softmax] == [40.0, 40.0]
    assert sorted(p.name for p in finished.iterdir() if p.name.startswith(".")) == []


def test_without_a_card_the_lengths_must_be_given(finished: Path) -> None:
    (finished / CARD).unlink()
    with pytest.raises(UserError, match="give --lengths"):
        tune(finished)
