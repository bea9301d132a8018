"""generate() steps with the decode engine where it can, and says the same as without."""

from __future__ import annotations

import copy
import functools
import gc
import weakref

import pytest
import torch

from halobench.errors import UserError
from halobench.surgery import engine as engine_package
from halobench.surgery.engine import DecodeEngine
from halobench.tasks import decoder, generation
from halobench.tasks.scoring import TokenCount
from tests.decoding import assert_same, prompt, student_of


def count_steps(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    taken: list[int] = []
    original = DecodeEngine.step
    monkeypatch.setattr(DecodeEngine, "step", lambda self, ids, **more: taken.append(1) or original(self, ids, **more))
    return taken


def test_generate_steps_with_the_engine_and_says_the_same(teacher, monkeypatch) -> None:  # type: ignore[no-untyped-def]
    student, taken = student_of(teacher), count_steps(monkeypatch)
    options = {"max_new_tokens": 8, "do_sample": False, "eos_token_id": -1, "pad_token_id": 2}
    made = student.generate(prompt(), **options)
    assert len(taken) == 7
    assert torch.equal(made, student.generate(prompt(), use_cache=False, **options)) and len(taken) == 7


@pytest.mark.parametrize("kind", ["teacher", "hybrid"])
def test_tokens_of_steps_are_counted_as_those_of_forwards(teacher, monkeypatch, kind) -> None:  # type: ignore[no-untyped-def]
    model, taken, ran = teacher if kind == "teacher" else student_of(teacher), count_steps(monkeypatch), {}  # type: ignore[var-annotated]
    options = {"max_new_tokens": 8, "do_sample": False, "eos_token_id": -1, "pad_token_id": 2}

    def tokens() -> int:
        with TokenCount(model) as count:
            answers = generation.generate(model, prompt().tolist(), 8, ran=ran)
            model.generate(prompt(), **options)
        assert sum(answer.read for answer in answers) == 2 * (21 + 7)
        return count.tokens

    stepped = tokens()
    assert ran["replay"] == "operations" and len(taken) == (7 if kind == "teacher" else 14)
    for module in (decoder, engine_package):
        monkeypatch.setattr(module, "refusal", lambda model: "off")
    taken.clear()
    assert tokens() == stepped == 2 * 2 * (21 + 7) and not taken


def test_a_cache_from_generate_knows_no_engine(teacher) -> None:  # type: ignore[no-untyped-def]
    student = student_of(teacher)
    options = {"max_new_tokens": 6, "do_sample": False, "eos_token_id": -1, "pad_token_id": 2}
    made = student.generate(prompt(), return_dict_in_generate=True, **options)
    cache, token = made.past_key_values, made.sequences[:, -1:]
    assert cache.engine is None and cache.steps is None
    twin = copy.deepcopy(cache)
    student.set_logits_scale(2.0)
    with torch.no_grad():
        outputs = [student(token, past_key_values=cache).logits for _ in range(3)]
        again = [student(token, past_key_values=twin).logits for _ in range(3)]
    assert not torch.equal(outputs[0], outputs[2]) and all(map(torch.equal, outputs, again))
    gone = weakref.ref(cache)
    gc.disable()
    try:
        del made, cache
        assert gone() is None
    finally:
        gc.enable()


def test_logits_that_generate_was_given_are_not_written_over(teacher, monkeypatch) -> None:  # type: ignore[no-untyped-def]
    student, kept = student_of(teacher), []
    original = student.forward

    @functools.wraps(original)
    def keeping(*args: object, **kwargs: object) -> object:
        output = original(*args, **kwargs)
        kept.append((output.logits, output.logits.clone()))
        return output

    monkeypatch.setattr(student, "forward", keeping)
    student.generate(prompt(), max_new_tokens=6, do_sample=False, eos_token_id=-1, pad_token_id=2)
    assert len(kept) == 6 and all(torch.equal(logits, then) for logits, then in kept)


def test_under_autocast_plain_forwards_generate(teacher, monkeypatch) -> None:  # type: ignore[no-untyped-def]
    student, taken = student_of(teacher), count_steps(monkeypatch)
    engine = DecodeEngine(student, room=50)
    with torch.autocast("cpu", torch.bfloat16):
        student.generate(prompt(), max_new_tokens=3, do_sample=False, eos_token_id=-1, pad_token_id=2)
        with pytest.raises(UserError, match="under autocast"):
            engine.prefill(prompt())
    assert not taken


def test_what_the_engine_has_not_is_generated_by_plain_forwards(teacher, monkeypatch) -> None:  # type: ignore[no-untyped-def]
    student, taken = student_of(teacher), count_steps(monkeypatch)
    mask = torch.ones_like(prompt())
    mask[1, :5] = 0
    for options in (
        {"attention_mask": mask},
        {"num_beams": 2},
        {"output_hidden_states": True, "return_dict_in_generate": True},
    ):
        student.generate(prompt(), max_new_tokens=3, do_sample=False, pad_token_id=2, **options)
    assert not taken


def test_a_cache_from_generate_takes_further_text(teacher) -> None:  # type: ignore[no-untyped-def]
    student = student_of(teacher)
    options = {"max_new_tokens": 6, "do_sample": False, "eos_token_id": -1, "pad_token_id": 2}
    made = student.generate(prompt(), return_dict_in_generate=True, **options)
    further = torch.cat((made.sequences[:, -1:], prompt()[:, :5]), dim=1)
    with torch.no_grad():
        got = student(further, past_key_values=made.past_key_values).logits
        expected = student(torch.cat((made.sequences, prompt()[:, :5]), dim=1)).logits[:, -6:]
    assert_same(got, expected)
