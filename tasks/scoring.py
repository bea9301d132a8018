"""Log-likelihoods of short endings behind shared beginnings: the one way the tasks run a model.

A prompt is a prefix (a haystack, a context) with several tails (questions with their answers, choices). The prefix is
read once, in chunks; its state, whatever the cache class, is copied for each tail, or put back after it. Prefixes of
one batch have the same length, so nothing is padded on the left, and the tails' padding stands behind everything that
is scored. What shares a prefix so: the questions of a needle haystack (niah, grid) or a list (kv), and the choices of
an lm-eval item. RULER's samples and texts for perplexity have nothing in common to be read once.
"""

from __future__ import annotations

import copy
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from halobench.errors import HalobenchError, UserError
from halobench.mixers.cache import HybridCache
from halobench.surgery.anatomy import evaluating as evaluation_mode
from halobench.surgery.engine import hears_steps
from halobench.surgery.heads import keep_logits
from halobench.surgery.hybrid import HybridForCausalLM
from halobench.surgery.plan import KEEP

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from halobench.progress import Progress

LOGIT_ELEMENTS = 2**26  # at most this many logits at once: 256 MiB in float32
MASK_ELEMENTS = 2**27  # of a (chunk, past) mask: 128 MiB as booleans, 512 MiB once a kernel has made numbers of it
SMALLEST_CHUNK = 16
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
    """Results in the order of the prompts; `logprob`, `greedy` and `given` have one entry a tail.

    logprob: sum of the scored tokens' log-likelihoods. greedy: 1.0 where each of them is the most likely token.
    given: tokens of prefix and tail that the model was really given, counted at its forward calls; padding is none.
    read: of each prompt, the tokens that were run, its prefix once.
    """

    logprob: list[np.ndarray]
    greedy: list[np.ndarray]
    given: list[np.ndarray]
    read: np.ndarray

    @property
    def tokens_processed(self) -> int:
        """Tokens run."""
        return int(self.read.sum())

    @property
    def tokens_plain(self) -> int:
        """What running each prefix anew for each tail would have been."""
        return int(sum(given.sum() for given in self.given))


@contextmanager
def evaluating(model: PreTrainedModel) -> Iterator[None]:
    """Inference mode and evaluation mode; a model that was in training is put back."""
    with evaluation_mode(model), torch.inference_mode():
        yield


class TokenCount:
    """Counts the input tokens of every forward of `model` while it is open (`with TokenCount(model) as count`).

    Those of the decode engine's steps too.
    """

    def __init__(self, model: PreTrainedModel) -> None:
        self.model, self.tokens = model, 0

    def __enter__(self) -> TokenCount:
        self._hook = self.model.register_forward_pre_hook(self._count, with_kwargs=True)
        return self

    def __exit__(self, *_: object) -> None:
        self._hook.remove()

    @hears_steps
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


def window_of(model: PreTrainedModel) -> int | None:
    """The tokens that a model's config says it reads; None where it says nothing."""
    config = model.config.get_text_config(decoder=True)
    return getattr(config, "max_position_embeddings", None) or getattr(config, "n_positions", None)


def most_positions(model: PreTrainedModel) -> int | None:
    """The tokens beyond which a model cannot express a position: it has a table of them. None for RoPE, or none."""
    for name, module in model.named_modules():
        last = name.rpartition(".")[2]
        table = isinstance(module, torch.nn.Embedding) and last in _POSITION_TABLES
        if table or hasattr(module, "embed_positions") and isinstance(module.embed_positions, torch.Tensor):
            return window_of(model)
    return None


def check_context(model: PreTrainedModel, length: int) -> None:
    """Refuses a length the model's positions cannot express. RoPE has no hard end: beyond it is a measurement."""
    limit = most_positions(model)
    if limit is not None and length > limit:
        raise UserError(
            f"{model.config.get_text_config(decoder=True).model_type} has a table of {limit} positions and cannot read "
            f"{length} tokens; choose lengths up to {limit}"
        )


def start_cache(model: PreTrainedModel, room: int) -> Any:
    """An empty cache with room for `room` tokens where the model makes its own; None leaves the choice to forward."""
    make: Callable[[int], Any] | None = getattr(model, "new_cache", None)
    return make(room) if make else None


def _all_mixers(model: HybridForCausalLM) -> bool:
    return all(layer.mixer != KEEP for layer in model.config.surgery_plan().layers)


def makes_masks(model: PreTrainedModel) -> bool:
    """Whether a forward over a past builds (queries, past) matrices of its own.

    transformers does for every kernel but flash attention. Our mixers take queries in pieces and keep within a bound.
    """
    if isinstance(model, HybridForCausalLM) and _all_mixers(model):
        return False
    return not str(getattr(model.config, "_attn_implementation", "")).startswith("flash")


def chunk_sizes(model: PreTrainedModel, rows: int, length: int, most: int) -> Iterator[int]:
    """How many tokens each forward reads so that `length` are read: `most`, and fewer where memory would grow.

    A chunk of c tokens behind p others needs c (p + c) elements of mask for each row, in eager attention for each head
    as well; and c times the vocabulary of logits in a model that cannot leave them out. Both are kept bounded.
    """
    config = model.config.get_text_config(decoder=True)
    copies = rows * (config.num_attention_heads if config._attn_implementation == "eager" else 1)
    masked = makes_masks(model)
    if not keep_logits(model, 1):
        most = max(SMALLEST_CHUNK, min(most, LOGIT_ELEMENTS // (rows * config.vocab_size)))
    past = 0
    while past < length:
        size = min(most, MASK_ELEMENTS // (copies * min(past + most, length))) if masked else most
        size = min(max(size, SMALLEST_CHUNK), length - past)
        yield size
        past += size


def prefill(model: PreTrainedModel, ids_BT: torch.Tensor, chunk: int, room: int = 0) -> tuple[Any, torch.Tensor]:
    """Reads tokens (batch, time) in chunks; returns the cache and the logits (batch, vocabulary) of the last position.

    A cache that can be told its final size is told: the tokens here and `room` more. What is held beside it does not
    grow with the time: see `chunk_sizes`, of which `chunk` is the most.
    """
    rows, length = ids_BT.shape
    cache, last = start_cache(model, length + room), None
    for piece in ids_BT.split(list(chunk_sizes(model, rows, length, chunk)), dim=1):
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


def repeat_cache(cache: Any, rows: int, times: int, device: torch.device) -> Any:
    """The cache with each of its `rows` sequences repeated `times` times in a row.

    By the reordering of beam search: every cache knows it, those with states of linear attention too.
    """
    if times == 1:
        return cache
    reordered = cache.reorder_cache(torch.arange(rows, device=device).repeat_interleave(times))
    return cache if reordered is None else reordered


@contextmanager
def continued(cache: Any) -> Iterator[Any]:
    """A cache to be continued, of which the original is as it was afterwards.

    A hybrid's own is continued itself and put back: keys and values are written behind its end, states are replaced and
    not changed, so nothing is copied. A layer with a window writes over what it keeps; there, and for any other cache,
    it is a copy.
    """
    if not isinstance(cache, HybridCache) or any(layer.is_sliding for layer in cache.layers):
        yield copy_cache(cache)
        return
    before = [dict(vars(layer)) for layer in cache.layers]
    try:
        yield cache
    finally:
        for layer, then in zip(cache.layers, before, strict=True):
            vars(layer).clear()
            vars(layer).update(then)


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
    empty = [np.empty(0)] * len(prompts)
    logprob, greedy, given, read = [*empty], [*empty], [*empty], np.zeros(len(prompts), dtype=np.int64)
    with evaluating(model):
        vocabulary, keeps = model.config.get_text_config(decoder=True).vocab_size, bool(keep_logits(model, 1))
        for group in _batches(prompts, batch_tokens, vocabulary, keeps):
            batch = [prompts[i] for i in group]
            found = _score_batch(model, batch, batch_tokens, chunk, torch.device(device or model.device))
            check_finite(found.logprob, f"behind {len(batch[0].prefix)} tokens")
            for row, index in enumerate(group):
                logprob[index], greedy[index] = found.logprob[row], found.greedy[row]
                given[index] = found.prefix + found.tails[row]
                read[index] = found.prefix + found.tails[row].sum()
            if progress is not None:
                progress.advance(int(read[group].sum()))
    return PromptScores(logprob, greedy, given, read)


def _batches(prompts: Sequence[Prompt], batch_tokens: int, vocabulary: int, keeps: bool) -> Iterator[list[int]]:
    """Places of prompts that share a batch; `keeps`: whether the model gives the logits of scored positions alone."""
    groups: dict[tuple[int, int], list[int]] = defaultdict(list)
    for index, prompt in enumerate(prompts):
        groups[len(prompt.prefix), len(prompt.tails)].append(index)
    for (length, tails), members in sorted(groups.items(), reverse=True):
        # alike tails together: less padding
        members.sort(key=lambda i: max(len(tail.ids) for tail in prompts[i].tails))
        longest = max(len(tail.ids) for tail in prompts[members[-1]].tails)
        first = min(tail.start for i in members for tail in prompts[i].tails) - 1 if keeps else 0
        by_tokens = batch_tokens // max(length, tails * longest)
        size = max(1, min(by_tokens, LOGIT_ELEMENTS // (tails * (longest - first) * vocabulary)))
        yield from (members[i : i + size] for i in range(0, len(members), size))


@dataclass(frozen=True)
class _BatchScores:
    """Of one batch: scores and tokens given of each tail, (prompts, tails), and tokens of the prefix given to each."""

    logprob: np.ndarray
    greedy: np.ndarray
    tails: np.ndarray
    prefix: int


def _score_batch(
    model: PreTrainedModel, batch: Sequence[Prompt], batch_tokens: int, chunk: int, device: torch.device
) -> _BatchScores:
    """Scores of prompts with equally long prefixes and equally many tails."""
    count, length, rows = len(batch[0].tails), len(batch[0].prefix), len(batch)
    cache = None
    with TokenCount(model) as seen:
        if length:
            ids = torch.as_tensor(np.stack([p.prefix for p in batch]), dtype=torch.long, device=device)
            cache, _ = prefill(model, ids, chunk, room=max(len(tail.ids) for prompt in batch for tail in prompt.tails))
    logprob, greedy, tails_given = (np.zeros((rows, count)) for _ in range(3))
    # Copies of a long state are what costs memory: few tails at a time then.
    together = max(1, min(count, 4 * batch_tokens // max(1, rows * length)))
    for start in range(0, count, together):
        stop = min(start + together, count)
        tails = [tail for prompt in batch for tail in prompt.tails[start:stop]]
        with TokenCount(model) as seen_behind:
            values, equal = _score_behind(model, tails, cache, rows, device, last=stop == count)
        given = [min(len(tail.ids), seen_behind.tokens // len(tails)) for tail in tails]
        logprob[:, start:stop] = values.reshape(rows, -1)
        greedy[:, start:stop] = equal.reshape(rows, -1)
        tails_given[:, start:stop] = np.reshape(given, (rows, -1))
    return _BatchScores(logprob, greedy, tails_given, prefix=seen.tokens // rows)


def _score_behind(
    model: PreTrainedModel, tails: Sequence[Tail], cache: Any, rows: int, device: torch.device, *, last: bool
) -> tuple[np.ndarray, np.ndarray]:
    """`_score_tails` behind a cache of `rows` sequences, which is as it was afterwards, but for the `last` tails."""
    times = len(tails) // rows
    if cache is None:
        return _score_tails(model, tails, None, device)
    if last:
        return _score_tails(model, tails, repeat_cache(cache, rows, times, device), device)
    # No copy outlives this call: the next one is made when the memory of this one is free again.
    with continued(cache) as state:
        return _score_tails(model, tails, repeat_cache(state, rows, times, device), device)


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
