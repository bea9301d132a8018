"""The sweep over layers: shared hidden states give what whole forwards give; the work is resumed and shared."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor
from transformers import PreTrainedModel

from halobench.errors import HalobenchError, UserError
from halobench.surgery import SurgeryPlan, transplant
from halobench.surgery.selection.replay import Tape
from halobench.surgery.selection.sweep import State, Sweep, SweptPart, sweep_folder, weights_hash
from halobench.surgery.transplant import build_mixers, swapped
from tests.conftest import make_pico
from tests.families import make_family

FAMILIES = ("qwen3", "llama", "gpt_neox", "mistral", "gemma2", "gpt2")  # two with windows, one with learned positions


def ready(teacher: PreTrainedModel, mixer: str = "lightning"):
    """(carrier, mixers) of a teacher."""
    carrier = transplant(teacher, SurgeryPlan.for_model(teacher, keep="all")).eval()
    return carrier, {layer: m.eval() for layer, m in build_mixers(teacher, mixer).items()}


@torch.inference_mode()
def every_kind_of_call(model, tokens: Tensor) -> list[Tensor]:
    """Logits of plain, left-padded and cached calls; caches are cut, copied and repeated as the tasks do it."""
    mask = torch.ones_like(tokens)
    mask[1, :5], mask[2, :19] = 0, 0
    places = (mask.cumsum(1) - 1).clamp(min=0)
    found = [model(tokens).logits, model(tokens, attention_mask=mask, position_ids=places).logits]
    cache = model.new_cache()
    found.append(model(tokens[:, :30], past_key_values=cache).logits)
    twin = cache.clone()
    twin.batch_repeat_interleave(2)
    found.append(model(tokens.repeat_interleave(2, 0)[:, 30:37], past_key_values=twin).logits)
    found.append(model(tokens[:, 30:], past_key_values=cache).logits)
    cache = model.new_cache()
    for first, stop in ((0, 20), (20, 33), (33, 34), (34, 40)):
        part = {"attention_mask": mask[:, :stop], "position_ids": places[:, first:stop]}
        found.append(model(tokens[:, first:stop], past_key_values=cache, **part).logits)
    found.append(model.final_hidden(tokens))
    return found


def equal(some: list[Tensor], others: list[Tensor]) -> bool:
    return all(torch.equal(a, b) for a, b in zip(some, others, strict=True))


@pytest.mark.parametrize("family", FAMILIES)
def test_layers_that_are_left_out_change_no_bit(family: str, tokens: Tensor) -> None:
    carrier, mixers = ready(make_family(family))
    tape = Tape(carrier.backbone.get_decoder().layers if family != "gpt2" else carrier.backbone.get_decoder().h)
    for base in ({}, mixers):
        with swapped(carrier, base), tape.recording():
            recorded = every_kind_of_call(carrier, tokens)
        with swapped(carrier, base):
            assert equal(recorded, every_kind_of_call(carrier, tokens))
        for layer, mixer in mixers.items():
            changed = {i: m for i, m in mixers.items() if i != layer} if base else {layer: mixer}
            with swapped(carrier, changed):
                whole = every_kind_of_call(carrier, tokens)
                with tape.replaying(layer):
                    assert equal(every_kind_of_call(carrier, tokens), whole)
            assert not equal(whole, recorded)


def test_a_replay_can_leave_its_own_layers_on_the_tape(teacher: PreTrainedModel, tokens: Tensor) -> None:
    carrier, mixers = ready(teacher)
    tape = Tape(carrier.backbone.model.layers)
    with tape.recording():
        every_kind_of_call(carrier, tokens)
    with swapped(carrier, {1: mixers[1]}), tape.replaying(1, record=True):
        every_kind_of_call(carrier, tokens)
    with swapped(carrier, {1: mixers[1], 3: mixers[3]}):
        whole = every_kind_of_call(carrier, tokens)
        with tape.replaying(3):
            assert equal(every_kind_of_call(carrier, tokens), whole)


def test_other_calls_than_those_on_the_tape_are_refused(teacher: PreTrainedModel, tokens: Tensor) -> None:
    carrier, _ = ready(teacher)
    tape = Tape(carrier.backbone.model.layers)
    with tape.recording():
        carrier(tokens)
    shapes = r"is of shape \(3, 20, 48\), on the tape it is \(3, 40, 48\)"
    with pytest.raises(HalobenchError, match=shapes), tape.replaying(2):
        carrier(tokens[:, :20])
    with pytest.raises(HalobenchError, match="call 2 was made, 1 are on the tape"), tape.replaying(2):
        carrier(tokens)
        carrier(tokens)
    with pytest.raises(HalobenchError, match="0 forward calls were made, 1 are on the tape"), tape.replaying(2):
        pass
    assert not any("forward" in vars(layer) for layer in carrier.backbone.model.layers)


class Guesses:
    """Tokens whose log-likelihood behind a cached beginning is the score; notes what it was asked to measure."""

    compares = False

    def __init__(self, name: str = "guesses", samples: int = 6, most: int | None = None) -> None:
        self.name, self.most, self.sizes = name, most, [24] * samples
        self.rows = torch.randint(3, 101, (samples, 24), generator=torch.Generator().manual_seed(1))
        self.asked: list[tuple[int, str]] = []
        self.fails: BaseException | None = None
        self.wrong: State | None = None

    def unit(self, first: int, stop: int) -> Guessing:
        return Guessing(self, first, stop)


class Guessing:
    def __init__(self, probe: Guesses, first: int, stop: int) -> None:
        self.probe, self.first, self.rows = probe, first, probe.rows[first:stop]

    @torch.inference_mode()
    def measure(self, model, state: State) -> dict[str, list[float]]:
        probe = self.probe
        if probe.most is not None and len(self.rows) > probe.most:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 7 GiB\nmore")
        if probe.fails is not None and self.first > 0:
            raise probe.fails
        probe.asked.append((self.first, str(state)))
        cache = model.new_cache()
        model(self.rows[:, :16], past_key_values=cache)
        logits = model(self.rows[:, 16:], past_key_values=cache).logits.log_softmax(-1)
        values = logits[:, :-1].gather(-1, self.rows[:, 17:, None]).sum((1, 2)).tolist()
        return {"logprob": [float("nan")] * len(values) if state == probe.wrong else values}


@pytest.fixture
def bench(teacher: PreTrainedModel):
    return ready(teacher)


REPLACED: dict[SweptPart, list[str]] = {"replaced": ["guesses"]}
RESTORED: dict[SweptPart, list[str]] = {"restored": ["guesses"]}
BOTH = REPLACED | RESTORED


def swept(bench, folder: Path, probe: Guesses, unit_tokens: int = 48) -> Sweep:
    return Sweep(*bench, {"replaced": [probe], "restored": [probe]}, folder, unit_tokens)


def test_the_sweep_gives_what_one_model_after_another_gives(bench, tmp_path: Path) -> None:
    carrier, mixers = bench
    probe = Guesses()
    sweep = swept(bench, tmp_path, probe)
    sweep.measure(BOTH)

    def alone(changed) -> list[float]:
        with swapped(carrier, changed):
            units = [probe.unit(first, first + 2) for first in (0, 2, 4)]
            return [x for unit in units for x in unit.measure(carrier, State("set"))["logprob"]]

    replaced, restored = sweep.collect("replaced"), sweep.collect("restored")
    assert replaced.base_samples["guesses"]["logprob"] == alone({})
    assert restored.base_samples["guesses"]["logprob"] == alone(mixers)
    for layer, mixer in mixers.items():
        assert replaced.entries[layer].samples == {"guesses": {"logprob": alone({layer: mixer})}}
        others = {i: m for i, m in mixers.items() if i != layer}
        assert restored.entries[layer].samples == {"guesses": {"logprob": alone(others)}}
        assert restored.entries[layer].scores["guesses"]["logprob"] == pytest.approx(np.mean(alone(others)))
    assert replaced.tokens == restored.tokens == {"guesses": 6 * 24 * 5}


def test_28_layers_take_half_the_work(tmp_path: Path) -> None:
    small = {"hidden_size": 16, "intermediate_size": 16, "head_dim": 4, "num_attention_heads": 2}
    carrier, mixers = ready(make_pico(num_hidden_layers=28, num_key_value_heads=2, **small))
    sweep = swept((carrier, mixers), tmp_path, Guesses(samples=1))
    sweep.measure(REPLACED)
    meter = sweep.collect("replaced").meter
    assert meter.one_by_one == 24 * 28 * 29
    assert meter.run == meter.one_by_one * (28 + 3) / (2 * (28 + 1))
    assert meter.run <= 0.55 * meter.one_by_one


def test_an_interrupted_sweep_goes_on_with_the_unit_it_stopped_in(bench, tmp_path: Path) -> None:
    whole = swept(bench, tmp_path / "whole", Guesses())
    whole.measure(REPLACED)
    probe = Guesses()
    probe.fails = KeyboardInterrupt()
    sweep = swept(bench, tmp_path / "cut", probe)
    with pytest.raises(KeyboardInterrupt):
        sweep.measure(REPLACED)
    assert {first for first, _ in probe.asked} == {0}
    probe.fails = None
    probe.asked.clear()
    sweep.measure(REPLACED)
    assert {first for first, _ in probe.asked} == {2, 4}
    assert sweep.collect("replaced") == whole.collect("replaced")
    probe.asked.clear()
    sweep.measure(REPLACED)
    assert probe.asked == []
    sweep.measure(BOTH)
    assert {state for _, state in probe.asked} == {
        "the student with every layer replaced",
        *(f"the student with softmax in layer {i} alone" for i in range(4)),
    }


def test_processes_take_turns_at_the_units_and_make_one_sweep(bench, tmp_path: Path) -> None:
    whole = swept(bench, tmp_path / "whole", Guesses())
    whole.measure(REPLACED)
    probes = [Guesses(), Guesses()]
    for rank in (1, 0):
        swept(bench, tmp_path / "shared", probes[rank]).measure(REPLACED, rank, 2)
    assert [{first for first, _ in probe.asked} for probe in probes] == [{0, 4}, {2}]
    assert swept(bench, tmp_path / "shared", Guesses()).collect("replaced") == whole.collect("replaced")


def test_out_of_memory_makes_units_smaller_and_is_said_once(bench, tmp_path: Path, capsys) -> None:
    whole = swept(bench, tmp_path / "whole", Guesses(), unit_tokens=24)
    whole.measure(REPLACED)
    capsys.readouterr()
    probe = Guesses(most=1)
    sweep = swept(bench, tmp_path / "small", probe, unit_tokens=96)
    sweep.measure(REPLACED)
    told = [line for line in capsys.readouterr().err.splitlines() if "out of memory" in line]
    assert told == [
        "sweep: out of memory on 4 samples of guesses (CUDA out of memory. Tried to allocate 7 GiB); "
        "going on with fewer at a time"
    ]
    assert sweep.collect("replaced") == whole.collect("replaced")
    with pytest.raises(HalobenchError, match=r"out of memory on one sample of guesses \(24 tokens\); lower its length"):
        swept(bench, tmp_path / "none", Guesses(most=0)).measure(REPLACED)


def test_numbers_that_are_none_name_the_layer_and_the_task(bench, tmp_path: Path) -> None:
    probe = Guesses()
    probe.wrong = State("replaced", 2)
    with pytest.raises(HalobenchError, match="guesses, the teacher with layer 2 replaced: logprob is not finite"):
        swept(bench, tmp_path, probe).measure(REPLACED)


def test_the_carrier_is_left_as_it_was_after_a_failure(bench, tmp_path: Path, tokens: Tensor) -> None:
    carrier, _ = bench
    before = carrier(tokens).logits
    probe = Guesses()
    probe.wrong = State("restored", 1)
    with pytest.raises(HalobenchError):
        swept(bench, tmp_path, probe).measure(RESTORED)
    assert torch.equal(carrier(tokens).logits, before)
    assert carrier.mixer_modules() == {}


def test_every_layer_needs_a_mixer(bench, tmp_path: Path) -> None:
    carrier, mixers = bench
    with pytest.raises(UserError, match=r"mixers are given for layers \[0, 1, 3\]"):
        swept((carrier, {i: m for i, m in mixers.items() if i != 2}), tmp_path, Guesses())


def test_other_mixers_or_settings_have_another_folder(bench, tmp_path: Path) -> None:
    _, mixers = bench
    hashes = {weights_hash(mixers)}
    first = sweep_folder(tmp_path, "sweep", {"mixers": weights_hash(mixers), "length": 512})
    assert sweep_folder(tmp_path, "sweep", {"length": 512, "mixers": weights_hash(mixers)}) == first
    assert sweep_folder(tmp_path, "sweep", {"mixers": weights_hash(mixers), "length": 1024}) != first
    with torch.no_grad():
        mixers[3].o_proj.weight[0, 0] += 1e-6
    hashes.add(weights_hash(mixers))
    mixers[0].set_options(gate_init="neutral")
    hashes.add(weights_hash(mixers))
    assert len(hashes) == 3
