"""Greedy answers: those of generate(), whatever the batch, the chunks and the kind of cache."""

import pytest
import torch
from transformers import PreTrainedModel

from halobench.errors import HalobenchError, UserError
from halobench.surgery.plan import SurgeryPlan
from halobench.surgery.transplant import transplant
from halobench.tasks.generation import generate, stop_tokens

FAMILIES = ["qwen3", "gemma2", "gpt2", "hybrid"]


def make(family: str, pico) -> PreTrainedModel:  # type: ignore[no-untyped-def]
    if family == "hybrid":
        torch.manual_seed(0)
        return transplant(pico(), SurgeryPlan.for_model(pico(), keep=[1])).eval()
    return pico(family, **{"sliding_window": 32} if family == "gemma2" else {})


def prompts_of(*lengths: int) -> list[list[int]]:
    draw = torch.Generator().manual_seed(5)
    return [torch.randint(3, 101, (length,), generator=draw).tolist() for length in lengths]


def plain(model: PreTrainedModel, prompt: list[int], most: int, stop: int | None = None) -> list[int]:
    ids = torch.tensor([prompt])
    made = model.generate(
        ids,
        attention_mask=torch.ones_like(ids),
        max_new_tokens=most,
        do_sample=False,
        eos_token_id=stop,
        pad_token_id=0,
    )
    return made[0, len(prompt) :].tolist()


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize(("batch_tokens", "chunk"), [(16384, 4096), (150, 17)])
def test_answers_are_those_of_greedy_generation(family, batch_tokens, chunk, pico) -> None:  # type: ignore[no-untyped-def]
    model, prompts = make(family, pico), prompts_of(70, 41, 70, 70)
    answers = generate(model, prompts, 12, batch_tokens=batch_tokens, chunk=chunk)
    assert [answer.tokens for answer in answers] == [plain(model, prompt, 12) for prompt in prompts]
    assert len({tuple(answer.tokens) for answer in answers}) > 1


def test_an_answer_ends_before_a_stop_token_as_in_generation(teacher) -> None:  # type: ignore[no-untyped-def]
    prompts = prompts_of(30, 30, 30)
    whole = [plain(teacher, prompt, 12) for prompt in prompts]
    stop = whole[1][5]
    answers = generate(teacher, prompts, 12, stop=[stop])
    assert [a.tokens for a in answers] == [w[: w.index(stop)] if stop in w else w for w in whole]
    assert len(answers[1].tokens) < 12
    cut = plain(teacher, prompts[1], 12, stop)
    assert cut[: len(answers[1].tokens) + 1] == [*answers[1].tokens, stop]


def test_a_finished_answer_ends_and_its_neighbours_go_on(teacher) -> None:  # type: ignore[no-untyped-def]
    prompts = prompts_of(30, 20, 30)
    whole = generate(teacher, prompts, 8)
    some = generate(teacher, prompts, 8, finished=lambda index, tokens: index == 2 and len(tokens) == 3)
    assert [a.tokens for a in some] == [whole[0].tokens, whole[1].tokens, whole[2].tokens[:3]]
    assert (whole[0].prompt_tokens, whole[0].read) == (30, 37)


def test_what_is_read_for_a_prompt_depends_on_no_neighbour(teacher) -> None:  # type: ignore[no-untyped-def]
    prompts, references = prompts_of(30, 30, 30), [[7, 8, 9], [50], [11, 12]]
    whole = [plain(teacher, prompt, 8) for prompt in prompts]
    stop = next(token for i, token in enumerate(whole[1]) if i > 1 and token not in [*whole[1][:i], *whole[0]])

    def count(*rows: int) -> list[tuple[int, int]]:
        answers = generate(
            teacher, [prompts[i] for i in rows], 8, stop=[stop], references=[references[i] for i in rows],
            finished=lambda index, tokens: rows[index] == 2 and len(tokens) == 2,
        )  # fmt: skip
        return [(answer.read, answer.reference_read) for answer in answers]

    together = count(0, 1, 2)
    assert together == [*count(0), *count(1), *count(2)]
    # the limit ends an answer before its last token is given back, a stop token after it, `finished` before it
    ends = [7, whole[1].index(stop), min(1, whole[2].index(stop) if stop in whole[2] else 1)]
    assert together == [(30 + end, len(reference) - 1) for end, reference in zip(ends, references, strict=True)]


@pytest.mark.parametrize("family", FAMILIES)
def test_references_are_scored_as_by_one_forward_and_change_no_answer(family, pico) -> None:  # type: ignore[no-untyped-def]
    model, prompts = make(family, pico), prompts_of(40, 40, 25)
    references = [[7, 8, 9], [50], [11, 12]]
    answers = generate(model, prompts, 6, references=references)
    assert [a.tokens for a in answers] == [a.tokens for a in generate(model, prompts, 6)]
    for prompt, reference, answer in zip(prompts, references, answers, strict=True):
        with torch.no_grad():
            logits = model(input_ids=torch.tensor([[*prompt, *reference]])).logits[0].log_softmax(-1)
        wanted = sum(float(logits[len(prompt) - 1 + i, token]) for i, token in enumerate(reference))
        assert answer.logprob == pytest.approx(wanted, abs=1e-3)
    assert generate(model, prompts, 1)[0].logprob is None


def test_only_the_last_positions_logits_are_made_while_reading(teacher) -> None:  # type: ignore[no-untyped-def]
    sizes = []
    hook = teacher.lm_head.register_forward_hook(lambda module, inputs, output: sizes.append(output.shape[1]))
    generate(teacher, prompts_of(200), 3, chunk=64)
    hook.remove()
    assert set(sizes) == {1}


def test_a_prompt_beyond_a_table_of_positions_is_refused(pico) -> None:  # type: ignore[no-untyped-def]
    with pytest.raises(UserError, match="table of 512 positions and cannot read 515 tokens"):
        generate(pico("gpt2"), prompts_of(505), 10)


def test_a_broken_model_has_no_log_likelihoods(teacher) -> None:  # type: ignore[no-untyped-def]
    with torch.no_grad():
        teacher.lm_head.weight[5] = float("nan")
    with pytest.raises(HalobenchError, match="not finite"):
        generate(teacher, prompts_of(20), 2, references=[[4]])


def test_stop_tokens_are_the_models_and_the_tokenizers(reader, bpe) -> None:  # type: ignore[no-untyped-def]
    reader.generation_config.eos_token_id = [4, 9]
    assert stop_tokens(reader, bpe) == {4, 9, bpe.eos_token_id}
    reader.generation_config.eos_token_id = None
    assert stop_tokens(reader, bpe) == {bpe.eos_token_id}
