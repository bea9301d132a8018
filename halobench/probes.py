"""The tasks as layer selection measures them: small, deterministic, one value for each independent sample."""

from __future__ import annotations

from dataclasses import replace
from functools import cached_property
from typing import TYPE_CHECKING, Any

import numpy as np

from halobench.errors import UserError, unknown_name
from halobench.surgery.selection.sweep import Probe, State, Values

if TYPE_CHECKING:
    from torch import Tensor

    from halobench.mixers.view import AttentionView
    from halobench.pipeline import Conversion
    from halobench.tasks.continuation import Item
    from halobench.tasks.needle import Haystack
    from halobench.tasks.scoring import Prompt

RECALL, CSR, TEXT = ("needles", "lists"), ("continuation",), ("text",)
TASKS = (*RECALL, *CSR, *TEXT)
_SEEDS = {"needles": 101, "lists": 102}  # apart from those of the evaluation


def layout(conversion: Conversion, task: str, length: int | None, samples: int | None) -> tuple[int | None, int]:
    """Length in tokens and number of samples of a task, by default the recipe's; items have no length of their own."""
    config = conversion.recipe.selection
    if task not in TASKS:
        raise unknown_name("task to choose layers by", task, TASKS)
    if task in CSR and length is not None:
        raise UserError(f"{task} was asked for at length {length}, but its items have their own; leave the length out")
    if task in CSR:
        return None, samples or config.items
    if task in TEXT:
        return length or config.kl_length, samples or config.kl_sequences
    return length or config.length, samples or config.haystacks


def make_probe(conversion: Conversion, task: str, length: int | None = None, samples: int | None = None) -> Probe:
    """The probe of a task on a conversion's teacher; see `layout`. Fewer samples are the first of more."""
    tokens, count = layout(conversion, task, length, samples)
    if tokens is None:
        from halobench.tasks.continuation import load_items

        items = load_items(count, conversion.recipe.seed, "selection")
        return ContinuationProbe(conversion.tokenizer, items, conversion.device)
    if task in TEXT:
        data = conversion.data(replace(conversion.recipe.distil, planted=0.0))
        rows = np.stack([data.held_out(index, tokens).tokens for index in range(count)])
        return TextProbe(conversion.teacher, rows, conversion.device)
    return _recall(conversion, task, tokens, count)


def _recall(conversion: Conversion, task: str, length: int, samples: int) -> RetrievalProbe:
    from halobench.tasks.needle import build_haystacks, build_lists
    from halobench.tasks.scoring import check_context
    from halobench.tasks.suites import held_out_filler

    check_context(conversion.teacher, length)
    build = build_haystacks if task == "needles" else build_lists
    filler = held_out_filler(conversion.tokenizer)
    seed = conversion.recipe.seed + _SEEDS[task]
    return RetrievalProbe(task, build(conversion.tokenizer, filler, length, samples, seed), conversion.device)


class RetrievalProbe:
    """Needles or key-value lists; a sample is a haystack (the mean over its questions)."""

    compares = False

    def __init__(self, name: str, haystacks: list[Haystack], device: str) -> None:
        self.name, self.haystacks, self.device = name, haystacks, device
        self.sizes = [len(h.context) + sum(map(len, [*h.questions, *h.answers])) for h in haystacks]

    def unit(self, first: int, stop: int) -> _Haystacks:
        """See Probe."""
        return _Haystacks(self.haystacks[first:stop], self.device)


class _Haystacks:
    def __init__(self, haystacks: list[Haystack], device: str) -> None:
        self.haystacks, self.device = haystacks, device

    def measure(self, model: Any, state: State) -> Values:
        """See Unit."""
        from halobench.tasks.needle import score_haystacks

        scores = score_haystacks(model, self.haystacks, device=self.device)
        groups = [scores.haystack == index for index in range(len(self.haystacks))]
        return {
            "answer_logprob": [float(scores.logprob[group].mean()) for group in groups],
            "accuracy": [float(scores.correct[group].mean()) for group in groups],
        }


class ContinuationProbe:
    """The four-way choice of the true continuation; a sample is an item. Items of like length stand side by side."""

    name = "continuation"
    compares = False

    def __init__(self, tokenizer: Any, items: list[Item], device: str) -> None:
        from halobench.tasks.continuation import encode_items

        prompts, places = encode_items(tokenizer, items)
        sizes = [sum(_size(prompts[prompt]) for prompt in {p for p, _ in found}) for found in places]
        # Contexts of one length are read in one batch.
        order = sorted(range(len(items)), key=lambda i: (len(prompts[places[i][0][0]].prefix), i))
        self.tokenizer, self.device = tokenizer, device
        self.items, self.sizes = [items[i] for i in order], [sizes[i] for i in order]

    def unit(self, first: int, stop: int) -> _Items:
        """See Probe."""
        return _Items(self.tokenizer, self.items[first:stop], self.device)


def _size(prompt: Prompt) -> int:
    return len(prompt.prefix) + sum(len(tail.ids) for tail in prompt.tails)


class _Items:
    def __init__(self, tokenizer: Any, items: list[Item], device: str) -> None:
        self.tokenizer, self.items, self.device = tokenizer, items, device

    def measure(self, model: Any, state: State) -> Values:
        """See Unit."""
        from halobench.tasks.continuation import score_items

        scores = score_items(model, self.tokenizer, self.items, device=self.device)
        return {
            "margin": scores.margin.tolist(),
            "acc": scores.correct.tolist(),
            "acc_norm": scores.correct_norm.tolist(),
        }


class TextProbe:
    """Held-out text; a sample is a sequence.

    `kl` is the KL(teacher || model) in nats per token. With one layer replaced, `hidden_error` and `local_attention`
    are that layer's own: see `stand_in`.

    Args:
        teacher: what all models are compared to.
        tokens: ids, (sequences, length).
    """

    name = "text"
    compares = True

    def __init__(self, teacher: Any, tokens: np.ndarray, device: str) -> None:
        import torch

        self.teacher = teacher
        self.tokens = torch.from_numpy(tokens).to(device)
        self.sizes = [tokens.shape[1]] * len(tokens)

    @cached_property
    def views(self) -> list[AttentionView]:
        """The teacher's attention, by layer."""
        from halobench.surgery.anatomy import read_attention

        return read_attention(self.teacher)

    def unit(self, first: int, stop: int) -> TextUnit:
        """See Probe."""
        return TextUnit(self, self.tokens[first:stop])


class TextUnit:
    """Sequences of held-out text, (B, T). The teacher's hidden states are kept from when it is measured."""

    def __init__(self, probe: TextProbe, tokens_BT: Tensor) -> None:
        self.probe, self.tokens_BT = probe, tokens_BT
        self.target_BTD: Tensor | None = None

    def measure(self, model: Any, state: State) -> Values:
        """See Unit."""
        import torch

        from halobench.surgery.heads import final_hidden
        from halobench.surgery.selection.locality import stand_in, watched

        with torch.inference_mode():
            if state.kind == "original":
                self.target_BTD = final_hidden(model, self.tokens_BT)
                return {"kl": [0.0] * len(self.tokens_BT)}
            if self.target_BTD is None:
                self.target_BTD = final_hidden(self.probe.teacher, self.tokens_BT)
            if state.kind != "replaced" or state.layer is None:
                return {"kl": self._kl(model, final_hidden(model, self.tokens_BT), self.target_BTD)}
            with watched(model, state.layer) as seen:
                hidden = final_hidden(model, self.tokens_BT)
            error, local = stand_in(self.probe.views[state.layer], seen[0])
            return {
                "kl": self._kl(model, hidden, self.target_BTD),
                "hidden_error": error,
                "local_attention": local,
            }

    def _kl(self, model: Any, hidden_BTD: Tensor, target_BTD: Tensor) -> list[float]:
        import torch

        from halobench.kernels.chunked_loss import forward_kl, tokens_per_chunk
        from halobench.surgery.heads import unembed

        chunk = tokens_per_chunk(self.probe.teacher.get_output_embeddings().weight.shape[0])
        values = []
        for hidden_TD, target_TD in zip(hidden_BTD, target_BTD, strict=True):
            total = 0.0
            for student, teacher in zip(hidden_TD.split(chunk), target_TD.split(chunk), strict=True):
                ones = torch.ones(len(student), device=student.device)
                total += float(forward_kl(unembed(model, student), unembed(self.probe.teacher, teacher), ones))
            values.append(total / len(hidden_TD))
        return values
