"""Text to windows: every token once an epoch, the same order for the same seed, and held-out text kept apart."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from halobench.errors import UserError
from halobench.surgery.corpus import check_budget, check_tokenizer, encode_corpus, open_text
from halobench.surgery.documents import encode_documents
from halobench.surgery.windows import PackedText
from tests.conftest import make_pico


@pytest.fixture(autouse=True)
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HALOBENCH_CACHE", str(tmp_path / "cache"))


def epoch(text: PackedText, length: int, number: int = 0) -> list[np.ndarray]:
    assert text.tokens is not None
    windows = text.tokens // length
    return [text.window((number * windows + i) * length, length) for i in range(windows)]


@pytest.mark.parametrize(("size", "length"), [(1000, 10), (1003, 10), (1003, 64), (777, 7), (160, 140), (9, 8)])
def test_an_epoch_is_the_training_tokens_but_for_less_than_a_window(size: int, length: int) -> None:
    text = PackedText(np.arange(size), seed=size)
    for number in range(3):
        seen = Counter(int(token) for window in epoch(text, length, number) for token in window)
        assert set(seen.values()) == {1}
        assert set(seen) <= set(range(text.tokens or 0))
        assert 0 <= (text.tokens or 0) - len(seen) < length


def test_a_window_is_a_run_of_text_and_epochs_and_seeds_differ_in_order_and_cuts() -> None:
    text = PackedText(np.arange(1003), seed=3)
    starts = [[int(w[0]) for w in epoch(text, 10, number)] for number in range(4)]
    assert all(np.array_equal(w, np.arange(w[0], w[0] + 10)) for w in epoch(text, 10))
    assert len({tuple(s) for s in starts}) == 4
    assert len({min(s) for s in starts}) > 1
    assert starts[0] != [int(w[0]) for w in epoch(PackedText(np.arange(1003), seed=4), 10)]


def test_a_stage_at_another_length_goes_on_in_its_own_order_at_the_same_position() -> None:
    text = PackedText(np.arange(1000), seed=0)
    first = [text.window(p, 10) for p in range(0, 400, 10)]
    longer = [text.window(p, 40) for p in range(400, 800, 40)]
    whole = epoch(text, 40)
    assert all(np.array_equal(a, b) for a, b in zip(longer, whole[10:20], strict=True))
    back = [text.window(p, 10) for p in range(800, 870, 10)]
    starts = [int(w[0]) for w in first + back]
    assert len(set(starts)) == len(starts)


def test_a_window_does_not_depend_on_what_was_asked_before() -> None:
    def ask(text: PackedText, position: int, length: int) -> list[int]:
        return [int(x) for x in text.window(position, length)]

    asked = [(5000, 16), (0, 16), (320, 64), (5000, 64), (16, 16), (320, 64)]
    one = PackedText(np.arange(900), seed=1)
    assert [ask(one, *a) for a in asked] == [ask(PackedText(np.arange(900), seed=1), *a) for a in asked]


@pytest.mark.parametrize("size", [80, 1000, 300_000, 5_000_000])
def test_held_out_text_is_never_trained_on(size: int) -> None:
    text = PackedText(np.arange(size, dtype=np.uint32), seed=0)
    kept = size - (text.tokens or 0)
    length = min(kept, 512)
    assert max(0.02 * size, min(32_769, size // 8)) - 1 <= kept <= max(0.02 * size, 32_769)
    held = {int(x) for i in range(kept // length + 3) for x in text.held_out(i, length)}
    assert min(held) >= (text.tokens or 0)
    trained = [text.window(p, 40) for p in range(0, min(2 * size, 50_000), 40)]
    assert max(int(w.max()) for w in trained) < (text.tokens or 0)


def test_held_out_windows_stand_side_by_side_and_do_not_depend_on_the_seed_of_training() -> None:
    a, b = PackedText(np.arange(1000), seed=0), PackedText(np.arange(1000), seed=1)
    windows = [a.held_out(i, 25) for i in range(5)]
    assert np.array_equal(np.concatenate(windows), np.arange(875, 1000))
    assert all(np.array_equal(a.held_out(i, 25), b.held_out(i, 25)) for i in range(20))


def test_too_little_text_says_how_much_there_is() -> None:
    with pytest.raises(UserError, match="has 7 training tokens, fewer than one window of 16"):
        PackedText(np.arange(8), 0).window(0, 16)
    with pytest.raises(UserError, match="1 tokens of the text are held out, fewer than one window of 16"):
        PackedText(np.arange(8), 0).held_out(0, 16)


def test_documents_are_joined_by_one_end_of_text(tmp_path: Path, bpe: Any) -> None:
    texts = ["One day.", "Two days.\n\nAnd more.", "Three — naïve."]
    for name, text in zip("abc", texts, strict=True):
        (tmp_path / f"{name}.txt").write_text(text)
    files = sorted(tmp_path.glob("*.txt"))
    tokens = encode_corpus(files, bpe)
    pieces = [[*bpe(text, add_special_tokens=False)["input_ids"], bpe.eos_token_id] for text in texts]
    assert tokens.tolist() == sum(pieces, [])
    assert bpe.decode(tokens) == "<|endoftext|>".join(texts) + "<|endoftext|>"


def test_documents_are_encoded_as_the_tokenizer_does_whatever_it_was_called_with_before(bpe: Any) -> None:
    texts = ["short", "A longer text, with 123 digits, <|endoftext|> and naïve letters.", "\n\n  spaces  "] * 200
    plain = [[*ids, bpe.eos_token_id] for ids in bpe(texts, add_special_tokens=False)["input_ids"]]
    bpe(texts[:2], padding="max_length", truncation=True, max_length=4)
    assert [ids.tolist() for ids in encode_documents(iter(texts), bpe)] == plain


def test_tokens_are_kept_on_disk_by_content_and_tokenizer(tmp_path: Path, bpe: Any) -> None:
    file = tmp_path / "a.txt"
    file.write_text("Some words.")
    kept = tmp_path / "cache" / "tokens"
    first = encode_corpus([file], bpe)
    assert isinstance(first, np.memmap)
    written = next(kept.iterdir()).stat().st_mtime_ns
    bpe(["a", "longer one"], padding=True)  # leaves its padding behind in the tokenizer
    assert encode_corpus([file], bpe).tolist() == first.tolist()
    assert [p.stat().st_mtime_ns for p in kept.iterdir()] == [written]
    file.write_text("Other words.")
    assert bpe.decode(encode_corpus([file], bpe)) == "Other words.<|endoftext|>"
    assert len(list(kept.iterdir())) == 2


def test_damaged_text_leaves_no_half_written_tokens(tmp_path: Path, bpe: Any) -> None:
    file = tmp_path / "a.jsonl"
    file.write_text('{"text": "fine"}\n' * 600 + "broken\n")
    with pytest.raises(UserError, match="line 601"):
        encode_corpus([file], bpe)
    assert not list((tmp_path / "cache" / "tokens").iterdir())


def test_the_embedded_sample_opens_and_the_order_of_questions_does_not_matter(bpe: Any) -> None:
    one, two = open_text("sample:heldout", bpe, 7), open_text("sample:heldout", bpe, 7)
    mine = {p: one.window(p, 128) for p in range(0, 1280, 256)}
    yours = {p: two.window(p, 128) for p in reversed(range(0, 1280, 128))}
    assert all(np.array_equal(mine[p], yours[p]) for p in mine)


def test_a_budget_beyond_the_text_is_refused_with_the_numbers() -> None:
    text = PackedText(np.arange(1000), 0)
    check_budget(text, 875, 1, "align and distil")
    check_budget(text, 1750, 2, "align and distil")
    with pytest.raises(UserError, match=r"875 training tokens.*align and distil reads 2,000 .*--set epochs=3") as seen:
        check_budget(text, 2000, 2, "align and distil")
    assert "\n" not in str(seen.value)


def test_a_budget_over_text_of_unknown_size_is_left_alone() -> None:
    class Unknown(PackedText):
        tokens = None

        def __init__(self) -> None: ...

    check_budget(Unknown(), 10**12, 1, "align")


def test_a_tokenizer_with_ids_beyond_the_model_is_refused(bpe: Any) -> None:
    check_tokenizer(bpe, make_pico(vocab_size=512).config)
    with pytest.raises(UserError, match=r"ids up to 511 .* ends at 510 \(vocab_size 511\)"):
        check_tokenizer(bpe, make_pico(vocab_size=511).config)


def test_a_tokenizer_without_end_of_text_is_refused(bpe: Any, tmp_path: Path) -> None:
    from transformers import PreTrainedTokenizerFast

    bare = PreTrainedTokenizerFast(tokenizer_object=bpe.backend_tokenizer)
    with pytest.raises(UserError, match="512 tokens.*no end-of-text token"):
        check_tokenizer(bare, make_pico(vocab_size=512).config)
    (tmp_path / "a.txt").write_text("text")
    with pytest.raises(UserError, match="no end-of-text token"):
        encode_corpus([tmp_path / "a.txt"], bare)
