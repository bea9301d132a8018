"""Every task on a hybrid: its cache is shared, copied and measured as any other."""

import numpy as np
import pytest
import torch
from transformers import PreTrainedModel

from halobench.assets import TEXT_LONG
from halobench.surgery.plan import SurgeryPlan
from halobench.surgery.transplant import transplant
from halobench.tasks.continuation import load_items, score_items
from halobench.tasks.lm_eval_bridge import run_lm_eval
from halobench.tasks.needle import build_haystacks, score_haystacks
from halobench.tasks.perplexity import bits_per_byte
from halobench.tasks.profile import profile_model
from halobench.tasks.text import read_jsonl


@pytest.fixture
def hybrid(reader) -> PreTrainedModel:  # type: ignore[no-untyped-def]
    torch.manual_seed(0)
    return transplant(reader, SurgeryPlan.for_model(reader, keep=[1])).eval()


@pytest.mark.parametrize(("batch_tokens", "chunk"), [(16384, 4096), (200, 100)])
def test_shared_haystacks_score_as_plain_prompts(batch_tokens, chunk, hybrid, bpe) -> None:  # type: ignore[no-untyped-def]
    filler = np.asarray(bpe(read_jsonl(TEXT_LONG)[0].text[:20_000], verbose=False)["input_ids"])
    haystacks = build_haystacks(bpe, filler, 260, 2, 0)
    scores = score_haystacks(hybrid, haystacks, batch_tokens=batch_tokens, chunk=chunk)
    plain = []
    for h in haystacks:
        for question, answer in zip(h.questions, h.answers, strict=True):
            ids = [*h.context.tolist(), *question, *answer]
            with torch.no_grad():
                logits = hybrid(input_ids=torch.tensor([ids])).logits[0].log_softmax(-1)
            plain.append(sum(float(logits[i - 1, ids[i]]) for i in range(len(ids) - len(answer), len(ids))))
    np.testing.assert_allclose(scores.logprob, plain, atol=2e-3)


def test_the_bridge_and_our_own_scoring_agree(hybrid, bpe) -> None:  # type: ignore[no-untyped-def]
    ours = score_items(hybrid, bpe, load_items(6))
    metrics = run_lm_eval(hybrid, bpe, ["tiny_continuation"], limit=6, batch_size=5, seed=0).metrics
    margin = next(metric for metric in metrics if metric.metric == "margin")
    assert margin.samples == pytest.approx(ours.margin.tolist(), abs=1e-3)


def test_bits_per_byte_do_not_depend_on_the_batch(hybrid, bpe) -> None:  # type: ignore[no-untyped-def]
    texts = [document.text[:n] for document, n in zip(read_jsonl(TEXT_LONG), (900, 400, 700), strict=False)]
    one, many = (
        bits_per_byte(hybrid, bpe, texts, window=128, max_tokens=10**6, name="t", batch_tokens=n).metric
        for n in (1, 4096)
    )
    assert one.value == pytest.approx(many.value, rel=1e-5)


def test_only_the_kept_layer_grows_with_the_context(hybrid, reader) -> None:  # type: ignore[no-untyped-def]
    short, long = profile_model(hybrid, [64, 128], new_tokens=2, repeats=1)
    assert long.kv_bytes == 2 * short.kv_bytes == 2 * 2 * 12 * 128 * 4
    assert short.state_bytes == long.state_bytes > 0
    assert long.kv_bytes + long.state_bytes <= long.cache_bytes <= 1.1 * (long.kv_bytes + long.state_bytes)
    (teacher,) = profile_model(reader, [128], new_tokens=2, repeats=1)
    assert teacher.kv_bytes == 4 * long.kv_bytes
