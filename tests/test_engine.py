"""The decode engine: the tokens of the plain path, whatever the family, by replay and without, and what it refuses."""

from __future__ import annotations

import functools
import threading
import weakref

import pytest
import torch
from torch import Tensor

from halobench.errors import HalobenchError, UserError
from halobench.kernels.attention.decode import decode_attention
from halobench.kernels.attention.naive import attend_naive
from halobench.mixers.memory import Place
from halobench.surgery.engine import DecodeEngine, refusal
from halobench.surgery.engine import attention as engine_attention
from halobench.surgery.engine.tape import Tape
from halobench.tasks import generation
from halobench.tasks.scoring import TokenCount
from tests.decoding import STEPS, assert_same, engines, plain, prompt, student_of
from tests.families import make_family

FAMILIES = ["qwen3", "mistral", "gemma2", "gpt_oss", "stablelm", "qwen3_moe", "gpt2"]


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("kind", ["teacher", "hybrid", "layers kept untouched"])
def test_steps_give_the_logits_of_plain_forwards(family, kind) -> None:  # type: ignore[no-untyped-def]
    model = make_family(family)
    model = model if kind == "teacher" else student_of(model, hype=kind == "hybrid")
    got, engine = engines(model, prompt())
    assert_same(got, plain(model, prompt()))
    # GPT-2 asks for a number of its own tensors, which nothing replayed could follow
    assert ("_local_scalar_dense" if family == "gpt2" else "operations") in engine.backends["replay"]


@pytest.mark.parametrize("mixer", ["retnet", "gated_deltanet", "rwkv7", "sliding_window"])
def test_every_kind_of_state_is_stepped(teacher, mixer) -> None:  # type: ignore[no-untyped-def]
    student = student_of(teacher, mixer=mixer)
    got, engine = engines(student, prompt())
    assert_same(got, plain(student, prompt()))
    assert engine.backends["replay"] == "operations"


def test_a_model_without_any_softmax_layer_is_stepped(teacher) -> None:  # type: ignore[no-untyped-def]
    student = student_of(teacher, keep=0)
    got, engine = engines(student, prompt())
    assert_same(got, plain(student, prompt()))
    assert "attention" not in engine.backends and "4 layers" in engine.backends["recurrence"]


def test_scales_that_grow_with_the_position_grow_in_replay(teacher) -> None:  # type: ignore[no-untyped-def]
    student = student_of(teacher)
    student.set_logits_scale(2.0)  # log(t + 2) / log(2) changes at every token
    got, _ = engines(student, prompt())
    assert_same(got, plain(student, prompt()))


def test_without_replay_the_numbers_are_the_same(teacher) -> None:  # type: ignore[no-untyped-def]
    got, engine = engines(teacher, prompt(), replay=False)
    assert_same(got, plain(teacher, prompt()))
    assert engine.backends["replay"] == "no: not asked for"


def test_greedy_tokens_are_those_of_generate(teacher) -> None:  # type: ignore[no-untyped-def]
    for model in (teacher, student_of(teacher)):
        engine = DecodeEngine(model, room=60)
        made = [engine.prefill(prompt()).argmax(-1, keepdim=True)]
        for _ in range(10):
            engine.step(made[-1])
            made.append(engine.token.clone())
        expected = teacher.generate if model is teacher else model.generate
        ids = expected(prompt(), max_new_tokens=11, do_sample=False, use_cache=False, eos_token_id=-1, pad_token_id=0)
        assert torch.equal(torch.cat(made, dim=1), ids[:, 21:])


def test_preparing_reads_no_token(teacher) -> None:  # type: ignore[no-untyped-def]
    student = student_of(teacher)
    engine = DecodeEngine(student, room=50)
    token = engine.prefill(prompt()).argmax(-1, keepdim=True)
    engine.prepare(token)
    assert engine.cache.get_seq_length() == 21 and engine.backends["replay"] == "operations"
    assert_same(engine.step(token)[:, None], plain(student, prompt(), 1)[:, 1:])


@pytest.mark.parametrize("family", ["qwen3", "mistral"])
def test_plain_forwards_and_steps_may_take_turns_on_one_cache(family) -> None:  # type: ignore[no-untyped-def]
    model = make_family(family)
    for subject in (model, student_of(model, hype=False)):
        engine, ids = DecodeEngine(subject, room=60), torch.cat((prompt(), prompt().flip(1)), dim=1)
        engine.prefill(ids[:, :10])
        pieces = [engine.step(ids[:, i : i + 1]).clone()[:, None] for i in range(10, 21)]
        pieces.append(engine.prefill(ids[:, 21:30])[:, None])
        twin = engine.cache.clone()
        pieces += [engine.step(ids[:, i : i + 1]).clone()[:, None] for i in range(30, 42)]
        whole = subject(ids).logits.detach()
        assert_same(torch.cat(pieces, dim=1), torch.cat((whole[:, 10:21], whole[:, 29:42]), dim=1))
        with torch.no_grad():  # the twin knows nothing of the steps after it was made
            assert_same(subject(ids[:, 30:33], past_key_values=twin).logits, whole[:, 30:33])


def test_a_step_beyond_the_room_is_refused(teacher) -> None:  # type: ignore[no-untyped-def]
    engine = DecodeEngine(teacher, room=22)
    engine.step(engine.prefill(prompt()).argmax(-1, keepdim=True))
    with pytest.raises(UserError, match="room for 22 tokens, 22 of them read"):
        engine.step(engine.token)
    with pytest.raises(UserError, match="room for 20 tokens, 0 of them read, and was given 21 more"):
        DecodeEngine(teacher, room=20).prefill(prompt())


def test_ids_that_are_not_one_token_a_row_are_refused(teacher) -> None:  # type: ignore[no-untyped-def]
    engine = DecodeEngine(teacher, room=30)
    token = engine.prefill(prompt()).argmax(-1, keepdim=True)
    for wrong in (token[:1], prompt()[:, :2]):
        with pytest.raises(UserError, match=r"give one token a row: \(2, 1\)"):
            engine.step(wrong)


def test_memory_that_ran_out_while_pinning_leaves_the_cache_whole(teacher, monkeypatch) -> None:  # type: ignore[no-untyped-def]
    engine = DecodeEngine(student_of(teacher), room=50)
    token = engine.prefill(prompt()).argmax(-1, keepdim=True)

    def lost(*_: object, **__: object) -> None:
        raise torch.OutOfMemoryError("out of memory")

    with monkeypatch.context() as patch:
        patch.setattr(engine.cache.layers[-1], "pin", lost)
        with pytest.raises(torch.OutOfMemoryError):
            engine.step(token)
    assert_same(engine.step(token)[:, None], plain(engine.model, prompt(), 1)[:, 1:])


def test_reading_on_lets_go_of_what_was_noted(teacher) -> None:  # type: ignore[no-untyped-def]
    engine = DecodeEngine(teacher, room=60)
    engine.prepare(engine.prefill(prompt()).argmax(-1, keepdim=True))
    noted = weakref.ref(engine._replayed)
    assert noted() is not None
    engine.prefill(prompt())
    assert noted() is None


def test_a_config_is_named_by_one_thread_at_a_time(teacher) -> None:  # type: ignore[no-untyped-def]
    before, inside = teacher.config._attn_implementation, threading.Event()

    def other() -> None:
        with engine_attention.decoding(teacher.config):
            inside.set()

    thread = threading.Thread(target=other)
    with engine_attention.decoding(teacher.config):
        thread.start()
        assert not inside.wait(0.05)
    thread.join()
    assert inside.is_set() and teacher.config._attn_implementation == before


def test_what_the_engine_cannot_run_is_named(teacher, pico) -> None:  # type: ignore[no-untyped-def]
    assert "training mode" in str(refusal(pico().train()))
    hooked = pico()
    hook = hooked.model.layers[0].register_forward_hook(lambda *_: None)
    assert "forward hooks" in str(refusal(hooked))
    hook.remove()
    assert refusal(hooked) is None
    assert "on meta, and not on one device" in str(refusal(pico().to("meta")))
    with torch.autocast("cpu", torch.bfloat16):
        assert "autocast is on" in str(refusal(hooked))
    with pytest.raises(UserError, match="cannot run decode_attention here: the tensor is on cpu"):
        DecodeEngine(teacher, room=8, kernels="triton")
    with pytest.raises(UserError, match="read at least one token"):
        DecodeEngine(teacher, room=8).step(prompt()[:, :1])
    teacher.set_attn_implementation("eager")
    with pytest.raises(UserError, match="decode engine cannot run qwen3: its attention is set to 'eager'"):
        DecodeEngine(teacher, room=8)


def test_the_mixers_choice_of_kernels_is_the_engines(teacher) -> None:  # type: ignore[no-untyped-def]
    student = student_of(teacher)
    for mixer in student.mixer_modules().values():
        mixer.backend = "torch"
    _, engine = engines(student, prompt(), 2)
    assert engine.backends["attention"] == "torch (asked for)"
    assert engine.backends["recurrence"] == "torch (torch was asked for): 2 layers"


def test_a_layer_that_attends_elsewhere_is_an_error_and_no_answer(teacher, monkeypatch) -> None:  # type: ignore[no-untyped-def]
    attention = teacher.model.layers[1].self_attn
    monkeypatch.setattr(attention, "forward", lambda hidden_states, **_: (hidden_states, None))
    expected = plain(teacher, prompt(), 1)
    engine = DecodeEngine(teacher, room=40)
    token = engine.prefill(prompt()).argmax(-1, keepdim=True)
    with pytest.raises(HalobenchError, match="3 of 4 layers of qwen3 attended"):
        engine.step(token)
    with torch.no_grad():  # and the cache is as it was
        assert_same(teacher(token, past_key_values=engine.cache).logits, expected[:, 1:])


def test_answers_go_on_by_plain_forwards_where_the_first_step_gives_up(teacher, monkeypatch, capsys) -> None:  # type: ignore[no-untyped-def]
    student, prompts, ran = student_of(teacher, keep=[1, 3]), prompt().tolist(), {}  # type: ignore[var-annotated]
    layers, name = student._layers
    monkeypatch.setattr(getattr(layers[1], name), "forward", lambda hidden_states, **_: (hidden_states, None))
    options = {"max_new_tokens": 6, "do_sample": False, "eos_token_id": -1, "pad_token_id": 2}
    expected = student.generate(prompt(), use_cache=False, **options)
    with TokenCount(student) as count:
        made = generation.generate(student, prompts, 6, ran=ran)
    assert [answer.tokens for answer in made] == expected[:, 21:].tolist() and count.tokens == 2 * (21 + 5)
    assert ran == {"engine": "no: 1 of 2 layers of qwen3 attended to the cache: its decoding cannot be taken over"}
    assert torch.equal(student.generate(prompt(), **options), expected)
    assert "goes on without the decode engine: 1 of 2 layers" in capsys.readouterr().err


def test_a_number_that_python_counts_is_found_before_anything_is_replayed(teacher, monkeypatch) -> None:  # type: ignore[no-untyped-def]
    norm, calls = teacher.model.norm, []
    original = norm.forward

    def counting(hidden: Tensor) -> Tensor:
        calls.append(1)
        return original(hidden) * (1 + 0.01 * len(calls))

    monkeypatch.setattr(norm, "forward", counting)
    _, engine = engines(teacher, prompt())
    assert "apart from the model's" in engine.backends["replay"]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_preparing_finds_a_place_that_python_counts(teacher, monkeypatch, dtype) -> None:  # type: ignore[no-untyped-def]
    model = teacher.to(dtype)
    engine, original = DecodeEngine(model, room=60), model.model.norm.forward
    monkeypatch.setattr(
        model.model.norm, "forward", lambda hidden: original(hidden) * (1 + 0.05 * (engine.cache.get_seq_length() - 21))
    )
    engine.prepare(engine.prefill(prompt()).argmax(-1, keepdim=True))
    assert "apart from the model's" in engine.backends["replay"] and engine.cache.get_seq_length() == 21


@pytest.mark.parametrize("family", ["mistral", "gpt_oss"])
def test_preparing_leaves_windows_as_they_were(family) -> None:  # type: ignore[no-untyped-def]
    model = make_family(family)
    engine, expected = DecodeEngine(model, room=21 + STEPS), plain(model, prompt())
    found = [engine.prefill(prompt())]
    engine.prepare(found[-1].argmax(-1, keepdim=True))
    for _ in range(STEPS):
        found.append(engine.step(found[-1].argmax(-1, keepdim=True)).clone())
    assert_same(torch.stack(found, dim=1), expected)
    assert engine.backends["replay"] == "operations"


@pytest.mark.parametrize("family", ["mistral", "gemma2", "gpt_oss"])
def test_preparing_reads_nothing_that_was_never_written(family) -> None:  # type: ignore[no-untyped-def]
    engine, ids = DecodeEngine(make_family(family), room=40), prompt()[:, :7]
    token = engine.prefill(ids).argmax(-1, keepdim=True)
    torch.use_deterministic_algorithms(True, warn_only=True)  # fills new memory with NaN
    try:
        engine.prepare(token)
    finally:
        torch.use_deterministic_algorithms(False)
    assert engine.backends["replay"] == "operations"


def test_preparing_where_there_is_no_room_is_refused(teacher) -> None:  # type: ignore[no-untyped-def]
    engine = DecodeEngine(teacher, room=21)
    token = engine.prefill(prompt()).argmax(-1, keepdim=True)
    with pytest.raises(UserError, match="room for 21 tokens"):
        engine.prepare(token)


def test_a_model_that_changes_while_it_decodes_is_an_error_and_no_answer(teacher, monkeypatch) -> None:  # type: ignore[no-untyped-def]
    engine = DecodeEngine(teacher, room=40, replay=False)
    token = engine.prefill(prompt()).argmax(-1, keepdim=True)
    engine.step(token)
    monkeypatch.setattr(teacher.model.layers[1].self_attn, "forward", lambda hidden_states, **_: (hidden_states, None))
    with pytest.raises(HalobenchError, match="changed while it decoded: read the prompt again"):
        engine.step(token)


@pytest.mark.parametrize("ruled_out", [-torch.inf, torch.finfo(torch.float32).min])
def test_tokens_that_are_ruled_out_are_no_measure_of_a_replay(teacher, monkeypatch, ruled_out) -> None:  # type: ignore[no-untyped-def]
    head, calls = teacher.lm_head.forward, []

    def masked(hidden: Tensor, drift: float = 0.0) -> Tensor:
        calls.append(1)
        out = torch.arange(teacher.config.vocab_size) % 3 == 0
        return (head(hidden) * (1 + drift * len(calls))).masked_fill(out, ruled_out)

    monkeypatch.setattr(teacher.lm_head, "forward", masked)
    assert engines(teacher, prompt())[1].backends["replay"] == "operations"
    monkeypatch.setattr(teacher.lm_head, "forward", functools.partial(masked, drift=0.01))
    assert "apart from the model's" in engines(teacher, prompt())[1].backends["replay"]


def test_a_replay_that_fails_is_a_reason_and_no_error(teacher, monkeypatch) -> None:  # type: ignore[no-untyped-def]
    def fail(self: Tape) -> None:
        raise TypeError("an operation does not take this")

    monkeypatch.setattr(Tape, "replay", fail)
    got, engine = engines(teacher, prompt())
    assert_same(got, plain(teacher, prompt()))
    assert engine.backends["replay"] == "no: an operation does not take this"


def test_a_sum_over_everything_is_replayed(teacher, monkeypatch) -> None:  # type: ignore[no-untyped-def]
    original = teacher.model.norm.forward
    monkeypatch.setattr(
        teacher.model.norm, "forward", lambda hidden: original(hidden) * (1 + 0.01 * hidden[:, -1:].sum())
    )
    got, engine = engines(teacher, prompt())
    assert_same(got, plain(teacher, prompt()))
    assert engine.backends["replay"] == "operations"


# The attention of a step


@pytest.mark.parametrize("more", [{}, {"soft_cap": 0.8}, {"sinks_H": torch.tensor([0.3, -1.0, 2.0, 0.0])}])
@pytest.mark.parametrize("lengths", [[40, 40], [1, 33]])
def test_torch_attention_reads_each_row_to_its_own_length(more, lengths) -> None:  # type: ignore[no-untyped-def]
    draw = torch.Generator().manual_seed(3)
    q, k, v = (torch.randn(2, heads, *room, 12, generator=draw) for heads, room in ((4, ()), (2, (40,)), (2, (40,))))
    got = decode_attention(q, k, v, torch.tensor(lengths), scale=0.3, **more)
    for row, length in enumerate(lengths):
        seen = (x[row : row + 1, :, :length].transpose(1, 2) for x in (k, v))
        expected = attend_naive(q[row : row + 1, None], *seen, scale=0.3, **more)[:, 0]
        torch.testing.assert_close(got[row : row + 1], expected, rtol=1e-5, atol=1e-6)


def test_keys_that_did_not_come_from_the_cache_are_an_error() -> None:
    with pytest.raises(HalobenchError, match="changes keys after its cache"):
        engine_attention.decode_interface(torch.nn.Identity(), *torch.zeros(3, 1, 2, 1, 4), None)


def test_masks_and_windows_that_the_cache_does_not_have_are_errors() -> None:
    q, keys, values = torch.zeros(1, 2, 1, 4), *torch.zeros(2, 1, 2, 30, 4)
    one = torch.ones(1, dtype=torch.int64)
    keys.place = Place(slot_1=one, lengths_B=one, window=None, backend="torch")  # type: ignore[attr-defined]
    attend = functools.partial(engine_attention.decode_interface, torch.nn.Identity(), q, keys, values)
    with pytest.raises(HalobenchError, match="makes a mask of its own"):
        attend(torch.zeros(1, 1, 1, 30))
    with pytest.raises(HalobenchError, match="has a window of 8, its cache one of None"):
        attend(None, sliding_window=8)
    assert attend(None, sliding_window=30)[0].shape == (1, 1, 2, 4)


@pytest.mark.gpu
@pytest.mark.parametrize("family", ["qwen3", "gemma2", "gpt_oss"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_on_a_gpu_the_step_is_a_graph_of_our_kernels(family, dtype) -> None:  # type: ignore[no-untyped-def]
    if not torch.cuda.is_available():
        pytest.skip("no NVIDIA GPU; the same steps are replayed on a CPU")
    for model in (make_family(family), student_of(make_family(family))):
        model = model.to("cuda", dtype)
        got, engine = engines(model, prompt("cuda"))
        expected = plain(model, prompt("cuda"))
        tolerance = 1e-4 if dtype == torch.float32 else 0.1
        assert float((got - expected).float().norm() / expected.float().norm()) < tolerance
        assert engine.backends["attention"].startswith("triton split-kv") and engine.backends["replay"] == "cuda graph"
