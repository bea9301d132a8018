"""What layers are chosen by, measured on the real tasks: the evidence, its price, and the workbench of searches."""

from __future__ import annotations

import copy
from dataclasses import replace
from functools import cached_property
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch import Tensor

from halobench import evidence as gathering
from halobench.errors import UserError
from halobench.evidence import carrier, gather, measure, prices, question
from halobench.probes import TextProbe, make_probe
from halobench.recipe import load_recipe
from halobench.surgery.anatomy import attention_modules, read_attention
from halobench.surgery.corpus import open_text
from halobench.surgery.parallel import Team
from halobench.surgery.planted import Mixture, Planted
from halobench.surgery.selection.locality import WatchedAttention, local_share
from halobench.surgery.selection.scores_file import read_scores
from halobench.surgery.selection.sweep import State
from halobench.surgery.stages.align import Alignment
from halobench.surgery.transplant import build_mixers, swapped
from halobench.tasks import suites
from halobench.workbench import Bench
from tests.families import make_family

REPLACED = {"recall", "csr", "text"}

EXACT = {"rope": True, "output_gate": False}
SMALL = [
    "selection.length=224", "selection.haystacks=2", "selection.items=3", "selection.kl_sequences=3",
    "selection.kl_length=64", "distil.lengths=[64]", "distil.batch_tokens=64", "scale.candidates=[50, 100, 400]",
]  # fmt: skip


class Desk:
    """What selection asks of a conversion, on a pico teacher. `broken`: layers whose mixers give the opposite."""

    teacher_name, teacher_hash, device, team, kernels = "pico", "0", "cpu", Team(), "auto"

    def __init__(self, teacher, tokenizer, folder: Path, broken: tuple[int, ...] = (2,)) -> None:
        self.teacher, self.tokenizer, self.broken = teacher.requires_grad_(False), tokenizer, broken
        self.recipe = load_recipe("halo-tiny", SMALL)
        self.base, self.layers = SimpleNamespace(path=folder), 4
        self.align = lambda: SimpleNamespace(sequences=10, position=650)

    @cached_property
    def _mixers(self):
        made = build_mixers(self.teacher, "softmax", EXACT)
        with torch.no_grad():
            for layer in self.broken:
                made[layer].o_proj.weight.neg_()
        return made

    def mixers(self):
        return {layer: mixer.eval() for layer, mixer in copy.deepcopy(self._mixers).items()}

    def data(self, config) -> Mixture:
        text = open_text("sample", self.tokenizer, 0)
        planted = Planted(self.tokenizer, text, 0) if config.planted else None
        return Mixture(text, planted, config.planted, 0)


@pytest.fixture(autouse=True)
def short_filler(bpe, monkeypatch) -> None:
    """Haystacks from a page of text, to save looking for sentences in all of it."""
    text = suites.held_out_filler(bpe)[:20_000]
    monkeypatch.setattr(suites, "held_out_filler", lambda tokenizer: text)


@pytest.fixture
def desk(reader, bpe, tmp_path: Path) -> Desk:
    return Desk(reader, bpe, tmp_path)


def test_the_evidence_tells_the_broken_layer_from_those_that_equal_their_attention(desk: Desk, tmp_path: Path) -> None:
    found = gather(desk, tmp_path, {*REPLACED, "restored"})
    assert found.original["text"] == {"kl": 0.0}
    for entry in found.replaced:
        differs = entry.layer in desk.broken
        assert (entry.scores["text"]["kl"] > 1e-3) is differs
        assert entry.scores["text"]["hidden_error"] == pytest.approx(4.0 if differs else 0.0, abs=1e-5)  # |-o - o|^2
        for task, metric in (("needles", "answer_logprob"), ("lists", "answer_logprob"), ("continuation", "margin")):
            same = entry.scores[task][metric] == pytest.approx(found.original[task][metric], abs=1e-5)
            assert same is not differs
    assert found.linear["text"]["kl"] > 1e-3
    kl = found.scores("restored", ["text"], "kl")
    assert kl.argmin() == 2 and kl[2] == pytest.approx(0, abs=1e-6)
    assert kl[[0, 1, 3]] == pytest.approx(found.linear["text"]["kl"], abs=1e-5)


def test_each_sample_is_an_independent_one_and_has_a_value_for_every_layer(desk: Desk, tmp_path: Path) -> None:
    found = gather(desk, tmp_path, REPLACED)
    sizes = {"needles": 2, "lists": 2, "continuation": 3, "text": 3}
    for entry in found.replaced:
        assert entry.samples is not None
        assert {task: {len(v) for v in values.values()} for task, values in entry.samples.items()} == {
            task: {size} for task, size in sizes.items()
        }
    assert found.restored == [] and found.linear == {}
    assert read_scores(tmp_path / "evidence.json") == found
    assert found.resamples("replaced", ["text"], "kl", 10) is not None


def test_what_is_there_is_not_measured_again_and_more_is_added_to_it(desk: Desk, tmp_path: Path, monkeypatch) -> None:
    first = gather(desk, tmp_path, REPLACED)
    seen: list[str] = []
    monkeypatch.setattr(
        TextProbe, "unit", lambda self, a, b, unit=TextProbe.unit: seen.append("text") or unit(self, a, b)
    )
    assert gather(desk, tmp_path, REPLACED) == first and seen == []
    more = gather(desk, tmp_path, {*REPLACED, "restored"})
    assert seen and more.replaced == first.replaced and len(more.restored) == 4


def test_a_need_has_its_own_tasks_measured_and_the_file_keeps_those_before(desk: Desk, tmp_path: Path) -> None:
    recall = gather(desk, tmp_path, {"recall"})
    assert set(recall.costs["replaced"]) == {"needles", "lists"} and "text" not in recall.original
    assert recall.spent({"text"}, 100) == 0.0 < recall.spent({"recall"}, recall.cost("replaced", ["needles"]))
    text = gather(desk, tmp_path, {"text"})
    assert set(text.costs["replaced"]) == {"needles", "lists", "text"} and "continuation" not in text.original
    assert read_scores(tmp_path / "evidence.json") == text


def test_processes_share_the_measurements(desk: Desk, tmp_path: Path) -> None:
    whole = gather(desk, tmp_path / "whole", {*REPLACED, "restored"})
    for rank in (0, 1):
        measure(desk, tmp_path / "shared", {*REPLACED, "restored"}, rank, 2)
    shared = gather(desk, tmp_path / "shared", {*REPLACED, "restored"})
    assert replace(shared, seconds={}) == replace(whole, seconds={})


def test_a_new_alignment_is_swept_anew(reader, bpe, tmp_path: Path) -> None:
    old = gather(Desk(reader, bpe, tmp_path), tmp_path, REPLACED)
    new = gather(Desk(reader, bpe, tmp_path, broken=(0, 1)), tmp_path, REPLACED)
    assert [e.scores["text"]["kl"] > 1e-3 for e in old.replaced] == [False, False, True, False]
    assert [e.scores["text"]["kl"] > 1e-3 for e in new.replaced] == [True, True, False, False]


def test_prices_are_what_the_evidence_then_costs(desk: Desk, tmp_path: Path) -> None:
    asked = prices(desk)
    found = gather(desk, tmp_path, {*REPLACED, "restored"})
    assert (asked.layers, asked.keep) == (4, 1)
    assert found.cost("replaced", ["needles", "lists"]) == 5 * asked.recall
    assert found.cost("replaced", ["continuation"]) == 5 * asked.csr
    assert found.cost("replaced", ["text"]) == found.cost("restored", ["text"]) == 5 * asked.text == 5 * 3 * 64
    assert 0.5 < found.layer_forwards["run"] / found.layer_forwards["one_by_one"] < 0.75  # 0.7 at 4 layers


def test_items_are_priced_by_the_tokens_that_they_are(desk: Desk) -> None:
    probe = make_probe(desk, "needles")
    for haystack, size in zip(probe.haystacks, probe.sizes, strict=True):
        assert haystack.length == 224 < size
        assert size == len(haystack.context) + sum(map(len, haystack.questions)) + sum(map(len, haystack.answers))


def test_the_hidden_error_is_that_of_the_alignment(reader, bpe, tmp_path: Path) -> None:
    desk = Desk(reader, bpe, tmp_path, broken=())
    mixers = {layer: mixer.eval() for layer, mixer in build_mixers(reader, "lightning").items()}
    probe = make_probe(desk, "text", samples=1)
    unit, hybrid = probe.unit(0, 1), carrier(desk)
    unit.measure(hybrid, State("original"))
    alignment = Alignment(reader, mixers, relative=True)
    row = probe.tokens
    alignment.loss(torch.cat((row, row[:, :1]), dim=1), torch.ones(1, 65))  # the last token is no input there
    for layer, mixer in mixers.items():
        with swapped(hybrid, {layer: mixer}):
            found = unit.measure(hybrid, State("replaced", layer))
        assert found["hidden_error"][0] == pytest.approx(alignment.layer_errors[layer], rel=1e-4)
        assert set(found) == {"kl", "hidden_error", "local_attention"}


@pytest.mark.parametrize("family", ["qwen3", "gpt_neox", "mistral", "gemma2", "gpt_oss", "gpt2"])
def test_local_attention_is_the_share_in_the_models_own_attention_matrix(family: str) -> None:
    model = make_family(family)
    model.set_attn_implementation("eager")
    tokens = torch.randint(3, 101, (2, 100), generator=torch.Generator().manual_seed(0))
    seen: dict[int, tuple[Tensor, object, Tensor]] = {}

    def keep(layer: int):
        def hook(module, args, kwargs, output) -> None:
            hidden = kwargs["hidden_states"] if "hidden_states" in kwargs else args[0]
            seen[layer] = (hidden, kwargs.get("position_embeddings"), output[1])

        return hook

    for layer, module in attention_modules(model).items():
        module.register_forward_hook(keep(layer), with_kwargs=True)
    with torch.no_grad():
        model(tokens, output_attentions=True)
        for view in read_attention(make_family(family)):
            hidden, tables, weights_BHTT = seen[view.layer_index]
            attention = WatchedAttention.of(view)
            attention._project(hidden, tables)
            behind = torch.arange(100)[:, None] - torch.arange(100)
            far = (behind >= 100 // 8) & (torch.arange(100) >= 4)
            expected = 1 - (weights_BHTT * far)[:, :, -64:].sum(-1).mean((1, 2))
            torch.testing.assert_close(attention.share_B, expected, rtol=1e-4, atol=1e-5)
            assert float(expected.min()) > 0 and float(expected.max()) <= 1 + 1e-6


def test_attention_on_near_and_first_tokens_is_local() -> None:
    keys = torch.nn.functional.one_hot(torch.arange(256), 256)[None, :, None].float()

    def share(target: Tensor) -> float:
        queries = 100 * torch.nn.functional.one_hot(target, 256)[None, :, None].float()
        return float(local_share(queries, keys, scale=1.0))

    now = torch.arange(256)
    assert share(now) == share((now - 31).clamp(min=0)) == share(now * 0 + 3) == pytest.approx(1)
    assert share((now - 32).clamp(min=0)) == share(now * 0 + 4) == pytest.approx(0)  # of 256 tokens 32 are recent


@pytest.fixture
def bench(desk: Desk, tmp_path: Path) -> Bench:
    return Bench(desk, tmp_path / "workbench")


def test_the_workbench_scores_any_set_of_layers(bench: Bench) -> None:
    assert max(bench.measure([2], "text").samples["kl"]) < 1e-6
    assert min(bench.measure([0, 1, 3], "text").samples["kl"]) > 1e-3
    needles = bench.measure([1, 2], "needles")
    assert needles.samples.keys() == {"answer_logprob", "accuracy"} and len(needles.samples["accuracy"]) == 2
    assert bench.measure([], "continuation", samples=2).samples.keys() == {"margin", "acc", "acc_norm"}


def test_sharing_hidden_states_between_sets_changes_nothing(desk: Desk, tmp_path: Path, monkeypatch) -> None:
    sets = {(0,): 0, (0, 1): 1, (0, 2): 1, (0, 3): 2, (1, 3): 0, (): 1}  # and the first layer that each computes
    shared = Bench(desk, tmp_path / "shared")
    answers, spent = [], [0]
    for kept in sets:
        answers.append(shared.measure(kept, "lists"))
        tapes = [tape for table in shared._tables.values() for tape in table.tapes or []]
        spent.append(sum(tape.meter.run for tape in tapes))
    whole = spent[1]
    assert np.diff(spent).tolist() == [whole * (4 - first) / 4 for first in sets.values()]
    monkeypatch.setattr("halobench.workbench.TAPE_BYTES", 0)
    alone = Bench(desk, tmp_path / "alone")
    assert [alone.measure(kept, "lists") for kept in sets] == answers
    assert [table.tapes for table in alone._tables.values()] == [None]


def test_a_search_repeats_nothing(desk: Desk, bench: Bench, tmp_path: Path, monkeypatch) -> None:
    first = bench.measure([1], "needles")
    again = Bench(desk, tmp_path / "workbench")
    monkeypatch.setattr(Bench, "_run", lambda *_: pytest.fail("it was measured again"))
    assert again.measure([1], "needles", samples=2, length=224) == first
    for changed in ({"samples": 1}, {"length": 256}, {"hype": True}):
        with pytest.raises(pytest.fail.Exception):
            again.measure([1], "needles", **{"samples": 2, **changed})


def test_other_mixers_take_the_place_of_the_aligned_ones(bench: Bench) -> None:
    mended = bench.training_mixers()
    assert all(p.requires_grad and p.dtype == torch.float32 for m in mended.values() for p in m.parameters())
    assert all(mixer.training for mixer in mended.values())
    with torch.no_grad():
        mended[2].o_proj.weight.neg_()
    assert min(bench.measure([], "text").samples["kl"]) > 1e-3
    assert max(bench.measure([], "text", mixers=mended).samples["kl"]) < 1e-6
    assert max(bench.measure([], "text", mixers={2: mended[2]}).samples["kl"]) < 1e-6
    assert all(mixer.training for mixer in mended.values())


def test_hype_takes_positions_away_and_scales_queries_beyond_the_trained_length(bench: Bench, monkeypatch) -> None:
    assert max(bench.measure([2], "text", hype=True).samples["kl"]) > 1e-3
    near = bench.measure([0, 2], "needles", length=224, samples=1, hype=True)
    monkeypatch.setattr(Bench, "_scale", lambda *_: None)
    assert bench.measure([0, 2], "needles", length=224, samples=1, hype=True) != near


def test_queries_are_scaled_by_the_middle_candidate_beyond_the_trained_length(bench: Bench) -> None:
    assert bench._scale(64) is None and bench._scale(None) is None
    assert bench._scale(65) == 100


def test_training_data_has_planted_retrieval_as_asked(bench: Bench) -> None:
    assert bench.data(0.0).planted is None
    assert bench.data(0.5).share == 0.5


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"kept": [4], "task": "text"}, "the model's layers are 0 to 3"),
        ({"kept": [], "task": "needle"}, "did you mean 'needles'"),
        ({"kept": [], "task": "continuation", "length": 64}, "leave the length out"),
        ({"kept": [], "task": "needles", "length": 40}, "has no room"),
    ],
)
def test_a_measurement_that_cannot_be_says_why(bench: Bench, arguments, message: str) -> None:
    with pytest.raises(UserError, match=message):
        bench.measure(**arguments)


def test_a_question_has_what_its_selectors_read(desk: Desk) -> None:
    plain = question(desk, {"workbench"}, 1)
    assert plain.evidence is None and plain.require_workbench("x").layers == 4
    swept = question(desk, REPLACED, 2, given=(0, 1))
    assert swept.workbench is None and len(swept.require("x").replaced) == 4
    assert (swept.layers, swept.keep, swept.given) == (4, 2, (0, 1))
    assert question(desk, frozenset(), 1).evidence is None


def test_candidates_are_trained_one_by_one_and_their_last_losses_kept(desk: Desk, tmp_path: Path, monkeypatch) -> None:
    with pytest.raises(UserError, match="restore_tokens 0"):
        gather(desk, tmp_path, {*REPLACED, "redistilled"})
    desk.recipe = replace(desk.recipe, selection=replace(desk.recipe.selection, restore_tokens=640))
    trained: list[int] = []

    def train(conversion, layer: int, folder: Path):
        trained.append(layer)
        folder.mkdir()
        hybrid = carrier(conversion)
        hybrid.get_output_embeddings().weight.mul_(1 + layer / 10)
        return hybrid, SimpleNamespace(last_loss=layer / 8, tokens=640, seconds=2.0)

    monkeypatch.setattr(gathering, "_trained", train)
    measure(desk, tmp_path, {"redistilled"}, rank=1, size=2)
    assert trained == [1, 3]
    found = gather(desk, tmp_path, {*REPLACED, "redistilled"})
    assert trained == [1, 3, 0, 2]
    assert list(found.scores("redistilled", ["text"], "train_kl")) == [0, 0.125, 0.25, 0.375]
    kl = found.scores("redistilled", ["text"], "kl")
    assert kl[0] == pytest.approx(0, abs=1e-7) and (np.diff(kl) > 0).all()
    assert found.costs["redistilled"] == {"text": 4 * (640 + 3 * 64)} == {"text": 4 * (prices(desk).restore + 192)}
    assert found.seconds["redistilled"] == {"text": 8.0} and found.seconds["replaced"]["needles"] > 0
    assert found.spent({"redistilled"}, found.cost("redistilled", ["text"])) == 8.0
    assert found.spent({"redistilled"}, found.cost("redistilled", ["text"]) // 2) == 4.0
    assert not list(tmp_path.glob("redistilled-*/training-*"))


def test_a_candidate_is_the_student_with_one_softmax_layer_trained_by_kl(desk: Desk, tmp_path: Path) -> None:
    mixers = build_mixers(desk.teacher, "lightning", desk.recipe.mixer_options)
    desk.mixers = lambda dtype=None: {layer: mixer.eval() for layer, mixer in copy.deepcopy(mixers).items()}
    distil, budget = desk.recipe.distil, replace(desk.recipe.selection, restore_tokens=256 * 8)
    distil = replace(distil, precision="fp32", batch_tokens=256, optim=replace(distil.optim, warmup_steps=1))
    desk.recipe = replace(desk.recipe, selection=budget, distil=distil)
    student, result = gathering._trained(desk, 1, tmp_path / "training")
    assert sorted(student.mixer_modules()) == [0, 2, 3]
    assert result.tokens == 256 * 8 and result.sequences == 10 + 32 and result.position == 650 + 32 * 65
    assert result.last_loss < 0.95 * result.first_loss
    assert all(not p.requires_grad for p in desk.teacher.parameters())
