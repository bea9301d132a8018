"""Marks of the four-way choice against a direct computation."""

import numpy as np
import pytest
import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from halobench.tasks.continuation import Item, encode_items, judge, load_items, score_items


def direct(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, item: Item) -> list[float]:
    """Log-likelihood of each choice from one forward over context and choice."""
    values = []
    for choice in item.choices:
        start = len(tokenizer(item.context)["input_ids"])
        ids = tokenizer(f"{item.context} {choice}")["input_ids"]
        with torch.no_grad():
            logits = model(input_ids=torch.tensor([ids])).logits[0].log_softmax(-1)
        values.append(sum(float(logits[i - 1, ids[i]]) for i in range(start, len(ids))))
    return values


@pytest.mark.parametrize("batch", [64, 1000, 8192])
def test_marks_equal_a_direct_computation(batch: int, reader: PreTrainedModel, bpe: PreTrainedTokenizerBase) -> None:
    items = load_items(8, seed=1)
    scores = score_items(reader, bpe, items, batch)
    for i, item in enumerate(items):
        values = direct(reader, bpe, item)
        per_byte = [value / len(choice.encode()) for value, choice in zip(values, item.choices, strict=True)]
        others = [value for j, value in enumerate(per_byte) if j != item.label]
        assert scores.margin[i] == pytest.approx(per_byte[item.label] - max(others), abs=1e-4)
        assert scores.correct[i] == float(np.argmax(values) == item.label)


def test_the_margin_is_positive_exactly_when_the_true_choice_is_likeliest_per_byte() -> None:
    assert judge([-9.0, -20.0], ["aaa", "bbbbbbbbbb"], 0) == {
        "acc": 1.0,
        "acc_norm": 0.0,
        "margin": pytest.approx(-1.0),
    }
    assert judge([-9.0, -20.0], ["aaa", "bbbbbbbbbb"], 1) == {"acc": 0.0, "acc_norm": 1.0, "margin": pytest.approx(1.0)}


def test_the_margin_counts_utf8_bytes() -> None:
    assert judge([-8.0, -8.0], ["üü", "uuuu"], 0)["margin"] == 0.0


def test_a_context_is_read_once_for_its_choices(bpe: PreTrainedTokenizerBase) -> None:
    items = load_items(20)
    prompts, places = encode_items(bpe, items)
    assert len(prompts) == 20 and [len(prompt.tails) for prompt in prompts] == [4] * 20
    assert places[3] == [(3, 0), (3, 1), (3, 2), (3, 3)]


def test_choices_that_change_the_tokens_of_the_context_are_scored_on_their_own(
    reader: PreTrainedModel, bpe: PreTrainedTokenizerBase
) -> None:
    class Merging:
        """Tokenises the last word of a context differently when a certain word follows."""

        bos_token_id = None

        def __call__(self, texts: list[str] | str, **_: object) -> dict[str, list]:
            if isinstance(texts, str):
                return bpe(texts)
            merged = [text.replace("end one", "END one") for text in texts]
            return bpe(merged)

    items = [Item("This is the end", ("one thing", "another"), 0, "x")]
    prompts, places = encode_items(Merging(), items)  # type: ignore[arg-type]
    assert len(prompts) == 2 and places == [[(0, 0), (1, 0)]]
    assert score_items(reader, Merging(), items).margin.shape == (1,)  # type: ignore[arg-type]
