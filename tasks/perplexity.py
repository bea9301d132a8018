"""Bits per UTF-8 byte of held-out text: a likelihood that does not depend on the tokenizer.

Every token of a document is scored once, within windows of a given length; the first one sees the end-of-text token.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import torch

from halobench.errors import UserError
from halobench.progress import Progress
from halobench.records import Metric
from halobench.tasks.scoring import (
    LOGIT_ELEMENTS,
    SMALLEST_CHUNK,
    TokenCount,
    check_context,
    check_finite,
    chunk_sizes,
    evaluating,
    start_cache,
    token_logprobs,
)
from halobench.tasks.statistics import ratio_stderr
from halobench.units import format_length

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

LEAST_FILLED = 0.75  # of the longest window of a batch; what is shorter is padding for more than it saves
LONGEST_TOKEN = 16  # characters; no text is so dense that its tokens are longer on average


@dataclass(frozen=True, kw_only=True)
class TextScore:
    """Bits per byte of a text. truncated: windows that the model was not given whole, counted at its door."""

    metric: Metric
    truncated: int


@dataclass(frozen=True)
class Window:
    """Part of a document: ids (1 + scored tokens,), the first being context alone, and the bytes of the others."""

    document: int
    place: int
    ids: np.ndarray
    size: int


def bits_per_byte(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    documents: Sequence[str],
    *,
    window: int,
    max_tokens: int,
    name: str,
    each: int | None = None,
    batch_tokens: int = 16384,
    device: str | torch.device | None = None,
) -> TextScore:
    """Bits per byte over windows of `documents`, with an error clustered by document.

    Args:
        window: tokens scored in one window; each begins with the token before it as context.
        max_tokens: scored tokens at most; the first windows of all documents come before their second ones.
        name: of the text, becomes the metric's task.
        each: scored tokens of each document at most, the first ones; None for no bound.

    Returns:
        The metric (n and samples are the documents, length is the window) and what was not read whole.

    Raises:
        UserError: no document fills a window, whose length would then be a label and no measurement.
    """
    check_context(model, window)
    within_reach = [text[: LONGEST_TOKEN * min(max_tokens, each or max_tokens)] for text in documents]
    windows = cut_windows(tokenizer, within_reach, window, each)
    longest = max(len(w.ids) - 1 for w in windows)
    if longest < window:
        raise UserError(f"no document of {name} has the {window} tokens of a window, the longest has {longest}")
    windows = _first_rounds(windows, max_tokens)
    windows.sort(key=lambda w: len(w.ids), reverse=True)
    nats, sizes, truncated = np.zeros(len(documents)), np.zeros(len(documents)), 0
    total = sum(len(w.ids) - 1 for w in windows)
    with evaluating(model), Progress(f"{name} {format_length(window)}", total) as progress:
        for batch in _batches(windows, batch_tokens, model.config.get_text_config(decoder=True).vocab_size):
            with TokenCount(model) as count:
                found = _nats(model, batch, device or model.device)
            truncated += len(batch) * (count.tokens < len(batch) * (len(batch[0].ids) - 1))
            for item, value in zip(batch, found, strict=True):
                nats[item.document] += value
                sizes[item.document] += item.size
            progress.advance(sum(len(w.ids) - 1 for w in batch))
        used = np.flatnonzero(sizes)
        bits = nats[used] / np.log(2)
        value, stderr = ratio_stderr(bits, sizes[used])
        progress.note = f"{value:.3f} bits per byte"
    metric = Metric(
        suite="ppl", task=name, metric="bits_per_byte", value=value, stderr=stderr, n=len(used), length=window,
        higher_is_better=False, samples=[round(float(x), 4) for x in bits / sizes[used]],
    )  # fmt: skip
    return TextScore(metric=metric, truncated=truncated)


def cut_windows(
    tokenizer: PreTrainedTokenizerBase, documents: Sequence[str], window: int, each: int | None = None
) -> list[Window]:
    """All windows of the first `each` tokens of all documents (of all of them without it), with their bytes."""
    if tokenizer.eos_token_id is None:
        raise UserError("the tokenizer has no end-of-text token to begin a document with; set its eos_token")
    if not tokenizer.is_fast:
        raise UserError("bits per byte needs a fast tokenizer, one that knows where each token stands in the text")
    windows = []
    for number, text in enumerate(documents):
        encoding = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True, verbose=False)
        ids = np.asarray([tokenizer.eos_token_id, *encoding["input_ids"]])
        starts = [0, *(start for start, _ in encoding["offset_mapping"][1:]), len(text)]
        ids = ids if each is None else ids[: each + 1]
        for place, first in enumerate(range(0, len(ids) - 1, window)):
            last = min(first + window, len(ids) - 1)
            size = len(text[starts[first] : starts[last]].encode())
            windows.append(Window(number, place, ids[first : last + 1], size))
    if not windows:
        raise UserError("there is no text to measure; give documents that are not empty")
    return windows


def _first_rounds(windows: list[Window], max_tokens: int) -> list[Window]:
    """Windows by their place in the document until `max_tokens` are reached; at least one."""
    ordered = sorted(windows, key=lambda w: (w.place, w.document))
    sums = np.cumsum([len(w.ids) - 1 for w in ordered])
    return ordered[: max(1, int(np.searchsorted(sums, max_tokens, side="right")))]


def _batches(windows: Sequence[Window], batch_tokens: int, vocabulary: int) -> Iterator[list[Window]]:
    """Windows, longest first, as many as have the tokens together, no more than LOGIT_ELEMENTS, and little padding."""
    start = 0
    while start < len(windows):
        width = len(windows[start].ids) - 1
        rows = max(1, min(batch_tokens // width, LOGIT_ELEMENTS // (width * vocabulary)))
        batch = [w for w in windows[start : start + rows] if len(w.ids) - 1 >= LEAST_FILLED * width]
        yield batch
        start += len(batch)


def _nats(model: PreTrainedModel, windows: Sequence[Window], device: str | torch.device) -> np.ndarray:
    """Negative log-likelihood (rows,) of each window, its logits made a piece at a time."""
    width = len(windows[0].ids) - 1
    ids = torch.zeros(len(windows), width + 1, dtype=torch.long)
    for row, item in enumerate(windows):
        ids[row, : len(item.ids)] = torch.as_tensor(item.ids)
    lengths = torch.tensor([len(item.ids) - 1 for item in windows])[:, None]
    vocabulary = model.config.get_text_config(decoder=True).vocab_size
    chunk = max(SMALLEST_CHUNK, LOGIT_ELEMENTS // (len(windows) * vocabulary))
    sizes = list(chunk_sizes(model, len(windows), width, chunk))
    total = torch.zeros(len(windows), dtype=torch.float64)
    cache, stop = start_cache(model, width) if len(sizes) > 1 else None, 0
    for size in sizes:
        start, stop = stop, stop + size
        output = model(input_ids=ids[:, start:stop].to(device), past_key_values=cache, use_cache=len(sizes) > 1)
        cache = output.past_key_values if len(sizes) > 1 else None
        targets = ids[:, start + 1 : stop + 1].to(output.logits.device)
        chosen, _ = token_logprobs(output.logits, targets)
        total -= (chosen.cpu() * (torch.arange(start, stop) < lengths)).sum(1)
    check_finite(total.numpy(), f"in a window of {width} tokens")
    return total.numpy()
