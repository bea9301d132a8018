"""Recipes: what ships is what was published, builds on one another as it says, and can be planned."""

from __future__ import annotations

from pathlib import Path

import pytest

from halobench.errors import UserError
from halobench.planning import draw_up, teacher_config
from halobench.recipe import Recipe, TokenBudget, load_recipe, recipe_names
from halobench.surgery.selection import make_selector

METHODS = ("halo", "jet-nemotron", "kl-ls", "radlads")
SIZES = {"tiny": 10, "qwen3-1.7b": 28, "qwen3-4b": 36, "qwen3-8b": 36}
HALO_RATES = {"qwen3-1.7b": 1e-4, "qwen3-4b": 5e-5, "qwen3-8b": 3e-5}


def teacher_of(name: str) -> str:
    return next(size for size in SIZES if name.endswith(f"-{size}"))


def tokens_of_a_step(recipe: Recipe) -> list[tuple[int, int]]:
    """(length, sequences) of a step of each stage."""
    stages = (recipe.align, recipe.distil, recipe.finetune)
    return [(stage.lengths[0], stage.batch_tokens // stage.lengths[0]) for stage in stages]


def test_every_method_ships_for_every_teacher() -> None:
    assert set(recipe_names()) == {f"{method}-{size}" for method in METHODS for size in SIZES} | {"oracle-tiny"}


@pytest.mark.parametrize("name", recipe_names())
def test_a_shipped_recipe_says_what_it_is_and_what_it_costs(name: str) -> None:
    recipe = load_recipe(name, [])
    assert recipe.name == name and len(recipe.summary) > 20 and "\n" not in recipe.summary
    assert recipe.teacher_layers == teacher_config(teacher_of(name)).num_hidden_layers == SIZES[teacher_of(name)]
    make_selector(recipe.select, recipe.selector_options.get(recipe.select))
    budget = recipe.tokens()
    assert budget.total == budget.align + budget.select + budget.distil + budget.finetune
    assert (budget.select > 0) == (recipe.select != "even")


@pytest.mark.parametrize("name", recipe_names())
def test_a_shipped_recipe_can_be_planned_for_its_teacher(name: str) -> None:
    recipe, teacher = load_recipe(name, []), teacher_of(name)
    plan = recipe.plan(teacher_config(teacher), recipe.keep)
    assert len(plan.kept) == (0 if name.startswith("radlads") else SIZES[teacher] // 4)
    drawn = draw_up(teacher, recipe, None, [4096])
    assert [row.tokens for row in drawn.stages if row.stage != "select"] == [
        recipe.align.tokens, recipe.distil.tokens, recipe.finetune.tokens,
    ]  # fmt: skip
    assert {kind.mixer for kind in drawn.mixers} <= {recipe.mixer, "softmax", "keep"}


@pytest.mark.parametrize("size", HALO_RATES)
@pytest.mark.parametrize("method", ["halo", "jet-nemotron"])
def test_halo_has_the_numbers_of_its_paper(method: str, size: str) -> None:
    recipe = load_recipe(f"{method}-{size}", [])
    assert (recipe.align.tokens, recipe.distil.tokens, recipe.finetune.tokens) == (320 * 10**6, 10**9, 10**9)
    assert tokens_of_a_step(recipe) == [(512, 32), (512, 96), (16_384, 128)]
    align, distil, finetune = recipe.align.optim, recipe.distil.optim, recipe.finetune.optim
    assert (align.rate, align.rate * align.final, align.schedule) == (1e-3, pytest.approx(1e-5), "cosine")
    assert (distil.rate, distil.rate * distil.final) == (HALO_RATES[size], pytest.approx(1e-5, rel=1e-4))
    assert (finetune.rate, finetune.schedule) == (1e-5, "constant")
    for optim in (align, distil, finetune):
        assert (optim.beta1, optim.beta2, optim.weight_decay, optim.clip, optim.warmup_steps) == (0.9, 0.95, 0, 1, 50)
    assert recipe.data.startswith("HuggingFaceFW/fineweb-edu") and recipe.mixer == "lightning" and recipe.hype
    assert recipe.select == method and (recipe.distil.temperature, recipe.distil.ce_share) == (1.0, 0.0)


@pytest.mark.parametrize("size", HALO_RATES)
def test_radlads_has_the_numbers_of_its_paper(size: str) -> None:
    recipe = load_recipe(f"radlads-{size}", [])
    assert recipe.tokens() == TokenBudget(align=100 * 10**6, select=0, distil=500 * 10**6, finetune=100 * 10**6)
    assert tokens_of_a_step(recipe) == [(512, 32), (512, 96), (16_384, 96)]
    assert [s.optim.rate for s in (recipe.align, recipe.distil, recipe.finetune)] == [1e-3, 1e-5, 1e-5]
    assert recipe.distil.optim.schedule == "constant" and recipe.keep == 0 and recipe.scale is None


@pytest.mark.parametrize("size", HALO_RATES)
def test_kl_ls_has_the_numbers_of_its_paper(size: str) -> None:
    recipe = load_recipe(f"kl-ls-{size}", [])
    budget = recipe.tokens()
    assert (budget.align, budget.distil, budget.finetune) == (100 * 10**6, 600 * 10**6, 0)
    assert budget.select == pytest.approx(SIZES[size] * 200e6, rel=0.01)
    assert tokens_of_a_step(recipe)[:2] == [(512, 96), (4096, 32)]
    assert recipe.align.optim.rate == 1e-3 and recipe.distil.optim.schedule == "constant"
    assert (recipe.distil.optim.rate, recipe.distil.optim.rest_rate) == (1e-4, 7e-6)
    assert not recipe.hype and recipe.scale is None and recipe.mixer == "gated_deltanet"


def test_the_tiny_recipes_share_one_alignment_and_one_budget_of_training() -> None:
    halo, *others = (load_recipe(f"{method}-tiny", []) for method in METHODS)
    for recipe in others:
        assert (recipe.align, recipe.mixer, recipe.distil, recipe.finetune) == (
            halo.align, halo.mixer, halo.distil, halo.finetune,
        )  # fmt: skip
    assert halo.tokens().training == 540_000
    restored = load_recipe("kl-ls-tiny", [])
    assert restored.selection.restore_tokens == restored.distil.tokens
    assert restored.tokens().select > 9 * restored.distil.tokens


def test_the_cost_of_selection_follows_from_the_layers_of_the_teacher() -> None:
    recipe = load_recipe("halo-qwen3-1.7b", [])
    one = 2 * 128 * 4096 + 600 * 160
    assert [recipe.tokens(layers).select for layers in (28, 36)] == [pytest.approx(n * one, rel=0.01) for n in (29, 37)]
    assert str(recipe.tokens()) == "align 320M + select 33.2M + distil 1B + finetune 1B = 2.35B tokens"


def write(folder: Path, name: str, text: str) -> str:
    (folder / name).write_text(text)
    return str(folder / name)


def test_a_recipe_says_only_what_differs_from_the_one_it_extends(tmp_path: Path) -> None:
    base = load_recipe("halo-tiny", [])
    path = write(
        tmp_path, "mine.yaml",
        "extends: halo-tiny\nname: mine\ndistil:\n  lengths: [256]\n  optim: {rate: 1e-3}\nscale: null\n",
    )  # fmt: skip
    mine = load_recipe(path, ["keep=1"])
    assert mine.align == base.align and mine.scale is None and mine.summary == "" and mine.keep == 1
    assert (mine.distil.lengths, mine.distil.optim.rate) == ([256], 1e-3)
    assert mine.distil.optim.matrix_rate == base.distil.optim.matrix_rate and mine.distil.tokens == base.distil.tokens


def test_a_recipe_extends_a_file_beside_it_wherever_the_command_runs(tmp_path: Path, monkeypatch) -> None:
    folder = tmp_path / "recipes"
    folder.mkdir()
    write(folder, "base.yaml", "extends: halo-tiny\nname: base\nsummary: not this one\nseed: 7\n")
    path = write(folder, "mine.yml", "extends: base.yaml\nname: mine\nmixer: gla\nmixer_options: null\n")
    monkeypatch.chdir(tmp_path)
    mine = load_recipe(path, [])
    assert (mine.seed, mine.mixer, mine.mixer_options, mine.summary) == (7, "gla", {}, "")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("extends: halo-tinny\nname: a\n", "unknown recipe 'halo-tinny'; did you mean 'halo-tiny'"),
        ("extends: nowhere.yaml\nname: a\n", "nowhere.yaml does not exist"),
        ("extends: [halo-tiny]\nname: a\n", "must name one recipe"),
        ("extends: halo-tiny\n", "lacks the field 'name'"),
        ("extends: a.yaml\nname: a\n", "in a circle: a.yaml -> a.yaml"),
        ("extends: halo-tiny\nname: a\ndistil: {temprature: 2}\n", "did you mean 'temperature'"),
        ("extends: halo-tiny\nname: a\ndistil: {temperature: 0}\n", "must be above 0"),
        ("extends: halo-tiny\nname: a\ndistil: {ce_share: 1.5}\n", "a share from 0"),
        ("extends: halo-tiny\nname: a\ndistil: {tokens: 0}\n", "of the stages only finetune may have no budget"),
        ("extends: halo-tiny\nname: a\nalign: {batch_tokens: 0}\n", "a.yaml.align: batch_tokens is 0; it must be 1"),
        ("extends: halo-tiny\nname: a\nalign: {lengths: []}\n", "a.yaml.align: lengths is "),
        (
            "extends: halo-tiny\nname: a\nfinetune: {batch_tokens: 100}\n",
            "batch_tokens 100 is below the longest",
        ),
        ("extends: halo-tiny\nname: a\ndistil: {planted: 40}\n", "a share from 0 .text alone. to 1"),
        ("- a\n", "must be a table"),
    ],
)
def test_a_recipe_that_makes_no_sense_is_refused(tmp_path: Path, text: str, message: str) -> None:
    with pytest.raises(UserError, match=message):
        load_recipe(write(tmp_path, "a.yaml", text), [])


def test_a_circle_of_several_files_is_named_whole(tmp_path: Path) -> None:
    for name, parent in (("a", "b"), ("b", "c"), ("c", "a")):
        write(tmp_path, f"{name}.yaml", f"extends: {parent}.yaml\nname: {name}\n")
    with pytest.raises(UserError, match="a.yaml -> b.yaml -> c.yaml -> a.yaml"):
        load_recipe(str(tmp_path / "a.yaml"), [])
