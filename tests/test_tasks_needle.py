"""Haystacks: exact lengths, separation from training, and scores that equal plain prompts."""

import re

import numpy as np
import pytest
import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from halobench.assets import TEXT_LONG
from halobench.errors import HalobenchError, UserError
from halobench.surgery.planted import SEPARATORS, TEMPLATES, nouns
from halobench.tasks import needle, scoring
from halobench.tasks.needle import (
    Haystack,
    ListConfig,
    NeedleConfig,
    build_haystacks,
    build_lists,
    score_each,
    score_haystacks,
)
from halobench.tasks.text import read_jsonl

BUILDERS = [build_haystacks, build_lists]


@pytest.fixture(scope="module")
def filler(bpe: PreTrainedTokenizerBase) -> np.ndarray:
    text = read_jsonl(TEXT_LONG)[0].text[:20_000]
    return np.asarray(bpe(text, verbose=False)["input_ids"])


@pytest.mark.parametrize("build", BUILDERS)
@pytest.mark.parametrize("length", [256, 511, 2048])
def test_the_longest_prompt_has_exactly_the_length(build, length, bpe, filler) -> None:  # type: ignore[no-untyped-def]
    for haystack in build(bpe, filler, length, 5, 0):
        sizes = [
            len(haystack.context) + len(q) + len(a) for q, a in zip(haystack.questions, haystack.answers, strict=True)
        ]
        assert max(sizes) == length == haystack.length


def test_filler_that_is_too_short_wraps_around(bpe: PreTrainedTokenizerBase, filler: np.ndarray) -> None:
    (haystack,) = build_haystacks(bpe, filler[:300], 4096, 1, 0)
    assert haystack.length == 4096


def test_every_answer_stands_where_its_depth_says(bpe: PreTrainedTokenizerBase, filler: np.ndarray) -> None:
    for haystack in [*build_haystacks(bpe, filler, 1024, 4, 1), *build_lists(bpe, filler, 1024, 4, 1)]:
        assert len(set(haystack.depths)) == len(haystack.questions)
        for question, answer, depth in zip(haystack.questions, haystack.answers, haystack.depths, strict=True):
            place = round(depth * len(haystack.context))
            near = bpe.decode(haystack.context[max(0, place - 2) : place + 40])
            assert bpe.decode(answer) in near
            key = re.search(r'for (\w+)|"([\w ]+)":', bpe.decode(question))
            assert key is not None and (key[1] or key[2]) in near


def test_needles_are_spread_over_the_whole_depth(bpe: PreTrainedTokenizerBase, filler: np.ndarray) -> None:
    depths = np.array([h.depths for h in build_haystacks(bpe, filler, 2048, 40, 0)])
    for i, column in enumerate(depths.T):
        assert i / 4 - 0.05 <= column.min() and column.max() <= (i + 1) / 4 + 0.05
    assert depths.min() < 0.05 and depths.max() > 0.9


def test_needles_stand_between_sentences(bpe: PreTrainedTokenizerBase, filler: np.ndarray) -> None:
    for haystack in build_haystacks(bpe, filler, 2048, 5, 2):
        for before in bpe.decode(haystack.context).split(needle.NEEDLE.partition("{key}")[0])[:-1]:
            assert re.search(r"[.!?][\"')]?$", before)


def test_words_and_wording_are_never_those_of_training(bpe: PreTrainedTokenizerBase, filler: np.ndarray) -> None:
    assert not set(nouns("train")) & set(nouns("eval"))
    trained = {part.split("{")[0].strip() for pair in TEMPLATES for part in pair} - {""}
    for template in (needle.NEEDLE, needle.QUESTION, needle.LIST_ROW, needle.LIST_QUESTION):
        assert template not in {part for pair in TEMPLATES for part in pair}
        assert not any(part in template for part in trained)
    between, end = needle.LIST_ROW.partition("{key}")[2].split("{value}")
    assert (between, end) not in SEPARATORS and between not in {b for b, _ in SEPARATORS}
    text = bpe.decode(build_lists(bpe, filler, 2048, 1, 0)[0].context)
    assert set(re.findall(r'"(\w+)": \d', text)) <= set(nouns("eval"))


def test_long_lists_have_no_key_twice(bpe: PreTrainedTokenizerBase, filler: np.ndarray) -> None:
    text = bpe.decode(build_lists(bpe, filler, 40_000, 1, 0)[0].context)
    keys = re.findall(r'"([\w ]+)": \d', text)
    assert len(keys) > 1200 and len(set(keys)) == len(keys)


def test_the_seed_decides_the_haystack_and_a_larger_count_keeps_it(
    bpe: PreTrainedTokenizerBase, filler: np.ndarray
) -> None:
    one, two, other = (build_haystacks(bpe, filler, 512, n, s)[0].context for n, s in ((1, 0), (3, 0), (1, 1)))
    assert np.array_equal(one, two) and not np.array_equal(one, other)


def test_one_question_a_haystack_is_possible(bpe: PreTrainedTokenizerBase, filler: np.ndarray) -> None:
    (haystack,) = build_haystacks(bpe, filler, 512, 1, 0, NeedleConfig(questions="one", value_digits=7))
    assert len(haystack.questions) == 1 and len(bpe.decode(haystack.answers[0]).strip()) == 7


@pytest.mark.parametrize("build", BUILDERS)
def test_a_length_without_room_is_refused(build, bpe, filler) -> None:  # type: ignore[no-untyped-def]
    with pytest.raises(UserError, match="no room"):
        build(bpe, filler, 64, 1, 0)


def plain(model: PreTrainedModel, haystacks: list[Haystack]) -> tuple[list[float], list[float]]:
    """Each question as a prompt of its own."""
    correct, logprob = [], []
    for h in haystacks:
        for question, answer in zip(h.questions, h.answers, strict=True):
            prompt = [*h.context.tolist(), *question]
            with torch.no_grad():
                logits = model(input_ids=torch.tensor([[*prompt, *answer]])).logits[0].log_softmax(-1)
            at = range(len(prompt) - 1, len(prompt) + len(answer) - 1)
            logprob.append(sum(float(logits[i, a]) for i, a in zip(at, answer, strict=True)))
            made = model.generate(
                torch.tensor([prompt]), max_new_tokens=len(answer), do_sample=False, eos_token_id=None, pad_token_id=0
            )[0, len(prompt) :].tolist()
            correct.append(float(made == answer))
    return correct, logprob


@pytest.mark.parametrize("family", ["qwen3", "llama", "gpt_neox", "gemma2", "qwen3_next"])
def test_shared_haystacks_score_as_plain_prompts_and_greedy_generation_do(family, pico, bpe, filler) -> None:  # type: ignore[no-untyped-def]
    changes = {"sliding_window": 64} if family == "gemma2" else {}
    if family == "gpt_neox":
        changes = {"intermediate_size": 64}
    if family == "qwen3_next":  # three layers in four are linear attention
        changes = {
            "linear_num_key_heads": 2, "linear_num_value_heads": 4, "linear_key_head_dim": 12,
            "linear_value_head_dim": 12, "num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32,
            "shared_expert_intermediate_size": 32,
        }  # fmt: skip
    model = pico(family, vocab_size=len(bpe), max_position_embeddings=1024, **changes)
    haystacks = [
        *build_haystacks(bpe, filler, 260, 3, 0),
        *build_lists(bpe, filler, 260, 1, 0, ListConfig(questions=3)),
    ]
    for i, haystack in enumerate(haystacks):  # half of the answers become what the model says, so that some are right
        question = haystack.questions[0]
        said = model.generate(
            torch.tensor([[*haystack.context, *question]]),
            max_new_tokens=4,
            do_sample=False,
            eos_token_id=None,
            pad_token_id=0,
        )[0, -4:].tolist()
        haystack.answers[0] = said if i % 2 else [*said[:-1], (said[-1] + 1) % len(bpe)]
    scores = score_haystacks(model, haystacks, chunk=70)
    correct, logprob = plain(model, haystacks)
    assert scores.correct.tolist() == correct and 0 < sum(correct) < len(correct)
    np.testing.assert_allclose(scores.logprob, logprob, atol=2e-3)
    assert scores.haystack.tolist() == [0] * 4 + [1] * 4 + [2] * 4 + [3] * 3


@pytest.mark.parametrize(("batch_tokens", "chunk"), [(16384, 4096), (100, 4096), (900, 33)])
def test_batches_and_chunks_change_nothing(batch_tokens, chunk, reader, bpe, filler) -> None:  # type: ignore[no-untyped-def]
    haystacks = build_haystacks(bpe, filler, 220, 4, 3)
    scores = score_haystacks(reader, haystacks, batch_tokens=batch_tokens, chunk=chunk)
    np.testing.assert_allclose(scores.logprob, score_haystacks(reader, haystacks).logprob, atol=1e-3)


def test_sharing_saves_tokens_and_cuts_none(reader, bpe, filler) -> None:  # type: ignore[no-untyped-def]
    haystacks = build_haystacks(bpe, filler, 600, 2, 0)
    scores = score_haystacks(reader, haystacks)
    whole = sum(4 * len(h.context) + sum(map(len, [*h.questions, *h.answers])) for h in haystacks)
    assert scores.tokens_plain == whole and scores.tokens_processed < 0.5 * whole
    assert scores.truncated == 0


def test_a_prompt_the_model_was_not_given_whole_is_counted(reader, bpe, filler, monkeypatch) -> None:  # type: ignore[no-untyped-def]
    haystacks = build_haystacks(bpe, filler, 300, 2, 0)
    real = scoring.prefill
    monkeypatch.setattr(scoring, "prefill", lambda model, ids, *rest, **more: real(model, ids[:, 1:], *rest, **more))
    assert [sample.truncated for sample in score_each(reader, haystacks)] == [4, 4]


def test_a_model_that_was_training_is_training_again(reader, bpe, filler) -> None:  # type: ignore[no-untyped-def]
    reader.train()
    score_haystacks(reader, build_haystacks(bpe, filler, 260, 1, 0))
    assert reader.training


def test_learned_positions_have_a_hard_end_and_rotary_ones_none(pico, bpe, filler) -> None:  # type: ignore[no-untyped-def]
    haystacks = build_haystacks(bpe, filler, 300, 1, 0)
    with pytest.raises(UserError, match="gpt2 has a table of 128 positions and cannot read 300 tokens"):
        score_haystacks(pico("gpt2", vocab_size=len(bpe), max_position_embeddings=128), haystacks)
    assert np.isfinite(score_haystacks(pico(vocab_size=len(bpe), max_position_embeddings=128), haystacks).logprob).all()


def test_a_broken_model_is_an_error_and_not_a_score(reader, bpe, filler) -> None:  # type: ignore[no-untyped-def]
    with torch.no_grad():
        reader.lm_head.weight[5] = float("nan")
    with pytest.raises(HalobenchError, match="log-likelihoods behind .* tokens are not finite"):
        score_haystacks(reader, build_haystacks(bpe, filler, 260, 1, 0))


def test_a_beginning_of_text_token_opens_the_context_and_counts(bpe, filler) -> None:  # type: ignore[no-untyped-def]
    from copy import deepcopy

    from tokenizers.processors import TemplateProcessing

    opened = deepcopy(bpe)
    opened._tokenizer.post_processor = TemplateProcessing(
        single=f"{bpe.bos_token} $A", special_tokens=[(bpe.bos_token, bpe.bos_token_id)]
    )
    (haystack,) = build_haystacks(opened, filler, 300, 1, 0)
    assert haystack.context[0] == bpe.bos_token_id and haystack.length == 300
