"""Prefill in chunks that keep memory bounded, and the count of what a model was given."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from transformers import PreTrainedModel

from halobench.surgery.plan import SurgeryPlan
from halobench.surgery.transplant import transplant
from halobench.tasks import perplexity, scoring
from halobench.tasks.scoring import Prompt, Tail, chunk_sizes, continued, prefill, score_prompts

LONG = 512 * 1024


@pytest.fixture
def hybrid(teacher) -> PreTrainedModel:  # type: ignore[no-untyped-def]
    torch.manual_seed(0)
    return transplant(teacher, SurgeryPlan.for_model(teacher, keep=[1])).eval()


def test_a_decoders_chunks_shrink_as_its_masks_would_grow(teacher) -> None:  # type: ignore[no-untyped-def]
    sizes = list(chunk_sizes(teacher, 1, LONG, 4096))
    assert sum(sizes) == LONG and sizes[0] == 4096 and sizes[-1] < 300
    elements = np.array(sizes) * np.cumsum(sizes)
    assert elements.max() <= scoring.MASK_ELEMENTS
    rows = list(chunk_sizes(teacher, 8, LONG // 8, 4096))
    assert (np.array(rows) * np.cumsum(rows)).max() <= scoring.MASK_ELEMENTS / 8


def test_eager_attention_counts_a_mask_for_each_head(pico) -> None:  # type: ignore[no-untyped-def]
    model = pico()
    model.set_attn_implementation("eager")
    sizes = np.array(list(chunk_sizes(model, 1, LONG, 4096)))
    assert (sizes * np.cumsum(sizes)).max() <= scoring.MASK_ELEMENTS / 4


def test_a_hybrid_whose_attention_is_ours_reads_in_full_chunks(hybrid) -> None:  # type: ignore[no-untyped-def]
    assert set(chunk_sizes(hybrid, 1, LONG, 4096)) == {4096}


def test_a_hybrid_that_keeps_the_sources_own_attention_is_bounded_as_it_is(teacher) -> None:  # type: ignore[no-untyped-def]
    unchanged = transplant(teacher, SurgeryPlan.for_model(teacher, keep=[1], hype=False))
    assert list(chunk_sizes(unchanged, 1, LONG, 4096)) == list(chunk_sizes(teacher, 1, LONG, 4096))


@pytest.mark.parametrize("kind", ["decoder", "hybrid"])
def test_the_size_of_chunks_changes_no_number(kind, teacher, hybrid, bpe, monkeypatch, request) -> None:  # type: ignore[no-untyped-def]
    model = hybrid if kind == "hybrid" else teacher
    ids = torch.randint(3, 101, (301,), generator=torch.Generator().manual_seed(0)).tolist()
    prompt = Prompt(np.asarray(ids[:280]), (Tail(ids[280:], 4), Tail(ids[285:], 1)))
    whole = score_prompts(model, [prompt])
    monkeypatch.setattr(scoring, "MASK_ELEMENTS", 300 * 40)
    monkeypatch.setattr(scoring, "LOGIT_ELEMENTS", 101 * 50)
    pieces = score_prompts(model, [prompt], chunk=64)
    np.testing.assert_allclose(pieces.logprob[0], whole.logprob[0], atol=1e-3)
    assert whole.given[0].tolist() == pieces.given[0].tolist() == [301, 296]
    assert whole.tokens_processed == 280 + 21 + 16 and whole.tokens_plain == 301 + 296


def test_a_window_of_text_is_read_in_bounded_chunks_with_the_same_result(reader, bpe, monkeypatch) -> None:  # type: ignore[no-untyped-def]
    text = ["A long text, about nothing in particular, goes on for a while. " * 80]
    whole = perplexity.bits_per_byte(reader, bpe, text, window=2000, max_tokens=2000, name="t")
    monkeypatch.setattr(scoring, "MASK_ELEMENTS", 40_000)
    calls = []
    real = reader.forward
    monkeypatch.setattr(reader, "forward", lambda **more: calls.append(more["input_ids"].shape[1]) or real(**more))
    pieces = perplexity.bits_per_byte(reader, bpe, text, window=2000, max_tokens=2000, name="t")
    assert len(calls) > 5 and pieces.metric.value == pytest.approx(whole.metric.value, rel=1e-5)


def test_chunks_are_never_empty_however_many_logits_a_token_takes(pico, monkeypatch) -> None:  # type: ignore[no-untyped-def]
    monkeypatch.setattr(scoring, "keep_logits", lambda model, count: {})
    monkeypatch.setattr(scoring, "LOGIT_ELEMENTS", 50)  # less than one token's
    assert sum(chunk_sizes(pico(), 8, 100, 4096)) == 100


@pytest.mark.parametrize("kind", ["decoder", "hybrid"])
def test_tails_one_at_a_time_score_as_all_together(kind, teacher, hybrid, tokens) -> None:  # type: ignore[no-untyped-def]
    model = hybrid if kind == "hybrid" else teacher
    ids = tokens[:2].numpy()
    prompts = [Prompt(row[:28], (Tail(row[28:], 4), Tail(row[30:], 2), Tail(row[25:33], 1))) for row in ids]
    together, alone = score_prompts(model, prompts), score_prompts(model, prompts, batch_tokens=14)
    for one, other in zip(together.logprob, alone.logprob, strict=True):
        np.testing.assert_allclose(other, one, atol=1e-4)


def test_a_hybrids_state_is_put_back_and_not_copied(hybrid, tokens) -> None:  # type: ignore[no-untyped-def]
    with torch.no_grad():
        cache, _ = prefill(hybrid, tokens[:1, :30], 4096, room=10)
        before = [[x.clone() for x in layer.tensors()] for layer in cache.layers]
        buffers = [x.data_ptr() for layer in cache.layers for x in layer.tensors()]
        first = hybrid(input_ids=tokens[:1, 30:], past_key_values=scoring.copy_cache(cache), use_cache=True).logits
        for _ in range(2):
            with continued(cache) as state:
                again = hybrid(input_ids=tokens[:1, 30:], past_key_values=state, use_cache=True).logits
            assert torch.equal(again, first)
    assert [x.data_ptr() for layer in cache.layers for x in layer.tensors()] == buffers
    assert cache.get_seq_length() == 30
    for layer, tensors in zip(cache.layers, before, strict=True):
        held = [x[:, :, :30] if x.dim() == 4 and layer.is_initialized else x for x in layer.tensors()]
        then = [x[:, :, :30] if x.dim() == 4 and layer.is_initialized else x for x in tensors]
        assert all(torch.equal(a, b) for a, b in zip(held, then, strict=True))


def test_only_one_copy_of_a_long_state_is_alive_at_a_time(teacher, tokens, monkeypatch) -> None:  # type: ignore[no-untyped-def]
    import weakref

    made: list[weakref.ref] = []
    alive = []
    real = scoring.copy_cache

    def copied(cache):  # type: ignore[no-untyped-def]
        alive.append(sum(ref() is not None for ref in made))
        twin = real(cache)
        made.append(weakref.ref(twin))
        return twin

    monkeypatch.setattr(scoring, "copy_cache", copied)
    row = tokens[0].numpy()
    score_prompts(teacher, [Prompt(row[:30], tuple(Tail(row[30:40], i) for i in (1, 2, 3, 4)))], batch_tokens=7)
    assert alive == [0, 0, 0]
