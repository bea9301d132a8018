"""Needles, lists and the grid as sampled tasks: the same samples whatever else is asked, and sharing that is exact."""

from __future__ import annotations

import re

import numpy as np
import pytest
import torch
from transformers import PreTrainedModel

from halobench.surgery.plan import SurgeryPlan
from halobench.surgery.transplant import transplant
from halobench.tasks.needle import Haystack, build_haystacks, build_lists
from halobench.tasks.retrieval import GRID_DEPTHS, GridTask, ListTask, NeedleTask
from halobench.tasks.schedule import measure
from halobench.tasks.suites import held_out_filler


@pytest.fixture(scope="module", autouse=True)
def own_cache(tmp_path_factory):  # type: ignore[no-untyped-def]
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("HALOBENCH_CACHE", str(tmp_path_factory.getbasetemp() / "cache"))
        yield


@pytest.fixture(scope="module")
def filler(own_cache, bpe) -> np.ndarray:  # type: ignore[no-untyped-def]
    return held_out_filler(bpe)


@pytest.fixture(params=["decoder", "hybrid"])
def model(request, reader) -> PreTrainedModel:  # type: ignore[no-untyped-def]
    if request.param == "decoder":
        return reader
    torch.manual_seed(0)
    return transplant(reader, SurgeryPlan.for_model(reader, keep=[1, 3])).eval()


def same(one: Haystack, two: Haystack) -> bool:
    return np.array_equal(one.context, two.context) and (one.questions, one.answers) == (two.questions, two.answers)


def test_a_sample_is_the_haystack_of_that_number(bpe, filler) -> None:  # type: ignore[no-untyped-def]
    for task, built in (
        (NeedleTask(bpe, filler, seed=3), build_haystacks(bpe, filler, 300, 3, 3)),
        (ListTask(bpe, filler, seed=3), build_lists(bpe, filler, 300, 3, 3)),
    ):
        assert all(same(task.haystack(300, index), built[index]) for index in (2, 0))


def test_the_numbers_of_the_embedded_teacher_stay_what_they_were(own_cache) -> None:  # type: ignore[no-untyped-def]
    from halobench.models import load

    model, tokenizer = load("tiny", device="cpu")
    filler = held_out_filler(tokenizer)
    needles, _ = measure(NeedleTask(tokenizer, filler, seed=0), model, 512, 2, device=torch.device("cpu"))
    lists, _ = measure(ListTask(tokenizer, filler, seed=0), model, 512, 2, device=torch.device("cpu"))
    assert needles[0].samples == [1.0] * 8
    assert needles[1].samples == pytest.approx(
        [-0.0072, -0.014, -0.0102, -0.0024, -0.0025, -0.0043, -0.0016, -0.0036], abs=2e-4
    )
    assert needles[0].depths == [0.0792, 0.1187, 0.6604, 0.7833, 0.1479, 0.325, 0.4688, 0.8438]
    assert lists[0].samples == [1.0] * 8 + [0.0] + [1.0] * 7
    assert lists[1].value == pytest.approx(-0.8922, abs=1e-3)


@pytest.mark.parametrize("length", [400, 1501])
def test_the_facts_of_the_grid_stand_at_exactly_spaced_depths(length, bpe, filler) -> None:  # type: ignore[no-untyped-def]
    haystack = GridTask(bpe, filler, seed=0).haystack(length, 1)
    assert haystack.length == length and len(haystack.questions) == GRID_DEPTHS
    context, taken, places = haystack.context.tolist(), 0, []
    for question, answer in zip(haystack.questions, haystack.answers, strict=True):
        key = re.search(r"for (\w+)\?", bpe.decode(question))
        assert key is not None
        fact = bpe(f" The magic number for {key[1]} is:{bpe.decode(answer)}.")["input_ids"]
        start = next(i for i in range(len(context)) if context[i : i + len(fact)] == fact)
        places.append(start - taken)
        taken += len(fact)
    room = len(context) - taken
    assert (places[0], places[-1]) == (0, room)
    assert all(abs(place - i * room / 12) <= 0.5 for i, place in enumerate(places))
    assert haystack.depths == [round(i / 12, 4) for i in range(13)]


def test_the_grid_scores_as_separate_prompts_do_and_reads_a_fraction(model, bpe, filler) -> None:  # type: ignore[no-untyped-def]
    task = GridTask(bpe, filler, seed=0)
    (scored,) = task.score(model, 700, [0])
    haystack = task.haystack(700, 0)
    alone, given = [], 0
    for question, answer in zip(haystack.questions, haystack.answers, strict=True):
        ids = [*haystack.context.tolist(), *question, *answer]
        given += len(ids)
        with torch.no_grad():
            logits = model(input_ids=torch.tensor([ids])).logits[0].log_softmax(-1)
        alone.append(sum(float(logits[i - 1, ids[i]]) for i in range(len(ids) - len(answer), len(ids))))
    np.testing.assert_allclose(scored.values["answer_logprob"], alone, atol=2e-3)
    assert scored.tokens_plain == given and scored.truncated == 0 and scored.prompt_tokens == 700
    assert scored.tokens_plain > 5 * scored.tokens


def test_a_sample_does_not_depend_on_its_neighbours(model, bpe, filler) -> None:  # type: ignore[no-untyped-def]
    task = GridTask(bpe, filler, seed=0)
    alone, together = task.score(model, 500, [2])[0], task.score(model, 500, [0, 1, 2])[2]
    np.testing.assert_allclose(together.values["answer_logprob"], alone.values["answer_logprob"], atol=2e-3)
    assert together.tokens == alone.tokens


@pytest.mark.parametrize("kind", [NeedleTask, ListTask, GridTask])
@pytest.mark.parametrize("length", [600, 4096])
def test_what_a_sample_will_read_is_known_beforehand(kind, length, bpe, filler, pico) -> None:  # type: ignore[no-untyped-def]
    task = kind(bpe, filler, seed=1)
    model = pico(vocab_size=len(bpe), num_hidden_layers=1)
    read = [scored.tokens for scored in task.score(model, length, [0, 1, 2])]
    assert task.sample_tokens(length) == pytest.approx(np.mean(read), rel=0.03)
