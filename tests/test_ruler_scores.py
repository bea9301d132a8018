"""RULER's scores: lm-eval's own metric and wording, and what a model's answers are worth."""

import importlib
import itertools
import json
import math
import random
import re

import numpy as np
import pytest
import torch
from transformers import AutoTokenizer

from halobench.assets import TINY_TEACHER
from halobench.errors import UserError
from halobench.tasks.generation import stop_tokens
from halobench.tasks.ruler import make_ruler_task
from halobench.tasks.ruler.haystacks import NOISE
from halobench.tasks.ruler.task import found, found_any

ANSWERS = ["", " 123 and\t456.", "ABC def", "\x07abc\x00", "456"]
PARITY = [("niah_single_1", 768), ("niah_multikey_2", 768), ("niah_multikey_3", 1280), ("vt", 2000)]
SAMPLES = 120
REFERENCES = [("123", "456"), ("abc",), ("DEF", "x", "123"), ("c\nd",)]


def lm_eval_needles():  # type: ignore[no-untyped-def]
    nltk = pytest.importorskip("nltk", reason="lm-eval's RULER needs nltk")
    with pytest.MonkeyPatch.context() as patch:  # its import would fetch data that only essays are split with
        patch.setattr(nltk.data, "find", lambda name: name)
        from lm_eval.tasks.ruler import niah_utils, prepare_niah
    return niah_utils, prepare_niah


@pytest.mark.parametrize(("answer", "references"), itertools.product(ANSWERS, REFERENCES))
def test_the_share_found_is_lm_evals(answer, references) -> None:  # type: ignore[no-untyped-def]
    from lm_eval.tasks.ruler.common_utils import process_results, process_results_part

    document = {"max_length": 4096, "outputs": list(references)}
    assert process_results(document, [answer])["4096"] == pytest.approx(found(answer, references))
    if len(references) == 1:  # of several, lm-eval's takes the share, and RULER's is content with any
        assert process_results_part(document, [answer])["4096"] == found_any(answer, references)
    assert found_any(answer, references) == float(any(found(answer, [reference]) for reference in references))


@pytest.mark.parametrize(("name", "filler"), [("niah_single_1", "repeat"), ("niah_multikey_2", "needle")])
def test_the_wording_is_lm_evals(name, filler, monkeypatch) -> None:  # type: ignore[no-untyped-def]
    utils, prepare = lm_eval_needles()
    tiny = AutoTokenizer.from_pretrained(TINY_TEACHER)
    task = make_ruler_task(name, tiny, seed=0)
    prompt = task.prompt(1024, 0)
    key = prompt.text.rpartition("magic number for ")[2].partition(" mentioned")[0]
    monkeypatch.setattr(prepare, "generate_random", lambda kind: {"words": key, "numbers": prompt.references[0]}[kind])
    (theirs,) = prepare.generate_samples(
        prepare.get_haystack(type_haystack=filler), TOKENIZER=tiny, max_seq_length=1024, template=utils.TEMPLATE,
        type_haystack=filler, type_needle_k="words", type_needle_v="numbers", num_samples=1,
    )  # fmt: skip
    mine, other = prompt.text.split("\n"), f"{theirs['input']} {theirs['gen_prefix']}".split("\n")
    assert (mine[0], mine[-1]) == (other[0], other[-1])
    needle = f"One of the special magic numbers for {key} is: {prompt.references[0]}."
    assert needle in mine and needle in other
    assert filler == "needle" or set(other[1:-1]) == {NOISE, needle} == {
        line for line in mine[1:-1] if not NOISE.endswith(line) or line == NOISE
    }


@pytest.mark.parametrize("name", ["vt", "cwe", "fwe", "qa_1"])
def test_the_frame_of_the_other_tasks_is_lm_evals(name, tmp_path) -> None:  # type: ignore[no-untyped-def]
    module = importlib.import_module(f"lm_eval.tasks.ruler.{name.partition('_')[0]}_utils")
    text = f"Mayors are many. {NOISE}"
    question = {"question": "Who are many?", "is_impossible": False, "answers": [{"text": "Mayors"}]}
    paragraphs = [{"context": text, "qas": [question]}, {"context": NOISE, "qas": []}]
    (tmp_path / "dev-v2.0.json").write_text(json.dumps({"data": [{"paragraphs": paragraphs}]}))
    task = make_ruler_task(name, AutoTokenizer.from_pretrained(TINY_TEACHER), seed=0, data_dir=tmp_path)
    prompt = task.prompt(1500, 0)
    opening, tail = module.TEMPLATE.split("{context}")
    if name == "qa_1":
        tail = f"{tail} {module.CONFIG['answer_prefix']}"
    value = prompt.text.rpartition("the value ")[2].partition(",")[0]  # lm-eval keeps a slip that RULER has mended
    tail = (
        tail.format(query=value if name == "vt" else "Who are many?", num_v=5).replace("assgined", "assigned").rstrip()
    )
    assert prompt.text.startswith(opening) and prompt.text.endswith(tail)
    shown = 1 + (name in ("vt", "cwe"))  # these two have a worked example
    assert prompt.text.count(opening) == shown and prompt.text.count(tail.rpartition("Answer:")[2]) >= 1
    if shown == 2:
        example, _, rest = prompt.text.rpartition(opening)
        answer = example.partition(tail.rpartition(":")[0][-8:] + ":")[2]
        wanted = r" [A-Z]{3}( [A-Z]{3}){4}\n\n" if name == "vt" else r" 1\. \S.*? 10\. \S+.*\n"
        assert re.fullmatch(wanted, answer) and rest
    if name == "qa_1":
        assert module.DOCUMENT_PROMPT.format(i=1, document="")[:-1] in prompt.text and f":\n{text}" in prompt.text


def test_what_a_model_says_is_scored(reader, bpe) -> None:  # type: ignore[no-untyped-def]
    task = make_ruler_task("niah_single_1", bpe, seed=0)
    length = max(512, task.shortest)
    prompt = task.prompt(length, 1)
    ids = torch.tensor([prompt.ids])
    made = reader.generate(
        ids, attention_mask=torch.ones_like(ids), max_new_tokens=128, do_sample=False,
        eos_token_id=sorted(stop_tokens(reader, bpe)), pad_token_id=0,
    )  # fmt: skip
    said = bpe.decode(made[0, len(prompt.ids) :], skip_special_tokens=True)
    first, second = task.score(reader, length, [0, 1])
    assert second.values["score"] == [found(said, prompt.references)]
    with torch.no_grad():
        answer = bpe(f" {prompt.references[0]}", add_special_tokens=False)["input_ids"]
        logits = reader(input_ids=torch.tensor([[*prompt.ids, *answer]])).logits[0].log_softmax(-1)
    wanted = sum(float(logits[len(prompt.ids) - 1 + i, token]) for i, token in enumerate(answer))
    assert second.values["answer_logprob"][0] == pytest.approx(wanted, abs=5e-3)
    assert second.depths == [prompt.depth] and second.truncated == 0
    assert second.prompt_tokens == len(prompt.ids) + 128 <= length
    alone = task.score(reader, length, [1])[0]
    assert alone.values == {name: pytest.approx(values, abs=1e-3) for name, values in second.values.items()}
    assert first.tokens - (len(answer) - 1) == first.tokens_plain >= len(prompt.ids)
    assert task.answer_tokens == 128 and (alone.tokens, alone.tokens_plain) == (second.tokens, second.tokens_plain)


def test_an_answer_that_has_everything_ends_and_counts_in_full(reader, bpe) -> None:  # type: ignore[no-untyped-def]
    task = make_ruler_task("niah_single_1", bpe, seed=0)
    plain = task.score(reader, 512, [0])[0]
    prompt = task.prompt(512, 0)
    answer = bpe(f" {prompt.references[0]}.", add_special_tokens=False)["input_ids"]

    def say(module, inputs, output):  # type: ignore[no-untyped-def]
        step = min(say.calls, len(answer) - 1)
        say.calls += output.logits.shape[1] == 1
        output.logits[:, -1] = torch.nn.functional.one_hot(torch.tensor(answer[step]), output.logits.shape[-1]) * 9.0
        return output

    say.calls = 0
    hook = reader.register_forward_hook(say)
    scored = task.score(reader, 512, [0])[0]
    hook.remove()
    assert scored.values["score"] == [1.0] and scored.tokens < plain.tokens


def test_a_prompt_that_was_not_read_whole_is_counted(reader, bpe, monkeypatch) -> None:  # type: ignore[no-untyped-def]
    from halobench.tasks import decoder

    task = make_ruler_task("niah_single_1", bpe, seed=0)
    monkeypatch.setattr(decoder, "refusal", lambda model: "another reads the prompt here")
    monkeypatch.setattr(
        decoder, "prefill", lambda model, ids, chunk, room: prefill(model, ids[:, 20:], chunk, room=room)
    )
    from halobench.tasks.scoring import prefill

    assert [scored.truncated for scored in task.score(reader, 512, [0, 1])] == [1, 1]


def test_a_model_with_too_few_positions_is_refused(pico, bpe) -> None:  # type: ignore[no-untyped-def]
    model = pico("gpt2", vocab_size=len(bpe), max_position_embeddings=256)
    with pytest.raises(UserError, match="table of 256 positions and cannot read 512 tokens"):
        make_ruler_task("niah_single_1", bpe, seed=0).score(model, 512, [0])


def lm_evals_samples(name, tokenizer, length, count):  # type: ignore[no-untyped-def]
    """Its documents, made as its data sets are, but fewer."""
    utils, prepare = lm_eval_needles()
    from lm_eval.tasks.ruler import vt_utils

    random.seed(0)
    np.random.seed(0)
    if name == "vt":
        make = vt_utils.sys_vartrack_w_noise_random
        example = make(tokenizer=tokenizer, num_samples=1, max_seq_length=500, incremental=5)[0]
        return make(tokenizer=tokenizer, num_samples=count, max_seq_length=length, icl_example=example)
    filler = "repeat" if name == "niah_single_1" else "needle"
    keys, values = ("uuids", "uuids") if name == "niah_multikey_3" else ("words", "numbers")
    return prepare.generate_samples(
        prepare.get_haystack(type_haystack=filler), TOKENIZER=tokenizer, max_seq_length=length, template=utils.TEMPLATE,
        type_haystack=filler, type_needle_k=keys, type_needle_v=values, num_samples=count,
    )  # fmt: skip


def samples_of_both(name, tokenizer, length):  # type: ignore[no-untyped-def]
    """Prompts with what is right: ours, and lm-eval's. It may leave several lines unfilled: ours are as long as its."""
    docs = lm_evals_samples(name, tokenizer, length, SAMPLES)
    theirs = [(f"{doc['input'].rstrip()} {doc['gen_prefix']}", doc["outputs"]) for doc in docs]
    task = make_ruler_task(name, tokenizer, seed=0)
    size = round(sum(len(tokenizer(text)["input_ids"]) for text, _ in theirs) / SAMPLES)
    prompts = [task.prompt(size + task.answer_tokens, index) for index in range(SAMPLES)]
    return [(prompt.text, prompt.references) for prompt in prompts], theirs


def agree(ours, theirs) -> bool:  # type: ignore[no-untyped-def]
    """Whether two means of independent samples are within two standard errors of each other."""
    error = math.sqrt(sum(np.var(values, ddof=1) / len(values) for values in (ours, theirs)))
    print(f"{np.mean(ours):.3f} against {np.mean(theirs):.3f}, standard error {error:.3f}")
    return bool(abs(np.mean(ours) - np.mean(theirs)) <= 2 * error)


def latter_half(text: str) -> str:
    """What someone answers who knows the task and has kept the latter half of the context."""
    context = re.split(r"\n(?:What is|Question:)", text)[-2]
    context = context.rpartition("afterwards.\n")[2].rpartition("text.\n\n")[2]
    kept = context[len(context) // 2 :]
    asked = re.search(r"for (\S+(?: \S+)?) mentioned in the provided text is$", text)
    if asked is None:
        return " ".join(re.findall(r"VAR ([A-Z]{5}) = ", kept))
    return " ".join(re.findall(rf"One of the special magic \w+ for {re.escape(asked[1])} is: (\S+)\.", kept))


@pytest.mark.slow
@pytest.mark.parametrize(("name", "length"), PARITY)
def test_half_a_reader_scores_alike_on_lm_evals_samples_and_ours(name, length) -> None:  # type: ignore[no-untyped-def]
    both = samples_of_both(name, AutoTokenizer.from_pretrained(TINY_TEACHER), length)
    ours, theirs = ([found(latter_half(text), wanted) for text, wanted in samples] for samples in both)
    assert 0.2 < np.mean(ours) < 0.8 and agree(ours, theirs)


@pytest.mark.slow
@pytest.mark.parametrize(("name", "length"), [pair for pair in PARITY if pair[0] != "vt"])
def test_the_teacher_finds_the_right_answers_as_likely_in_lm_evals_samples(name, length) -> None:  # type: ignore[no-untyped-def]
    """By log-likelihood: the teacher learnt other needles, and says next to none of RULER's at any length.

    Not variable tracking, whose wording and lines are RULER's of 2025 here and those of 2024 there: this small a model
    takes 0.3 nats a token for that, though whoever can read finds as much in both (above).
    """
    from lm_eval.api.instance import Instance
    from lm_eval.models.huggingface import HFLM

    from halobench.models import load

    model, tokenizer = load("tiny", device="cpu")
    lm = HFLM(pretrained=model, tokenizer=tokenizer, backend="causal", batch_size=24, max_length=2048)

    def likelihoods(samples):  # type: ignore[no-untyped-def]
        pairs = [(text, " " + " ".join(wanted)) for text, wanted in samples]
        asked = [Instance("loglikelihood", {}, pair, index) for index, pair in enumerate(pairs)]
        return [sum_ for sum_, _ in lm.loglikelihood(asked, disable_tqdm=True)]

    ours, theirs = samples_of_both(name, tokenizer, length)
    assert agree(likelihoods(ours), likelihoods(theirs))
