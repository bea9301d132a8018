"""What a stage must pass: identity, plausible first losses, gradients where they belong, and finite numbers."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor

from halobench.errors import HalobenchError
from halobench.mixers import MIXERS
from halobench.surgery import gates
from halobench.surgery.loop import Loop
from halobench.surgery.objective import Objective
from halobench.surgery.stages.align import Alignment
from halobench.surgery.stages.distil import Distillation
from halobench.surgery.stages.language import LanguageModelling
from halobench.surgery.transplant import build_mixers
from tests.conftest import make_pico
from tests.pico_training import PLAIN, Numbers, checkpoints, config, rows


def run(folder: Path, objective: Objective, **changes: object) -> None:
    Loop(folder, objective, Numbers(), config(**changes)).run()


def test_a_teacher_that_is_read_rightly_passes_the_identity_gate(tokens: Tensor) -> None:
    gates.check_identity(make_pico(), tokens)


def test_a_student_that_differs_by_one_weight_does_not_pass_it(tokens: Tensor, monkeypatch: pytest.MonkeyPatch) -> None:
    from halobench import surgery

    faithful = surgery.transplant

    def careless(teacher: torch.nn.Module, plan: object) -> torch.nn.Module:
        student = faithful(teacher, plan)  # type: ignore[arg-type]
        student.get_output_embeddings().weight.data[50, 0] += 1e-3
        return student

    monkeypatch.setattr(surgery, "transplant", careless)
    with pytest.raises(HalobenchError, match="nothing replaced differs from the teacher"):
        gates.check_identity(make_pico(), tokens)


def test_an_implausible_first_loss_stops_a_distillation(tmp_path: Path) -> None:
    student, teacher = make_pico(seed=1).train(), make_pico().requires_grad_(False)
    with torch.no_grad():
        student.lm_head.weight.mul_(50)
    with pytest.raises(HalobenchError, match=r"distil: the first step's loss is .* would have 4.615"):
        run(tmp_path, Distillation(student, teacher))
    assert not (tmp_path / "metrics.jsonl").exists()


class Detached(LanguageModelling):
    """Forgets one layer: what it gives is cut off from its weights."""

    def __init__(self) -> None:
        super().__init__(make_pico().train(), "test")
        self.model.model.layers[1].mlp.register_forward_hook(lambda module, inputs, output: output.detach())


def test_a_tensor_that_no_gradient_reaches_is_named(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(HalobenchError, match=r"after 10 steps no gradient has reached model.layers.1.mlp.gate_proj"):
        run(tmp_path, Detached())
    assert "no gradient has reached model.layers.1.mlp.gate_proj.weight" in capfd.readouterr().err
    assert len(rows(tmp_path)) == 9


def test_a_tensor_that_waits_for_another_to_leave_zero_is_given_its_time(tmp_path: Path) -> None:
    """A zero in front of it holds the gradient up in the first step alone."""
    model = make_pico().train()
    with torch.no_grad():
        model.model.layers[2].mlp.down_proj.weight.zero_()
    run(tmp_path, LanguageModelling(model, "test"))


def test_a_gradient_that_comes_to_a_frozen_tensor_stops_the_run(tmp_path: Path) -> None:
    class Leaking(Distillation):
        def loss(self, tokens_BT: Tensor, weights_BT: Tensor) -> tuple[Tensor, Tensor]:
            loss, weight = super().loss(tokens_BT, weights_BT)
            return loss + self.teacher.lm_head.weight.sum(), weight

    with pytest.raises(HalobenchError, match="gradients came to frozen model 0: .*lm_head.weight, which"):
        run(tmp_path, Leaking(make_pico(seed=1).train(), make_pico()))


@pytest.mark.parametrize("mixer", MIXERS.names())
def test_gradients_reach_every_tensor_of_every_mixer_in_alignment(tmp_path: Path, mixer: str) -> None:
    teacher = make_pico().requires_grad_(False)
    torch.manual_seed(0)
    mixers = {layer: built.train() for layer, built in build_mixers(teacher, mixer).items()}
    objective = Alignment(teacher, mixers, relative=True)
    run(tmp_path, objective, tokens=64 * gates.REACH_WARNING, lengths=[32], held_out_sequences=0)
    assert len(rows(tmp_path)) == gates.REACH_WARNING


def test_numbers_that_are_not_finite_from_the_start_name_the_module_and_its_weight(tmp_path: Path) -> None:
    model = make_pico().train()
    with torch.no_grad():
        model.model.layers[2].mlp.up_proj.weight[0, 0] = float("nan")
    match = (
        r"test: numbers stopped being finite at step 0 .* first in the output of model.layers.2.mlp.up_proj, "
        "whose weight is not finite; there is no checkpoint yet"
    )
    with pytest.raises(HalobenchError, match=match):
        run(tmp_path, LanguageModelling(model, "test"))


def test_numbers_that_overflow_later_name_the_step_and_the_last_good_checkpoint(tmp_path: Path) -> None:
    objective = LanguageModelling(make_pico().train(), "test")
    loop = Loop(tmp_path, objective, Numbers(), config(save_every_seconds=0.0))
    mlp = objective.model.model.layers[1].mlp

    def overflow(module: torch.nn.Module, inputs: object, output: Tensor) -> Tensor:
        return output * (float("inf") if loop.step >= 6 and module.training else 1.0)

    mlp.act_fn.register_forward_hook(overflow)
    with pytest.raises(HalobenchError, match="at step 6 .* in the output of model.layers.1.mlp.act_fn; .*step-000006"):
        loop.run()
    assert checkpoints(tmp_path)[-1].name == "step-000006"


def test_a_gradient_that_overflows_behind_a_finite_loss_names_its_parameter(tmp_path: Path) -> None:
    objective = LanguageModelling(make_pico().train(), "test")
    norm = objective.model.model.layers[3].input_layernorm.weight
    norm.register_hook(lambda gradient: gradient * float("inf"))
    with pytest.raises(HalobenchError, match=r"first in the gradient of model.layers.3.input_layernorm.weight"):
        run(tmp_path, objective)


def test_a_batch_without_weight_is_no_division_by_zero(tmp_path: Path) -> None:
    class Weightless(Numbers):
        def sequence(self, index: int, length: int, position: int):  # type: ignore[no-untyped-def]
            drawn = super().sequence(index, length, position)
            drawn.weights[:] = 0.0
            return drawn

    with pytest.raises(HalobenchError, match="no token of step 0 carries weight"):
        Loop(tmp_path, LanguageModelling(make_pico().train(), "test"), Weightless(), config()).run()


def test_the_table_of_what_trains_groups_layers_and_says_sizes() -> None:
    lines = gates.table(gates.inventory(gates.trained(make_pico()))).splitlines()
    assert any(line.split() == ["model.layers.*.mlp.up_proj.weight", "4", "x", "64x48", "12,288"] for line in lines)
    assert len(lines) == 14


def test_a_frozen_part_is_not_among_what_trains(tmp_path: Path) -> None:
    model = make_pico().train()
    model.model.embed_tokens.requires_grad_(False)
    assert "model.embed_tokens.weight" not in dict(gates.trained(model))
    before = model.model.embed_tokens.weight.clone()
    run(tmp_path, LanguageModelling(model, "test"), optim=PLAIN)
    assert torch.equal(before, model.model.embed_tokens.weight)
