"""Plans: what they mean, and what they refuse."""

from __future__ import annotations

import json

import pytest

from halobench.errors import UserError
from halobench.surgery.plan import LayerPlan, SurgeryPlan, kept_layers


def mixers(plan: SurgeryPlan) -> list[str]:
    return [layer.mixer for layer in plan.layers]


def test_the_default_plan_changes_nothing(teacher) -> None:
    plan = SurgeryPlan.for_model(teacher)
    assert plan.changes_nothing and mixers(plan) == ["keep"] * 4


def test_a_number_keeps_that_many_layers_evenly_with_the_last_among_them() -> None:
    assert kept_layers(7, 28) == [3, 7, 11, 15, 19, 23, 27]
    assert kept_layers(3, 10) == [2, 5, 9]
    assert kept_layers(0, 4) == []


def test_a_share_is_rounded_down_as_in_the_paper() -> None:
    assert len(kept_layers(0.25, 30)) == 7
    assert kept_layers(1.0, 3) == [0, 1, 2]


def test_kept_layers_get_hype_or_stay_untouched(teacher) -> None:
    plan = SurgeryPlan.for_model(teacher.config, keep=[2], softmax_options={"gate_init": "neutral"})
    assert mixers(plan) == ["lightning", "lightning", "softmax", "lightning"] and plan.kept == (2,)
    assert plan.layers[2].options["gate_init"] == "neutral" and plan.layers[2].options["rope"] is False
    plain = SurgeryPlan.for_model(teacher.config, keep=[2], hype=False)
    assert plain.layers[2] == LayerPlan(mixer="keep") and plain.kept == (2,)


def test_a_plan_survives_json_with_every_option_written_out(teacher) -> None:
    plan = SurgeryPlan.for_model(teacher, keep=1, mixer_options={"rope": False})
    data = json.loads(json.dumps(plan.to_dict()))
    assert SurgeryPlan.from_dict(data) == plan
    assert data["layers"][0]["options"]["rope"] is False and data["layers"][0]["options"]["qk_norm"] is True


def test_it_is_told_in_one_line(teacher) -> None:
    assert SurgeryPlan.for_model(teacher, keep=[0, 3]).describe() == "4 layers: 2 softmax (0 3), 2 lightning (1-2)"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"keep": [4]}, "layers are 0 to 3"),
        ({"keep": [-1]}, "layers are 0 to 3"),
        ({"keep": [1, 1]}, r"\[1\] more than once"),
        ({"keep": 5}, "between 0 and 4"),
        ({"keep": 1.5}, "share between 0 and 1"),
        ({"keep": "some"}, "keep must be"),
        ({"keep": True}, "keep must be"),
        ({"keep": 1, "mixer": "lightening"}, "did you mean 'lightning'"),
        ({"keep": 1, "mixer_options": {"qknorm": True}}, "did you mean 'qk_norm'"),
        ({"keep": 1, "mixer_options": {"rope": "yes"}}, "must be bool"),
        ({"keep": 1, "softmax_options": {"logits_scale_base": 1.0}}, "above 1"),
        ({"keep": 1, "hype": False, "softmax_options": {"rope": True}}, "hype=True"),
    ],
)
def test_what_makes_no_sense_is_refused_with_what_is_allowed(teacher, arguments, message) -> None:
    with pytest.raises(UserError, match=message):
        SurgeryPlan.for_model(teacher, **arguments)


def test_an_untouched_layer_takes_no_options() -> None:
    with pytest.raises(UserError, match="takes no options"):
        SurgeryPlan(layers=(LayerPlan(mixer="keep", options={"rope": True}),))
