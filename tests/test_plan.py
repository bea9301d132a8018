"""Plans: what they mean, what they refuse, and what the dry run counts without any weights."""

from __future__ import annotations

import json
import time
from pathlib import Path

import pytest

from halobench.assets import SHAPES
from halobench.budget import Budget, fit, parse_budget
from halobench.costs import attention_costs, over_positions
from halobench.errors import UserError
from halobench.mixers.softmax import SoftmaxMixer, SoftmaxOptions
from halobench.planning import Drawn, draw_up, shape_names, teacher_config
from halobench.recipe import load_recipe
from halobench.surgery.anatomy import describe, read_attention
from halobench.surgery.plan import LayerPlan, SurgeryPlan, kept_layers
from halobench.units import format_flops, parse_bytes
from tests.conftest import make_pico

RELEASED_2B = (2, 3, 6, 8, 9, 21, 25)
RELEASED_9B = (1, 2, 4, 6, 7, 10, 24, 33, 34)


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


def dry_run(teacher: object, *, layers: tuple[int, ...] | None = None, lengths: tuple[int, ...] = (4096,)) -> Drawn:
    return draw_up(str(teacher), load_recipe("halo-qwen3-1.7b", []), layers, list(lengths))


def config_file(folder: Path, family: str, **changes: object) -> Path:
    """A config.json and nothing else, as one would copy it from a model's page."""
    path = folder / f"{family}.json"
    path.write_text(json.dumps(make_pico(family, **changes).config.to_dict()))
    return path


@pytest.mark.parametrize(
    ("shape", "billions"),
    [("qwen3-0.6b", 0.596), ("qwen3-1.7b", 1.72), ("qwen3-4b", 4.02), ("qwen3-8b", 8.19), ("llama-3.2-3b", 3.21)],
)
def test_every_shape_has_the_size_its_model_card_says_and_is_planned_in_seconds(shape: str, billions: float) -> None:
    started = time.perf_counter()
    drawn = dry_run(shape)
    assert time.perf_counter() - started < 20
    assert drawn.teacher_parameters / 1e9 == pytest.approx(billions, abs=0.005)
    assert drawn.hybrid_parameters > drawn.teacher_parameters


def test_every_shape_that_ships_is_tested_above() -> None:
    assert shape_names() == ["llama-3.2-3b", "qwen3-0.6b", "qwen3-1.7b", "qwen3-4b", "qwen3-8b"]


def test_the_released_hybrids_have_the_released_number_of_parameters(tmp_path: Path) -> None:
    small = dry_run("qwen3-1.7b", layers=RELEASED_2B)
    assert small.hybrid_parameters / 1e9 == pytest.approx(1.926, abs=0.0005) and small.kept == list(RELEASED_2B)
    # HypeNet-9B ties its embeddings, which its teacher does not.
    shape = json.loads((SHAPES / "qwen3-8b.json").read_text())
    tied = tmp_path / "tied.json"
    tied.write_text(json.dumps({**shape, "tie_word_embeddings": True}))
    large = dry_run(tied, layers=RELEASED_9B)
    assert large.hybrid_parameters / 1e9 == pytest.approx(8.852, abs=0.0005)
    apart = dry_run("qwen3-8b", layers=RELEASED_9B)
    assert apart.hybrid_parameters - large.hybrid_parameters == 151936 * 4096


def test_the_layer_table_adds_up_to_the_whole(tmp_path: Path) -> None:
    drawn = dry_run("qwen3-1.7b", layers=RELEASED_2B)
    assert [row.becomes == "softmax" for row in drawn.layers] == [i in RELEASED_2B for i in range(28)]
    assert all(row.copied + row.new == row.parameters for row in drawn.layers)
    attention = 2048 * 2048 * 2 + 2048 * 1024 * 2 + 2 * 128
    mixers = sum(row.parameters for row in drawn.layers)
    assert drawn.hybrid_parameters - mixers == drawn.teacher_parameters - 28 * attention
    assert drawn.layers[0].attention == "16 heads of 128, 8 KV, RoPE, QK-norm"
    assert drawn.layers[2].new == 2048 * 2048


def test_what_is_copied_and_what_is_new_is_said_once_for_each_kind_of_mixer() -> None:
    parts = {kind.mixer: kind for kind in dry_run("llama-3.2-3b").mixers}
    assert set(parts) == {"lightning", "softmax"}
    assert set(parts["lightning"].copied) == {"q_proj", "k_proj", "v_proj", "o_proj"}
    assert {"q_norm", "k_norm", "z_proj"} <= set(parts["lightning"].new)  # Llama has no QK-norm to copy
    assert set(parts["softmax"].new) == {"o_gate"} and parts["softmax"].layers == [3, 7, 11, 15, 19, 23, 27]


def test_cache_bytes_of_qwen3_are_those_worked_out_by_hand() -> None:
    lengths = (4096, 32768, 131072, 524288, 1048576)
    drawn = dry_run("qwen3-1.7b", lengths=lengths)
    assert [row.length for row in drawn.memory] == list(lengths)
    for row in drawn.memory:
        layer = row.length * 2 * 8 * 128 * 2  # keys and values, 8 heads of 128, bf16
        assert (row.teacher, row.kv) == (28 * layer, 7 * layer)
        assert row.state == 21 * 16 * 128 * 128 * 4  # a square of fp32 per head


@pytest.mark.parametrize("length", [4096, 131072])
def test_operations_of_qwen3_are_those_worked_out_by_hand(length: int) -> None:
    row = dry_run("qwen3-1.7b", lengths=(length,)).flops[0]
    mlp, unembedding = 3 * 2048 * 6144, 151936 * 2048
    attention, scores = 2 * 2048 * 2048 + 2 * 2048 * 1024, 4 * 16 * 128
    assert row.teacher_token == 2 * (28 * (mlp + attention) + unembedding) + 28 * scores * (length + 1)
    before = length * (length + 1) // 2  # keys seen by all queries of the prompt
    whole = 28 * (2 * length * (mlp + attention) + scores * before) + 2 * unembedding
    assert row.teacher_prompt == pytest.approx(whole, rel=1e-12)
    softmax = 2 * (attention + 2048 * 2048) + scores * (length + 1)
    lightning = 2 * 5 * 2048 * 2048 + 4 * 16 * 128 * 128
    hybrid = 2 * (28 * mlp + unembedding) + 7 * softmax + 21 * lightning
    assert row.hybrid_token == pytest.approx(hybrid, rel=2e-3)
    assert length < 10_000 or row.hybrid_prompt < 0.5 * row.teacher_prompt


def test_the_teachers_attention_costs_what_a_softmax_mixer_without_a_gate_says(teacher) -> None:
    for view in read_attention(teacher):
        mixer = SoftmaxMixer.from_attention(view, SoftmaxOptions(rope=True, output_gate=False))
        costs = attention_costs(view)
        for length in (0, 5, 1000):
            assert costs.flops(length) == mixer.flops_per_token(length)
            assert costs.cache(length) == mixer.state_bytes(1, length, 2)


def test_a_window_bounds_the_teachers_cache_and_scores(tmp_path: Path) -> None:
    windows = {"use_sliding_window": True, "sliding_window": 16, "max_window_layers": 2, "layer_types": None}
    file = config_file(tmp_path, "qwen3", **windows)
    assert [view.sliding_window for view in describe(teacher_config(str(file)))] == [None, None, 16, 16]
    drawn = dry_run(file, lengths=(8, 64))
    token = 2 * 2 * 12 * 2
    assert [row.teacher for row in drawn.memory] == [4 * 8 * token, (64 + 64 + 16 + 16) * token]
    short, long = drawn.flops
    assert long.teacher_token - short.teacher_token == 4 * 4 * 12 * ((65 - 9) * 2 + (16 - 9) * 2)
    assert "window 16" in drawn.layers[2].attention and "window" not in drawn.layers[0].attention


def test_of_a_mixture_of_experts_only_the_experts_visited_count_as_active(tmp_path: Path) -> None:
    file = config_file(tmp_path, "mixtral", num_local_experts=8, num_experts_per_tok=2, sliding_window=None)
    drawn = dry_run(file)
    expert, router, attention, unembedding = 3 * 48 * 64, 48 * 8, 2 * 48 * 48 + 2 * 48 * 24, 101 * 48
    assert drawn.teacher_active == 4 * (attention + router + 2 * expert) + unembedding
    assert drawn.teacher_parameters > 4 * (attention + router + 8 * expert) + 2 * unembedding
    assert drawn.flops[0].teacher_token == 2 * drawn.teacher_active + 4 * 4 * 48 * 4097


def test_experts_without_a_number_of_visits_are_an_error_and_not_a_guess(tmp_path: Path, monkeypatch) -> None:
    file = config_file(tmp_path, "mixtral", num_local_experts=8)
    monkeypatch.setattr("halobench.costs.CHOSEN", ("no_such_field",))
    with pytest.raises(UserError, match="how many a token visits"):
        dry_run(file)


def test_hours_follow_tokens_and_active_parameters() -> None:
    stages = {row.stage: row for row in dry_run("qwen3-1.7b").stages}
    assert [row.tokens for row in stages.values()] == [320_000_000, 1_000_000_000, 1_000_000_000]
    floor = 6 * 1.9e9 * 1e9 / 300e12 / 3600  # forward and backward through the matrices alone
    assert floor < stages["finetune"].hours < 1.5 * floor
    assert stages["align"].hours < stages["distil"].hours


def test_a_sum_over_positions_is_exact_for_a_cost_that_bends() -> None:
    def bent(position: int) -> float:
        return 1000.0 + 3 * min(position + 1, 700) + 2 * min(position + 1, 41)

    for length in (1, 2, 5, 41, 42, 700, 5000):
        assert over_positions(bent, length) == pytest.approx(sum(map(bent, range(length))), rel=1e-12)


def test_a_budget_is_read_from_text() -> None:
    assert parse_budget("kv=4GB@128k") == Budget(text="kv=4GB@128k", size=4 * 10**9, length=131072)
    assert parse_budget(" KV = 1.5 GiB @ 512 ").size == 3 * 2**29


@pytest.mark.parametrize(
    "text", ["4GB@128k", "kv=4GB", "kv=4@128k", "kv=4GB@", "kv=4GB@128q", "kv=-1GB@4k", "kv=4ib@4k"]
)
def test_a_malformed_budget_is_refused_with_an_example(text: str) -> None:
    with pytest.raises(UserError, match="write --budget kv=4GB@128k"):
        parse_budget(text)


def test_sizes_and_operations_read_as_people_write_them() -> None:
    assert [parse_bytes(t) for t in ("4GB", "2 GiB", "0.5mb", "3KiB", "7B")] == [4 * 10**9, 2**31, 500_000, 3072, 7]
    assert [format_flops(n) for n in (12, 17.6e9, 8.83e16)] == ["12 FLOP", "17.6 GFLOP", "88.3 PFLOP"]


def room(size: int) -> Budget:
    return Budget(text=f"kv={size}B@4k", size=size, length=4096)


def test_a_budget_counts_states_beside_keys_and_values() -> None:
    exact = fit(room(3 * 100 + 7 * 4), [100] * 10, [4] * 10)
    assert (exact.keep, exact.keep_by_kv, exact.kv_bytes, exact.total_bytes) == (3, 3, 300, 328)
    one_less = fit(room(3 * 100 + 7 * 4 - 1), [100] * 10, [4] * 10)
    assert (one_less.keep, one_less.keep_by_kv, one_less.total_bytes) == (2, 3, 232)


def test_a_budget_holds_whichever_layers_are_chosen() -> None:
    mixed = fit(room(215), [100, 10, 100, 10], [1] * 4)
    assert (mixed.keep, mixed.kv_bytes, mixed.total_bytes) == (3, 210, 211)
    assert fit(room(150), [100, 10, 100, 10], [1] * 4).keep == 1


def test_a_budget_too_small_says_what_one_layer_needs() -> None:
    with pytest.raises(UserError, match="no softmax layer fits; one needs 100 B of KV, 109 B with the states"):
        fit(room(108), [100] * 10, [1] * 10)
    with pytest.raises(UserError, match="no softmax layer fits"):
        fit(room(0), [100], [1])


def test_a_budget_that_holds_the_whole_teacher_leaves_nothing_to_convert() -> None:
    with pytest.raises(UserError, match="all 4 layers fit as softmax attention"):
        fit(room(400), [100] * 4, [1] * 4)


def test_a_budget_decides_how_many_layers_the_plan_keeps() -> None:
    recipe = load_recipe("halo-qwen3-1.7b", [])
    drawn = draw_up("qwen3-8b", recipe, None, [131072], parse_budget("kv=4GB@128k"))
    layer = 2 * 8 * 128 * 2 * 131072
    assert drawn.budget is not None and drawn.budget.keep == len(drawn.kept) == 4 * 10**9 // layer == 7
    assert drawn.budget.total_bytes == drawn.memory[0].kv + drawn.memory[0].state <= 4 * 10**9


def test_a_plan_that_converts_nothing_is_refused() -> None:
    with pytest.raises(UserError, match="nothing to convert"):
        draw_up("qwen3-1.7b", load_recipe("halo-qwen3-1.7b", ["keep=28"]), None, [4096])


def test_a_share_of_less_than_one_layer_is_refused_but_none_may_be_asked_for() -> None:
    with pytest.raises(UserError, match="less than one"):
        draw_up("qwen3-1.7b", load_recipe("halo-qwen3-1.7b", ["keep=0.01"]), None, [4096])
    assert draw_up("qwen3-1.7b", load_recipe("halo-qwen3-1.7b", ["keep=0"]), None, [4096]).memory[0].kv == 0


def test_a_config_that_makes_no_decoder_is_told_in_one_line(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "vit"}))
    with pytest.raises(UserError, match="no causal language model") as told:
        dry_run(tmp_path)
    assert "\n" not in str(told.value)
