"""Bits per byte against a loop over windows."""

import math

import numpy as np
import pytest
import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from halobench.errors import UserError
from halobench.tasks import perplexity
from halobench.tasks.perplexity import bits_per_byte, cut_windows

TEXTS = [
    "The committee met on Monday. Naïve café owners — all of them — agreed… 🦉 and went home. " * 3,
    "Short.",
    "A second long text, about nothing in particular, goes on for a while. " * 6,
]


def naive(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, texts: list[str], window: int
) -> tuple[float, list[float]]:
    nats = []
    for text in texts:
        ids = [tokenizer.eos_token_id, *tokenizer(text)["input_ids"]]
        total = 0.0
        for start in range(0, len(ids) - 1, window):
            piece = torch.tensor([ids[start : start + window + 1]])
            with torch.no_grad():
                logits = model(input_ids=piece[:, :-1]).logits.log_softmax(-1)
            total -= float(logits.gather(-1, piece[:, 1:, None]).sum())
        nats.append(total)
    sizes = [len(text.encode()) for text in texts]
    return sum(nats) / math.log(2) / sum(sizes), [n / math.log(2) / s for n, s in zip(nats, sizes, strict=True)]


@pytest.mark.parametrize(("window", "elements"), [(16, 2**26), (50, 2**26), (120, 2**26), (120, 512 * 20)])
def test_bits_per_byte_equal_a_loop_over_windows(window, elements, reader, bpe, monkeypatch) -> None:  # type: ignore[no-untyped-def]
    monkeypatch.setattr(perplexity, "LOGIT_ELEMENTS", elements)  # the last case reads one window in several chunks
    score = bits_per_byte(reader, bpe, TEXTS, window=window, max_tokens=10**6, name="texts")
    metric = score.metric
    assert score.truncated == 0
    value, per_document = naive(reader, bpe, TEXTS, window)
    assert metric.value == pytest.approx(value, rel=1e-5)
    assert metric.samples == pytest.approx(per_document, abs=1e-3)
    assert (metric.suite, metric.task, metric.length, metric.n) == ("ppl", "texts", window, 3)
    assert not metric.higher_is_better and metric.stderr is not None


def test_windows_cover_every_byte_once(bpe: PreTrainedTokenizerBase) -> None:
    for window in (1, 7, 64):
        windows = cut_windows(bpe, TEXTS, window)
        for number, text in enumerate(TEXTS):
            mine = [w for w in windows if w.document == number]
            assert sum(w.size for w in mine) == len(text.encode())
            tokens = np.concatenate([w.ids[1:] for w in mine])
            assert tokens.tolist() == bpe(text)["input_ids"]
            assert mine[0].ids[0] == bpe.eos_token_id


def test_a_budget_takes_the_start_of_every_document_first(reader, bpe) -> None:  # type: ignore[no-untyped-def]
    assert bits_per_byte(reader, bpe, TEXTS, window=10, max_tokens=25, name="texts").metric.n == 3
    first = bits_per_byte(reader, bpe, TEXTS, window=10, max_tokens=5, name="texts").metric
    assert first.n == 1 and first.stderr is None


def test_an_equal_share_of_each_document_is_its_first_tokens_whatever_the_window(bpe) -> None:  # type: ignore[no-untyped-def]
    shares = []
    for window in (7, 16, 40):
        windows = cut_windows(bpe, TEXTS, window, each=40)
        shares.append([sum(w.size for w in windows if w.document == number) for number in range(len(TEXTS))])
    assert shares[0] == shares[1] == shares[2]
    for text, size in zip(TEXTS, shares[0], strict=True):
        assert text.encode()[:size].decode() == bpe.decode(bpe(text)["input_ids"][:40])


def test_a_window_that_no_document_fills_is_refused(reader, bpe) -> None:  # type: ignore[no-untyped-def]
    with pytest.raises(UserError, match="no document of texts has the 1000 tokens of a window, the longest has"):
        bits_per_byte(reader, bpe, TEXTS, window=1000, max_tokens=10**6, name="texts")


def test_windows_that_reach_the_model_cut_short_are_counted(reader, bpe, monkeypatch) -> None:  # type: ignore[no-untyped-def]
    real = perplexity.chunk_sizes
    monkeypatch.setattr(
        perplexity, "chunk_sizes", lambda model, rows, length, most: real(model, rows, length - 3, most)
    )
    assert bits_per_byte(reader, bpe, TEXTS, window=50, max_tokens=100, name="texts").truncated == 2


@pytest.mark.parametrize("window", [16, 100])
def test_no_more_logits_are_made_at_once_than_there_is_room_for(window, reader, bpe, monkeypatch) -> None:  # type: ignore[no-untyped-def]
    room = 512 * 40
    monkeypatch.setattr(perplexity, "LOGIT_ELEMENTS", room)
    made = []
    real = reader.forward

    def forward(**more):  # type: ignore[no-untyped-def]
        output = real(**more)
        made.append(output.logits.numel())
        return output

    monkeypatch.setattr(reader, "forward", forward)
    bits_per_byte(reader, bpe, TEXTS, window=window, max_tokens=10**6, name="texts")
    assert max(made) <= room
