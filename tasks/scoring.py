"""Log-likelihoods of short endings behind shared beginnings: the one way the tasks run a model.

A prompt is a prefix (a haystack, a context) with several tails (questions with their answers, choices). The prefix is
read once, in chunks; its state, whatever the cache class, is copied for each tail. Prefixes of one batch have the same
length, so nothing is padded on the left, and the tails' padding stands behind everything that is scored.
"""

from __future__ import annotations

import copy
import inspect
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from halobench.errors import HalobenchError, UserError
from halobench.surgery.anatomy import evaluating as evaluation_mode

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from halobench.progress import Progress

LOGIT_ELEMENTS = 2**26  # at most this many logits at once: 256 MiB in float32
_POSITION_TABLES = ("wpe", "embed_positions", "position_embeddings", "position_embedding")


@dataclass(frozen=True)
class Tail:
    """Tokens behind a prefix; those from index `start` (at least 1) on are scored."""

    ids: Sequence[int]
    start: int


@dataclass(frozen=True)
class Prompt:
    """A prefix of token ids (length,) and the tails that are scored behind it."""

    prefix: np.ndarray
    tails: tuple[Tail, ...]


@dataclass(frozen=True)
class PromptScores:
    """Results in the order of the prompts; `logprob` and `greedy` have one entry a tail.

    logprob: sum of the scored tokens' log-likelihoods. greedy: 1.0 where each of them is the most likely token.
    tokens_processed: what was run; tokens_plain: what running each prefix anew for each tail would have been.
    """

    logprob: list[np.ndarray]
    greedy: list[np.ndarray]
    tokens_processed: int
    tokens_plain: int


@contextmanager
def evaluating(model: PreTrainedModel) -> Iterator[None]:
    """Inference mode and evaluation mode; a model that was in training is put back."""
    with evaluation_mode(model), torch.inference_mode():
        yield


class TokenCount:
    """Counts the input tokens of every forward of `model` while it is open (`with TokenCount(model) as count`)."""

    def __init__(self, model: PreTrainedModel) -> None:
        self.model, self.tokens = model, 0

    def __enter__(self) -> TokenCount:
        self._hook = self.model.register_forward_pre_hook(self._count, with_kwargs=True)
        return self

    def __exit__(self, *_: object) -> None:
        self._hook.remove()

    def _count(self, _: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        ids = kwargs.get("input_ids", args[0] if args else None)
        self.tokens += 0 if ids is None else ids.numel()


def special_prefix(tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """What the tokenizer puts before every text: a beginning-of-text token, or nothing."""
    ids = list(tokenizer("")["input_ids"])
    return ids if ids and ids == [tokenizer.bos_token_id] else []


def encode(tokenizer: PreTrainedTokenizerBase, texts: Sequence[str]) -> list[list[int]]:
    """Token ids of each text, without special tokens."""
    return tokenizer(list(texts), add_special_tokens=False, verbose=False)["input_ids"] if texts else []


def check_context(model: PreTrainedModel, length: int) -> None:
    """Refuses a length the model's positions cannot express. RoPE has no hard end: beyond it is a measurement."""
    config = model.config.get_text_config(decoder=True)
    for name, module in model.named_modules():
        last = name.rpartition(".")[2]
        table = isinstance(module, torch.nn.Embedding) and last in _POSITION_TABLES
        if table or hasattr(module, "embed_positions") and isinstance(module.embed_positions, torch.Tensor):
            limit = getattr(config, "max_position_embeddings", None) or getattr(config, "n_positions", None)
            if limit is not None and length > limit:
                raise UserError(
                    f"{config.model_type} has a table of {limit} positions and cannot read {length} tokens; "
                    f"choose lengths up to {limit}"
                )


def keep_logits(model: PreTrainedModel, count: int) -> dict[str, int]:
    """The argument that limits logits to the last `count` positions, for models that know it."""
    return {"logits_to_keep": count} if "logits_to_keep" in inspect.signature(model.forward).parameters else {}


def prefill(model: PreTrainedModel, ids_BT: torch.Tensor, chunk: int, room: int = 0) -> tuple[Any, torch.Tensor]:
    """Reads tokens (batch, time) in chunks; returns the cache and the logits (batch, vocabulary) of the last position.

    A cache that can be told its final size is told: the tokens here and `room` more.
    """
    make: Callable[[int], Any] | None = getattr(model, "new_cache", None)
    cache, last = (make(ids_BT.shape[1] + room) if make else None), None
    for piece in ids_BT.split(chunk, dim=1):
        output = model(input_ids=piece, past_key_values=cache, use_cache=True, **keep_logits(model, 1))
        cache, last = output.past_key_values, output.logits[:, -1]
    if last is None:
        raise ValueError("there is nothing to read: the prompt has no tokens")
    return cache, last


def copy_cache(cache: Any) -> Any:
    """A cache that can be continued without touching the original."""
    from transformers.cache_utils import DynamicLayer, DynamicSlidingWindowLayer

    if hasattr(cache, "clone"):
        return cache.clone()
    if not hasattr(cache, "layers"):
        return copy.deepcopy(cache)
    twin = copy.copy(cache)
    # These two grow by concatenation, so sharing their tensors is safe; other layers may write in place.
    shared = (DynamicLayer, DynamicSlidingWindowLayer)
    twin.layers = [copy.copy(x) if type(x) in shared else copy.deepcopy(x) for x in cache.layers]
    return twin


def repeat_cache(cache: Any, times: int) -> Any:
    """The cache with each sequence of its batch repeated `times` times in a row."""
    if times == 1:
        return cache
    repeated = cache.batch_repeat_interleave(times)
    return cache if repeated is None else repeated


def score_prompts(
    model: PreTrainedModel,
    prompts: Sequence[Prompt],
    *,
    batch_tokens: int = 16384,
    chunk: int = 4096,
    device: str | torch.device | None = None,
    progress: Progress | None = None,
) -> PromptScores:
    """Scores every tail of every prompt; longest first, so that running out of memory shows at once.

    Args:
        model: any causal decoder with a cache.
        prompts: of any lengths; those of equal length share batches of up to `batch_tokens` prefix tokens.
        chunk: tokens of a prefix read in one forward.
        device: where inputs go; the model's own by default.
    """
    logprob: list[np.ndarray] = [np.empty(0)] * len(prompts)
    greedy: list[np.ndarray] = [np.empty(0)] * len(prompts)
    processed = plain = 0
    with evaluating(model):
        for group in _batches(prompts, batch_tokens, model.config.get_text_config(decoder=True).vocab_size):
            batch = [prompts[i] for i in group]
            scores, hits = _score_batch(model, batch, batch_tokens, chunk, torch.device(device or model.device))
            check_finite(scores, f"behind {len(batch[0].prefix)} tokens")
            for row, index in enumerate(group):
                logprob[index], greedy[index] = scores[row], hits[row]
            endings = sum(len(tail.ids) for prompt in batch for tail in prompt.tails)
            beginnings = sum(len(prompt.prefix) for prompt in batch)
            processed += beginnings + endings
            plain += beginnings * len(batch[0].tails) + endings
            if progress is not None:
                progress.advance(beginnings + endings)
    return PromptScores(logprob, greedy, processed, plain)


def _batches(prompts: Sequence[Prompt], batch_tokens: int, vocabulary: int) -> Iterator[list[int]]:
    groups: dict[tuple[int, int], list[int]] = defaultdict(list)
    for index, prompt in enumerate(prompts):
        groups[len(prompt.prefix), len(prompt.tails)].append(index)
    for (length, tails), members in sorted(groups.items(), reverse=True):
        # alike tails together: less padding
        members.sort(key=lambda i: max(len(tail.ids) for tail in prompts[i].tails))
        longest = max(len(tail.ids) for tail in prompts[members[-1]].tails)
        by_tokens = batch_tokens // max(length, tails * longest)
        size = max(1, min(by_tokens, LOGIT_ELEMENTS // (tails * longest * vocabulary)))
        yield from (members[i : i + size] for i in range(0, len(members), size))


def _score_batch(
    model: PreTrainedModel, batch: Sequence[Prompt], batch_tokens: int, chunk: int, device: torch.device
) -> tuple[np.ndarray, np.ndarray]:
    """Scores (prompts, tails) of prompts with equally long prefixes and equally many tails."""
    count, length = len(batch[0].tails), len(batch[0].prefix)
    cache = None
    if length:
        ids = torch.as_tensor(np.stack([p.prefix for p in batch]), dtype=torch.long, device=device)
        cache, _ = prefill(model, ids, chunk, room=max(len(tail.ids) for prompt in batch for tail in prompt.tails))
    # Copies of a long state are what costs memory: few tails at a time then.
    together = max(1, min(count, 4 * batch_tokens // max(1, len(batch) * length)))
    scores, hits = np.empty((len(batch), count)), np.empty((len(batch), count))
    for start in range(0, count, together):
        stop = min(start + together, count)
        state = cache if stop == count or cache is None else copy_cache(cache)
        state = repeat_cache(state, stop - start) if state is not None else None
        tails = [tail for prompt in batch for tail in prompt.tails[start:stop]]
        values, equal = _score_tails(model, tails, state, device)
        scores[:, start:stop] = values.reshape(len(batch), -1)
        hits[:, start:stop] = equal.reshape(len(batch), -1)
    return scores, hits


def _score_tails(
    model: PreTrainedModel, tails: Sequence[Tail], cache: Any, device: torch.device
) -> tuple[np.ndarray, np.ndarray]:
    """Log-likelihood and greediness (rows,) of tails continued from `cache`, whose batch has a row for each."""
    width = max(len(tail.ids) for tail in tails)
    ids = torch.zeros(len(tails), width, dtype=torch.long)
    for row, tail in enumerate(tails):
        ids[row, : len(tail.ids)] = torch.as_tensor(tail.ids)
    first = min(tail.start for tail in tails) - 1
    if first < 0:
        raise ValueError("a tail is scored from its second token on: give the last token of the prefix to the tail")
    output = model(
        input_ids=ids.to(device),
        past_key_values=cache,
        use_cache=cache is not None,
        **keep_logits(model, width - first),
    )
    logits_RTV = output.logits[:, -(width - first) :][:, :-1]
    targets = ids[:, first + 1 :].to(logits_RTV.device)
    chosen, best = token_logprobs(logits_RTV, targets)
    place = torch.arange(first + 1, width)
    starts, ends = (torch.tensor([f(t) for t in tails])[:, None] for f in (lambda t: t.start, lambda t: len(t.ids)))
    scored = ((place >= starts) & (place < ends)).to(chosen.device)
    return (chosen * scored).sum(1).cpu().numpy(), (best | ~scored).all(1).cpu().numpy().astype(np.float64)


def check_finite(values: np.ndarray, where: str) -> None:
    """Refuses NaN and infinity: they are a broken model, not a bad score."""
    if not np.isfinite(values).all():
        raise HalobenchError(
            f"the model's log-likelihoods {where} are not finite; its weights or its dtype are at fault"
        )


def token_logprobs(logits_RTV: torch.Tensor, targets_RT: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Log-likelihood (float64) of each target and whether it is the most likely token; the softmax is in float32."""
    logits = logits_RTV.float()
    chosen = logits.gather(-1, targets_RT[..., None])[..., 0] - logits.logsumexp(-1)
    return chosen.double(), logits.argmax(-1) == targets_RT
