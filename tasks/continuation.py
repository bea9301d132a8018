"""Which of four continuations is the true one: a small model's commonsense test, made from held-out text.

Accuracy over a few hundred items is too noisy to rank layers. The margin uses the same forwards and is not: per item,
the log-likelihood per UTF-8 byte of the true continuation minus the best of the other three.
"""

from __future__ import annotations

import gzip
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Literal

import numpy as np

from halobench.assets import CONTINUATIONS

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from halobench.tasks.scoring import Prompt


@dataclass(frozen=True)
class Item:
    """A context, its four continuations, the index of the true one, and the id of the document."""

    context: str
    choices: tuple[str, ...]
    label: int
    source: str


@dataclass(frozen=True)
class ContinuationScores:
    """One entry an item, in the order given. See `judge`."""

    correct: np.ndarray
    correct_norm: np.ndarray
    margin: np.ndarray


def read_items(path: Path = CONTINUATIONS) -> list[Item]:
    """All items, in file order."""
    with gzip.open(path, "rt", encoding="utf-8") as file:
        rows = [json.loads(line) for line in file]
    return [Item(row["context"], tuple(row["choices"]), row["label"], row["source"]) for row in rows]


def load_items(
    limit: int | None = None, seed: int = 0, part: Literal["evaluation", "selection"] = "evaluation"
) -> list[Item]:
    """`limit` items drawn with `seed` without repetition, or all of them; a larger limit adds to a smaller one.

    Every fourth item is set aside for the selection of layers, so that no model is judged on what it was chosen by.
    """
    items = [item for place, item in enumerate(read_items()) if (place % 4 == 3) == (part == "selection")]
    order = np.random.default_rng((seed, 17)).permutation(len(items))
    return [items[i] for i in order[:limit]]


def judge(logprobs: Sequence[float], choices: Sequence[str], label: int) -> dict[str, float]:
    """The three marks of one item.

    acc: 1 where the true choice has the highest log-likelihood; acc_norm: the same with each divided by its characters,
    as lm-eval does; margin: log-likelihood per UTF-8 byte of the true choice minus the highest of the others (nats per
    byte; positive is right).
    """
    values = np.asarray(logprobs, dtype=np.float64)
    per_byte = values / [len(choice.encode()) for choice in choices]
    return {
        "acc": float(values.argmax() == label),
        "acc_norm": float((values / [len(choice) for choice in choices]).argmax() == label),
        "margin": float(per_byte[label] - np.delete(per_byte, label).max()),
    }


def score_items(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    items: Sequence[Item],
    batch: int = 8192,
    *,
    device: str | torch.device | None = None,
) -> ContinuationScores:
    """Marks of every item; a context is read once for its four choices.

    Tokens are those lm-eval would score: a context and a choice are tokenised together and split behind the context.

    Args:
        batch: tokens in one forward, about.
    """
    from halobench.tasks.scoring import score_prompts

    prompts, places = encode_items(tokenizer, items)
    scores = score_prompts(model, prompts, batch_tokens=batch, device=device)
    marks = []
    for item, item_places in zip(items, places, strict=True):
        logprobs = [float(scores.logprob[prompt][tail]) for prompt, tail in item_places]
        marks.append(judge(logprobs, item.choices, item.label))
    return ContinuationScores(*(np.array([mark[name] for mark in marks]) for name in ("acc", "acc_norm", "margin")))


def encode_items(
    tokenizer: PreTrainedTokenizerBase, items: Sequence[Item]
) -> tuple[list[Prompt], list[list[tuple[int, int]]]]:
    """Prompts, and for each item the (prompt, tail) of each of its choices.

    The choices of an item share a prompt unless the tokenizer merges across the boundary and their contexts differ.
    """
    from halobench.tasks.scoring import Prompt, Tail, encode, special_prefix

    opening = special_prefix(tokenizer)
    contexts = encode(tokenizer, [item.context for item in items])
    wholes = iter(encode(tokenizer, [f"{item.context} {choice}" for item in items for choice in item.choices]))
    prompts: list[Prompt] = []
    places: list[list[tuple[int, int]]] = []
    for item, context in zip(items, contexts, strict=True):
        groups: dict[tuple[int, ...], list[Tail]] = {}
        found = []
        for _ in item.choices:
            ids = [*opening, *next(wholes)]
            start = len(opening) + len(context)
            tails = groups.setdefault(tuple(ids[: start - 1]), [])
            found.append((tuple(ids[: start - 1]), len(tails)))
            tails.append(Tail(ids[start - 1 :], 1))
        numbers = {prefix: len(prompts) + i for i, prefix in enumerate(groups)}
        prompts += [Prompt(np.asarray(prefix, dtype=np.int64), tuple(tails)) for prefix, tails in groups.items()]
        places.append([(numbers[prefix], tail) for prefix, tail in found])
    return prompts, places
