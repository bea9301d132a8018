"""Planted retrieval: true answers, real text only from where it may be taken, and held-out draws that are others."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from halobench.surgery.planted import ANSWER_WEIGHT, Mixture, Planted, nouns


class Recorded:
    """A text of numbers that notes what was asked; training text is below 100 and held-out text from 100."""

    tokens: int | None = None

    def __init__(self) -> None:
        self.asked: list[tuple[str, int, int]] = []

    def window(self, position: int, length: int) -> np.ndarray:
        self.asked.append(("window", position, length))
        return (position + np.arange(length)) % 100

    def held_out(self, index: int, length: int) -> np.ndarray:
        self.asked.append(("held_out", index, length))
        return 100 + (index + np.arange(length)) % 100


def planted(bpe: Any, seed: int = 0) -> Planted:
    return Planted(bpe, Recorded(), seed)


def english() -> np.ndarray:
    return np.arange(3, 2000) % 90 + 3


@pytest.mark.parametrize("kind", ["needles", "lists", "separators"])
@pytest.mark.parametrize("length", [96, 700])
def test_planted_sequences_have_the_asked_length_and_true_answers(bpe: Any, kind: str, length: int) -> None:
    draw = planted(bpe).kinds[kind][1]
    for index in range(6):
        sequence = draw(np.random.default_rng(index), lambda: english()[:length], length)
        assert len(sequence.tokens) == len(sequence.weights) == length
        text = bpe.decode(sequence.tokens)
        answers = np.flatnonzero(sequence.weights == ANSWER_WEIGHT)
        runs = np.split(answers, np.flatnonzero(np.diff(answers) > 1) + 1)
        assert length < 700 or len(answers)
        for run in runs[:-1]:
            assert text.count(bpe.decode(sequence.tokens[run]).strip()) >= 2, kind


def test_a_list_longer_than_there_are_words_has_keys_of_two_words(bpe: Any) -> None:
    many = planted(bpe)._pairs(np.random.default_rng(0), len(nouns("train")) + 50)
    assert len({key for key, _ in many}) == len(many)


def test_a_repeat_is_a_repeat(bpe: Any) -> None:
    sequence = planted(bpe).kinds["repeats"][1](np.random.default_rng(1), lambda: english()[:200], 200)
    assert [p for p in range(4, 130) if np.array_equal(sequence.tokens[p:], sequence.tokens[:-p])]


@pytest.mark.parametrize("length", [4, 8, 13])
def test_even_a_sequence_of_a_few_tokens_has_its_length(bpe: Any, length: int) -> None:
    draws = planted(bpe)
    assert all(len(draws.sequence(i, length, 0).tokens) == length for i in range(30))


def test_the_mixture_keeps_its_proportion_in_training_and_held_out(bpe: Any) -> None:
    text = Recorded()
    mixture = Mixture(text, Planted(bpe, text, 0), 0.4, seed=0)
    for sequences in (
        [mixture.sequence(i, 64, 64 * i) for i in range(300)],
        [mixture.held_out(i, 64) for i in range(300)],
    ):
        assert 0.33 < np.mean([not (s.weights == 1).all() for s in sequences]) < 0.47


def test_training_reads_its_text_forward_at_its_position_and_held_out_reads_held_out(bpe: Any) -> None:
    text = Recorded()
    mixture = Mixture(text, Planted(bpe, text, 0), 0.5, seed=0)
    for index in range(100):
        mixture.sequence(index, 64, 64 * index)
    assert {kind for kind, _, _ in text.asked} == {"window"}
    assert [p for _, p, _ in text.asked] == sorted({p for _, p, _ in text.asked})
    assert all(p % 64 == 0 and n == 64 for _, p, n in text.asked)
    text.asked.clear()
    for index in range(100):
        mixture.held_out(index, 64)
    assert text.asked and {kind for kind, _, _ in text.asked} == {"held_out"}


def test_a_sequence_depends_on_the_seed_and_its_place_alone(bpe: Any) -> None:
    def draw(seed: int, order: list[int]) -> dict[int, bytes]:
        text = Recorded()
        mixture = Mixture(text, Planted(bpe, text, seed), 0.5, seed)
        return {i: mixture.sequence(i, 96, 96 * i).tokens.tobytes() for i in order}

    forward, backward = draw(0, list(range(40))), draw(0, list(range(39, -1, -1)))
    assert forward == backward
    assert sum(a != b for a, b in zip(forward.values(), draw(1, list(range(40))).values(), strict=True)) > 20


def test_held_out_draws_are_none_of_training(bpe: Any) -> None:
    draws = planted(bpe)
    trained = {draws.sequence(i, 96, 0).tokens.tobytes() for i in range(300)}
    assert not trained & {draws.held_out(i, 96).tokens.tobytes() for i in range(300)}


def test_words_of_training_and_evaluation_are_disjoint() -> None:
    assert not set(nouns("train")) & set(nouns("eval"))
    assert min(len(nouns("train")), len(nouns("eval"))) > 500
