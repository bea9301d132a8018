"""Greedy answers to long prompts: each is read once in chunks, and only the last position's logits are ever kept.

Prompts of one batch have the same length, so that nothing is padded and no answer hears of its neighbours.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from halobench.tasks.decoder import Decoder
from halobench.tasks.scoring import (
    LOGIT_ELEMENTS,
    TokenCount,
    check_context,
    check_finite,
    copy_cache,
    evaluating,
    token_logprobs,
)

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

Finished = Callable[[int, list[int]], bool]
Step = Callable[[torch.Tensor], torch.Tensor]


@dataclass(frozen=True, kw_only=True)
class Generation:
    """What a model said to one prompt.

    tokens: its answer, without the token that ended it. prompt_tokens: how many tokens of the prompt the model was
    given, counted at its door. read: those, and the tokens of its answer that it was given back to go on from: what
    the prompt takes by itself, whatever a batch gives the model after this answer has ended. reference_read: tokens of
    the reference it was given. logprob: log-likelihood of the reference behind the prompt; None where there was none.
    """

    tokens: list[int]
    prompt_tokens: int
    read: int
    reference_read: int = 0
    logprob: float | None = None


def stop_tokens(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> frozenset[int]:
    """The tokens that end an answer: what the model's generation settings and its tokenizer name."""
    named = getattr(getattr(model, "generation_config", None), "eos_token_id", None)
    ids = named if isinstance(named, list | tuple) else [named]
    return frozenset(int(i) for i in [*ids, tokenizer.eos_token_id] if i is not None)


def generate(
    model: PreTrainedModel,
    prompts: Sequence[Sequence[int]],
    most: int,
    *,
    stop: Collection[int] = (),
    finished: Finished | None = None,
    references: Sequence[Sequence[int]] | None = None,
    batch_tokens: int = 16384,
    chunk: int = 4096,
    device: str | torch.device | None = None,
    ran: dict[str, str] | None = None,
) -> list[Generation]:
    """Greedy answers of at most `most` tokens, in the order of the prompts.

    Args:
        prompts: token ids of each, of any lengths; those of equal length share batches of up to `batch_tokens`.
        stop: tokens that end an answer.
        finished: asked after each token with the prompt's index and its answer so far; True ends that answer.
        references: an answer to each prompt (at least one token) whose log-likelihood is wanted too. It costs no second
            reading of the prompt, but a copy of the model's state behind it.
        chunk: tokens of a prompt read in one forward.
        device: where inputs go; the model's own by default.
        ran: filled with what really ran: the engine's backends, or under "engine" why it did not.

    Raises:
        UserError: a prompt and its answer are longer than the model's table of positions.
        HalobenchError: log-likelihoods that are not finite.
    """
    if most < 1:
        raise ValueError(f"an answer needs room for a token, got most={most}")
    if prompts:
        check_context(model, max(len(prompt) for prompt in prompts) + most)
    made: dict[int, Generation] = {}
    with evaluating(model):
        for group in _batches(model, prompts, references, batch_tokens):
            ids = torch.as_tensor(np.asarray([prompts[i] for i in group]), device=torch.device(device or model.device))
            given = [references[i] for i in group] if references is not None else None
            room = max([most, *map(len, given or ())])
            decoder = Decoder(model, ids.shape[1] + room)
            with TokenCount(model) as count:
                decoder.read(ids, chunk)
            answers = _answer(model, decoder, count.tokens, most, frozenset(stop), _ended(finished, group), given)
            if ran is not None:
                ran.update(decoder.backends)
            made.update(zip(group, answers, strict=True))
    return [made[i] for i in range(len(prompts))]


def _ended(finished: Finished | None, group: Sequence[int]) -> Finished:
    """`finished` for the rows of a batch."""
    return lambda row, tokens: finished is not None and finished(group[row], tokens)


def _batches(
    model: PreTrainedModel,
    prompts: Sequence[Sequence[int]],
    references: Sequence[Sequence[int]] | None,
    batch_tokens: int,
) -> Iterator[list[int]]:
    """Indices of prompts of equal length, the longest first."""
    width = max((len(reference) for reference in references or ()), default=1)
    most = LOGIT_ELEMENTS // (width * model.config.get_text_config(decoder=True).vocab_size)
    groups: dict[int, list[int]] = defaultdict(list)
    for index, prompt in enumerate(prompts):
        groups[len(prompt)].append(index)
    for length, members in sorted(groups.items(), reverse=True):
        size = max(1, min(batch_tokens // max(1, length), most))
        yield from (members[i : i + size] for i in range(0, len(members), size))


def _answer(
    model: PreTrainedModel,
    decoder: Decoder,
    tokens: int,
    most: int,
    stop: frozenset[int],
    ended: Finished,
    references: Sequence[Sequence[int]] | None,
) -> list[Generation]:
    """The answers behind `tokens` tokens of prompts that `decoder` has read."""
    rows = len(decoder.logits_BV)
    prompt_tokens = tokens // rows
    logprobs: list[float | None] = [None] * rows
    extra = [0] * rows
    if references is not None:
        logprobs = list(_logprobs(model, copy_cache(decoder.cache), decoder.logits_BV, references))
        extra = [len(reference) - 1 for reference in references]
    answers, given_back = _decode(decoder.step, decoder.logits_BV, most, stop, ended)
    return [
        Generation(
            tokens=answers[row],
            prompt_tokens=prompt_tokens,
            read=prompt_tokens + given_back[row],
            reference_read=extra[row],
            logprob=logprobs[row],
        )
        for row in range(rows)
    ]


def _decode(
    step: Step, logits_BV: torch.Tensor, most: int, stop: frozenset[int], ended: Finished
) -> tuple[list[list[int]], list[int]]:
    """The most likely continuations of prompts whose last position gave `logits_BV`.

    And how many tokens of each the model was given back before that answer had ended.
    """
    answers: list[list[int]] = [[] for _ in logits_BV]
    given_back = [0] * len(answers)
    open_rows = set(range(len(answers)))
    for index in range(most):
        chosen_B = logits_BV.argmax(-1)
        for row, token in enumerate(chosen_B.tolist()):
            if row not in open_rows:
                continue
            if token not in stop:
                answers[row].append(token)
            if token in stop or ended(row, answers[row]):
                open_rows.discard(row)
        if not open_rows or index == most - 1:
            break
        logits_BV = step(chosen_B[:, None])
        for row in open_rows:
            given_back[row] += 1
    return answers, given_back


def _logprobs(
    model: PreTrainedModel, cache: Any, logits_BV: torch.Tensor, references: Sequence[Sequence[int]]
) -> Iterator[float]:
    """Log-likelihood of each reference behind the prompt that left `cache` and, at its last position, `logits_BV`."""
    sizes = [len(reference) for reference in references]
    targets_BR = torch.zeros(len(references), max(sizes), dtype=torch.long, device=logits_BV.device)
    for row, reference in enumerate(references):
        targets_BR[row, : len(reference)] = torch.as_tensor(list(reference))
    chosen_BR, _ = token_logprobs(logits_BV[:, None], targets_BR[:, :1])
    if max(sizes) > 1:  # what stands behind a reference's end is padding, which nothing before it sees
        output = model(input_ids=targets_BR[:, :-1], past_key_values=cache, use_cache=True)
        rest, _ = token_logprobs(output.logits, targets_BR[:, 1:].to(output.logits.device))
        chosen_BR = torch.cat([chosen_BR, rest.to(chosen_BR.device)], dim=1)
    kept = torch.arange(max(sizes), device=chosen_BR.device) < torch.tensor(sizes, device=chosen_BR.device)[:, None]
    sums = torch.where(kept, chosen_BR, 0.0).sum(1).cpu().numpy()
    check_finite(sums, "of the references")
    yield from sums.tolist()
