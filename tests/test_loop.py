"""The training loop: the same curve however the batch is cut, where it goes on in the data, and what it reports."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest
import torch
from accelerate.tracking import GeneralTracker, on_main_process, register_tracker_class

from halobench.errors import UserError
from halobench.surgery.loop import Loop
from halobench.surgery.optim import OptimConfig, Optimizer, rate_factor
from halobench.surgery.plan import SurgeryPlan
from halobench.surgery.planted import Sequence
from halobench.surgery.stages.align import Alignment
from halobench.surgery.stages.distil import Distillation
from halobench.surgery.stages.language import LanguageModelling
from halobench.surgery.transplant import build_mixers, transplant
from tests.conftest import make_pico
from tests.pico_training import PLAIN, Numbers, config, losses, make_loop, rows, same, train, weights


class Diary(Numbers):
    """Numbers that remember what was asked of them."""

    def __init__(self) -> None:
        self.asked: list[tuple[int, int, int]] = []

    def sequence(self, index: int, length: int, position: int) -> Sequence:
        self.asked.append((index, length, position))
        return super().sequence(index, length, position)


def tokens(count: int, length: int) -> torch.Tensor:
    return torch.randint(3, 101, (count, length), generator=torch.Generator().manual_seed(5))


def test_micro_batches_change_nothing_but_memory(tmp_path: Path) -> None:
    for name, size in (("whole", None), ("cut", 16)):
        train(tmp_path / name, lengths=[16], optim=PLAIN, micro_batch_tokens=size)
    assert losses(tmp_path / "whole") == pytest.approx(losses(tmp_path / "cut"), rel=1e-5)
    assert len(losses(tmp_path / "cut")) == 10


def test_the_loss_is_weighted_by_tokens_over_micro_batches_of_different_weight() -> None:
    class Uneven(Numbers):
        def sequence(self, index: int, length: int, position: int) -> Sequence:
            drawn = super().sequence(index, length, position)
            drawn.weights[: 3 + 2 * index] = 0.0
            return drawn

    loop = Loop(Path(), LanguageModelling(make_pico().train(), "test"), Uneven(), config(micro_batch_tokens=16))
    batches = loop._batches(4, 16, lambda i: loop.data.sequence(i, 17, 17 * i))
    assert len(batches) == 4
    total, weight = loop._passes(batches).tolist()
    tokens_of, weights_of, _ = zip(*batches, strict=True)
    joined = LanguageModelling(make_pico(), "test").loss(torch.cat(tokens_of), torch.cat(weights_of))
    assert (total, weight) == pytest.approx((joined[0].item(), joined[1].item()), rel=1e-6)


def test_each_sequence_begins_where_the_one_before_ended_and_a_stage_goes_on_from_the_last(tmp_path: Path) -> None:
    diary = Diary()
    make = lambda: LanguageModelling(make_pico().train(), "test")  # noqa: E731
    first = Loop(tmp_path / "a", make(), diary, config(tokens=192)).run()
    second = Loop(
        tmp_path / "b", make(), diary, config(tokens=192), first_sequence=first.sequences, first_position=first.position
    ).run()
    assert [index for index, _, _ in diary.asked] == list(range(second.sequences))
    ends = [position + length for _, length, position in diary.asked]
    assert [position for _, _, position in diary.asked] == [0, *ends[:-1]]
    assert second.position == ends[-1]


def test_gradient_checkpointing_changes_no_number(tmp_path: Path) -> None:
    train(tmp_path / "plain")
    train(tmp_path / "again", gradient_checkpointing=True)
    assert same(weights(tmp_path / "plain"), weights(tmp_path / "again"))


def test_gradient_checkpointing_of_mixers_alone_is_refused(tmp_path: Path) -> None:
    teacher = make_pico().requires_grad_(False)
    objective = Alignment(teacher, build_mixers(teacher, "lightning"), relative=False)
    with pytest.raises(UserError, match="align has no gradient checkpointing"):
        Loop(tmp_path, objective, Numbers(), config(gradient_checkpointing=True))


def test_dropout_is_drawn_alike_after_a_resume(tmp_path: Path) -> None:
    def run(folder: Path, stop: int | None) -> None:
        model = make_pico(attention_dropout=0.3).train()
        loop = Loop(folder, LanguageModelling(model, "test"), Numbers(), config())
        loop._interrupted = lambda: False
        if stop is not None:
            with pytest.raises(KeyboardInterrupt):
                stop_at(loop, stop)
        else:
            loop.run()

    run(tmp_path / "whole", None)
    run(tmp_path / "cut", 4)
    torch.manual_seed(99)
    run(tmp_path / "cut", None)
    assert same(weights(tmp_path / "whole"), weights(tmp_path / "cut"))


def stop_at(loop: Loop, step: int) -> None:
    """Runs a loop that saves and stops, as by Ctrl-C, after `step` steps."""
    one_step = loop._one_step

    def stopping(steps: int, first: bool) -> object:
        if loop.step == step - 1:
            loop._interrupted = lambda: True
        return one_step(steps, first)

    loop._one_step = stopping  # type: ignore[method-assign, assignment]
    loop.run()


def test_held_out_loss_is_the_mean_over_sequences_that_are_never_trained_on(tmp_path: Path) -> None:
    result = train(tmp_path, held_out_sequences=3)
    batch = torch.stack([torch.from_numpy(Numbers().held_out(i, 33).tokens) for i in range(3)])
    loss, weight = LanguageModelling(make_pico(), "test").loss(batch, torch.ones(3, 33))
    assert result.held_out_before == pytest.approx((loss / weight).item(), rel=1e-6)
    assert result.held_out_after is not None and result.held_out_after < result.held_out_before


def test_no_held_out_loss_is_measured_when_none_is_wanted(tmp_path: Path) -> None:
    result = train(tmp_path, held_out_sequences=0)
    assert result.held_out_before is result.held_out_after is None


def test_a_loss_that_does_not_fall_is_told_and_noted(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    rising = OptimConfig(rate=1e-12, warmup_steps=0)
    results = [train(tmp_path / str(steps), tokens=64 * steps, optim=rising) for steps in (5, 6, 7, 8)]
    told = capfd.readouterr().err.count("the loss did not fall")
    assert told == sum(result.fell is False for result in results)
    assert {result.fell for result in results} == {True, False}  # weights that stand still: chance decides


def test_distillation_of_a_copy_starts_at_zero_and_leaves_the_teacher_alone(tmp_path: Path) -> None:
    teacher, student = make_pico().requires_grad_(False), make_pico().train()
    before = {n: p.clone() for n, p in teacher.named_parameters()}
    loss, weight = Distillation(student, teacher).loss(tokens(4, 17), torch.ones(4, 17))
    assert float(weight) == 4 * 16
    assert abs(loss.item()) < 1e-5
    Loop(tmp_path, Distillation(student, teacher), Numbers(), config()).run()
    assert all(torch.equal(before[n], p) for n, p in teacher.named_parameters())


@pytest.mark.parametrize(("temperature", "share"), [(1.0, 0.0), (2.0, 0.0), (2.0, 0.25), (1.0, 1.0)])
def test_the_distillation_loss_is_its_formula_with_every_token_alike(temperature: float, share: float) -> None:
    teacher, student = make_pico(seed=0).requires_grad_(False), make_pico(seed=1).train()
    batch = tokens(3, 33)
    objective = Distillation(student, teacher, temperature=temperature, ce_share=share)
    loss, weight = objective.loss(batch, torch.ones(3, 33))
    with torch.no_grad():
        teacher_logits, logits = (m(input_ids=batch[:, :-1]).logits.double() for m in (teacher, student))
        p, q = (torch.log_softmax(x / temperature, -1) for x in (teacher_logits, logits))
        kl = temperature**2 * (p.exp() * (p - q)).sum(-1)
        ce = -torch.log_softmax(logits, -1).gather(-1, batch[:, 1:, None]).squeeze(-1)
    assert loss.item() == pytest.approx(((1 - share) * kl + share * ce).sum().item(), rel=1e-5)
    assert float(weight) == kl.numel()


@pytest.mark.parametrize("wrong", [{"temperature": 0.0}, {"ce_share": 1.5}])
def test_a_distillation_that_makes_no_sense_is_refused(wrong: dict[str, float]) -> None:
    with pytest.raises(UserError, match=next(iter(wrong))):
        Distillation(make_pico(), make_pico(), **wrong)  # type: ignore[arg-type]


@pytest.mark.parametrize("relative", [True, False])
def test_alignment_counts_sequences_alike_however_they_are_batched(relative: bool) -> None:
    teacher = make_pico().requires_grad_(False)
    objective = Alignment(teacher, build_mixers(teacher, "lightning"), relative)
    batch = tokens(4, 17)
    whole, _ = objective.loss(batch, torch.ones(4, 17))
    parts = [objective.loss(batch[i : i + 1], torch.ones(1, 17))[0] for i in range(4)]
    assert float(whole) == pytest.approx(sum(map(float, parts)), rel=1e-5)


class Notes(GeneralTracker):
    """A tracker in memory, as a third party would register one."""

    name = "notes"
    requires_logging_directory = False
    kept: list[tuple[str, object]] = []

    def __init__(self, run_name: str) -> None:
        super().__init__()
        self.kept.clear()

    @property
    def tracker(self) -> list:
        return self.kept

    @on_main_process
    def store_init_configuration(self, values: dict) -> None:
        self.kept.append(("settings", values))

    @on_main_process
    def log(self, values: dict, step: int | None = None, **kwargs: object) -> None:
        self.kept.append(("step", {"step": step, **values}))

    @on_main_process
    def finish(self) -> None:
        self.kept.append(("finish", None))


def test_a_named_tracker_gets_the_settings_and_every_step(tmp_path: Path) -> None:
    register_tracker_class(Notes)
    train(tmp_path, tokens=128, trackers=["notes"])
    kinds, values = zip(*Notes.kept, strict=True)
    assert kinds == ("settings", "step", "step", "finish")
    assert values[0]["optim.rate"] == 1e-2 and values[0]["lengths"] == "[16, 32]"
    assert [(v["step"], v["loss"]) for v in values[1:3]] == [(r["step"], r["loss"]) for r in rows(tmp_path)]


def test_a_tracker_that_is_not_there_is_an_error_with_what_to_type(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("accelerate.tracking.get_available_trackers", lambda: [])
    with pytest.raises(UserError, match="pip install wandb"):
        make_loop(tmp_path, trackers=["wandb"])
    with pytest.raises(UserError, match="did you mean 'wandb'"):
        make_loop(tmp_path, trackers=["wand"])
    assert make_loop(tmp_path, trackers=None).accelerator.log_with == []


def test_tensorboard_is_used_where_it_is_installed(tmp_path: Path) -> None:
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    train(tmp_path, trackers=None)
    events = EventAccumulator(str(tmp_path / "halobench")).Reload()
    assert [e.value for e in events.Scalars("loss")] == pytest.approx(losses(tmp_path))


def test_what_trains_is_written_down_by_kind(tmp_path: Path) -> None:
    train(tmp_path, tokens=64)
    kinds = {row["name"]: row for row in json.loads((tmp_path / "trains.json").read_text())}
    assert kinds["model.layers.*.self_attn.q_proj.weight"] == {
        "name": "model.layers.*.self_attn.q_proj.weight", "tensors": 4, "shape": [48, 48], "parameters": 4 * 48 * 48,
    }  # fmt: skip
    assert sum(row["parameters"] for row in kinds.values()) == sum(p.numel() for p in make_pico().parameters())


def test_the_schedules_meet_their_ends() -> None:
    cosine = OptimConfig(rate=1.0, final=0.1, warmup_steps=10)
    assert rate_factor(cosine, 0, 100) == pytest.approx(0.1)
    assert rate_factor(cosine, 10, 100) == pytest.approx(1.0)
    assert rate_factor(cosine, 55, 100) == pytest.approx(0.1 + 0.9 * 0.5 * (1 + math.cos(math.pi / 2)))
    assert rate_factor(cosine, 100, 100) == pytest.approx(0.1)
    wsd = OptimConfig(rate=1.0, final=0.0, schedule="wsd", decay=0.5, warmup_steps=0)
    assert rate_factor(wsd, 49, 100) == 1.0
    assert rate_factor(wsd, 75, 100) == pytest.approx(0.5)
    assert rate_factor(OptimConfig(rate=1.0, schedule="constant", warmup_steps=0), 99, 100) == 1.0


def test_what_mixes_tokens_and_the_rest_have_their_own_rates(tmp_path: Path) -> None:
    """Adam's first step moves every weight by its rate, whatever the gradient."""
    plan = SurgeryPlan.for_model(make_pico(), keep=[1])
    student = transplant(make_pico(), plan).train()
    before = {name: p.detach().clone() for name, p in student.named_parameters()}
    rates = OptimConfig(rate=1e-2, rest_rate=1e-4, warmup_steps=0, schedule="constant", clip=1e9)
    Loop(tmp_path, LanguageModelling(student, "test"), Numbers(), config(tokens=64, optim=rates)).run()
    moved = {name: (p.detach() - before[name]).abs().max().item() for name, p in student.named_parameters()}
    for name, most in moved.items():
        assert most == pytest.approx(1e-2 if "self_attn" in name else 1e-4, rel=0.02), name
    with pytest.raises(UserError, match="rest_rate is for stages that train a whole model"):
        Optimizer([], rates, torch.nn.ModuleDict({"0": torch.nn.Linear(2, 2)}))
    with pytest.raises(UserError, match="give one of them"):
        OptimConfig(rate=1e-2, rest_rate=1e-4, matrix_rate=1e-2)
