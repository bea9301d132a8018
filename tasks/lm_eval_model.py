"""A model in memory as lm-eval sees it: HFLM, with the choices of an item scored behind one reading of their context.

Tokens are HFLM's own. What changes is how they are run: choices share their context's state, requests that share
nothing take HFLM's path with logits at scored positions only, and no prompt is ever cut. The softmax is in float32
(HFLM's own is in the model's dtype, which in bf16 rounds a sum of 20 nats to the nearest eighth).
"""

from __future__ import annotations

import sys
from collections import defaultdict
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from lm_eval.models.huggingface import HFLM
from lm_eval.models.utils import normalize_gen_kwargs

from halobench.errors import HalobenchError, UserError
from halobench.surgery.heads import keep_logits
from halobench.tasks.scoring import Prompt, Tail, check_context, check_finite, score_prompts

if TYPE_CHECKING:
    from lm_eval.api.instance import Instance
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

WORTH_SHARING = 1.3  # tokens of a plain run over those of a shared one; below, forwards cost more than tokens save
BATCH_COST = {"cpu": 128}  # tokens that could be read in the time that two more forwards take, about
LAUNCH_COST = 4096  # the same on an accelerator, where a forward of few tokens takes as long as one of thousands
REMEMBERED = 64  # texts whose tokens are kept
MOST_TOGETHER = 64  # items considered for one batch

Encoded = tuple[tuple[str, str], list[int], list[int]]  # (context, continuation) and the tokens of both


@dataclass(kw_only=True)
class Work:
    """How the requests were run.

    shared, plain: log-likelihoods behind a context read once, and those on HFLM's path. generated, rolling: requests of
    those kinds, which are HFLM's. tokens_plain: what HFLM reads for the log-likelihoods; tokens: what was read.
    beyond_window: by task, prompts that with their answers are longer than the model's window; they are read whole.
    truncated: prompts that reached the model cut short, counted there.
    """

    shared: int = 0
    plain: int = 0
    generated: int = 0
    rolling: int = 0
    tokens: int = 0
    tokens_plain: int = 0
    beyond_window: dict[str, int] = field(default_factory=dict)
    truncated: int = 0

    @classmethod
    def sum(cls, parts: Sequence[Work]) -> Work:
        """Of several tasks together."""
        total = cls()
        for part in parts:
            for name in ("shared", "plain", "generated", "rolling", "tokens", "tokens_plain", "truncated"):
                setattr(total, name, getattr(total, name) + getattr(part, name))
            for task, count in part.beyond_window.items():
                total.beyond_window[task] = total.beyond_window.get(task, 0) + count
        return total


class BridgeLM(HFLM):
    """See the module. `work` says what was done."""

    _max_length: int | None

    def __init__(
        self, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, *, batch_size: int, window: int | None = None
    ) -> None:
        """`window`: tokens of a rolling window, and what longer prompts are counted against; None: HFLM's own rule."""
        super().__init__(
            pretrained=model,
            tokenizer=tokenizer,
            backend="causal",
            batch_size=batch_size,
            max_length=window,
            softmax_dtype="float32",
        )
        self.begin()
        self._documents: list[tuple[str, int]] | None = None
        self._scored: tuple[int, int] | None = None  # of a batch on HFLM's path: its tokens, and logits that are wanted
        self._texts: dict[tuple[str, bool | None], list[int]] = {}  # the choices of an item share their context

    def begin(self) -> None:
        """Counts the work of another task, from nothing."""
        self.work = Work()

    def tok_encode(self, string: str, add_special_tokens: bool | None = None, *args: Any, **more: Any) -> list[int]:
        """Tokens of a text, with the last few remembered."""
        if args or more:
            return super().tok_encode(string, add_special_tokens, *args, **more)
        key = string, add_special_tokens
        if key not in self._texts:
            if len(self._texts) == REMEMBERED:
                del self._texts[next(iter(self._texts))]
            self._texts[key] = super().tok_encode(string, add_special_tokens)
        return self._texts[key]

    def loglikelihood(self, requests: list[Instance], disable_tqdm: bool = False) -> list[tuple[float, bool]]:
        """(log-likelihood, whether greedy) of each request's continuation."""
        self._documents = [(request.task_name or "", request.doc_id or 0) for request in requests]
        try:
            return super().loglikelihood(requests, disable_tqdm=disable_tqdm or not sys.stderr.isatty())
        finally:
            self._documents = None

    def loglikelihood_rolling(self, requests: list[Instance], disable_tqdm: bool = False) -> list[float]:
        """Log-likelihood of each text, in HFLM's windows."""
        self.work.rolling += len(requests)
        return super().loglikelihood_rolling(requests, disable_tqdm=disable_tqdm or not sys.stderr.isatty())

    def generate_until(self, requests: list[Instance], disable_tqdm: bool = False) -> list[str]:
        """HFLM's answers, with room for every prompt and its answer."""
        self.work.generated += len(requests)
        lengths = []
        for request in requests:
            room = normalize_gen_kwargs(request.args[1], self.max_gen_toks)["max_gen_toks"]
            lengths.append((request.task_name or "", len(self.tok_encode(request.args[0])) + room))
        with self._whole(lengths):
            return super().generate_until(requests, disable_tqdm=disable_tqdm or not sys.stderr.isatty())

    def tok_batch_encode(self, strings: list[str], *args: Any, **more: Any) -> tuple[torch.Tensor, torch.Tensor]:
        """Token ids (batch, time) of prompts to be continued, padded on the left, and their mask."""
        ids, mask = super().tok_batch_encode(strings, *args, **more)
        whole = torch.tensor([len(self.tok_encode(string)) for string in strings])
        self.work.truncated += int((mask.sum(1) < whole).sum())
        return ids, mask

    def _loglikelihood_tokens(
        self, requests: list[Encoded], disable_tqdm: bool = False, override_bs: int | None = None
    ) -> list[tuple[float, bool]]:
        if self._documents is None:  # windows of a rolling request
            return super()._loglikelihood_tokens(requests, disable_tqdm=True, override_bs=override_bs)
        documents = self._documents
        answers: dict[int, tuple[float, bool]] = {}
        for (task, _), (_, _, continuation) in zip(documents, requests, strict=True):
            if not continuation:
                raise HalobenchError(
                    f"task {task} scores a continuation without tokens of its own: it is empty, or this tokenizer "
                    "merges it with its context; leave the task out"
                )
        lengths = ((task, len(r[1]) + len(r[2]) - 1) for (task, _), r in zip(documents, requests, strict=True))
        with self._whole(list(lengths)):
            together, alone = plan_sharing(requests, documents, BATCH_COST.get(self.device.type, LAUNCH_COST))
            answers.update(self._run_shared(requests, together))
            answers.update(self._run_plain(requests, alone))
        check_finite(np.array([logprob for logprob, _ in answers.values()]), "of lm-eval's requests")
        return [answers[i] for i in range(len(requests))]

    def _run_shared(
        self, requests: Sequence[Encoded], together: Sequence[tuple[Family, int]]
    ) -> Iterator[tuple[int, Any]]:
        """Answers of families of requests; what is before a family's cut is read once."""
        prompts = []
        for family, cut in together:
            tails = []
            for i in family.members:
                _, context, continuation = requests[i]
                tails.append(Tail((context + continuation)[cut:], len(context) - cut))
            first = requests[family.members[0]]
            prompts.append(Prompt(np.asarray((first[1] + first[2])[:cut], dtype=np.int64), tuple(tails)))
        if not prompts:
            return
        longest = max(len(p.prefix) + max(len(tail.ids) for tail in p.tails) for p in prompts)
        scores = score_prompts(self.model, prompts, batch_tokens=self.batch_size * longest, device=self.device)
        self.work.tokens += scores.tokens_processed
        for prompt, given in zip(prompts, scores.given, strict=True):
            whole = [len(prompt.prefix) + len(tail.ids) for tail in prompt.tails]
            self.work.truncated += int((given < whole).sum())
        for (family, _), logprobs, greedy in zip(together, scores.logprob, scores.greedy, strict=True):
            self.work.shared += len(family.members)
            self.work.tokens_plain += family.plain
            for i, logprob, hit in zip(family.members, logprobs, greedy, strict=True):
                yield i, (float(logprob), bool(hit))

    def _run_plain(self, requests: Sequence[Encoded], alone: Iterable[int]) -> Iterator[tuple[int, Any]]:
        """Answers on HFLM's path in HFLM's batches; those that differ in the last token only share a row, as there."""
        splits: dict[tuple[int, ...], dict[int, list[int]]] = defaultdict(lambda: defaultdict(list))
        for i in alone:
            splits[_row(requests[i])][len(requests[i][1])].append(i)
        # Rows that are split in two ways (two tasks on one text) go one way at a time: HFLM mistakes one for the other.
        for way in range(max((len(found) for found in splits.values()), default=0)):
            rows = {row: list(found.values())[way] for row, found in splits.items() if len(found) > way}
            order = sorted(rows, key=lambda row: (-len(row), row))
            for start in range(0, len(order), self.batch_size):
                yield from self._run_batch(
                    requests, [(row, rows[row]) for row in order[start : start + self.batch_size]]
                )

    def _run_batch(
        self, requests: Sequence[Encoded], batch: Sequence[tuple[tuple[int, ...], list[int]]]
    ) -> Iterator[tuple[int, Any]]:
        """Answers of rows, longest first, and the requests that share each, in one forward of HFLM's."""
        numbers = [i for _, members in batch for i in members]
        # Where logits start behind the beginning, HFLM takes the difference in length into account.
        length = len(batch[0][0])
        self._scored = length, length - min(len(requests[i][1]) for i in numbers) + 1
        try:
            found = super()._loglikelihood_tokens([requests[i] for i in numbers], disable_tqdm=True)
        finally:
            self._scored = None
        self.work.plain += len(numbers)
        self.work.tokens += sum(len(row) for row, _ in batch)
        self.work.tokens_plain += sum(len(row) for row, _ in batch)
        yield from zip(numbers, found, strict=True)

    def _model_call(
        self, inps: torch.Tensor, attn_mask: torch.Tensor | None = None, labels: torch.Tensor | None = None
    ) -> torch.Tensor:
        kept = {}
        if self._scored is not None:
            length, wanted = self._scored
            kept = keep_logits(self.model, wanted)
            self.work.truncated += len(inps) if inps.shape[1] < length else 0
        with torch.no_grad():
            return self.model(inps, use_cache=False, **kept).logits

    @contextmanager
    def _whole(self, lengths: Sequence[tuple[str, int]]) -> Iterator[None]:
        """Room for prompts of these (task, tokens): none is cut. Refuses what the model's positions cannot express."""
        window = self.max_length
        beyond = self.work.beyond_window
        for task in (task for task, length in lengths if length > window):
            beyond[task] = beyond.get(task, 0) + 1
        task, longest = max(lengths, key=lambda row: row[1])
        try:
            check_context(self.model, longest)
        except UserError as error:
            raise UserError(
                f"task {task} has a prompt of {longest} tokens, {longest - window} more than the model's window, and "
                f"prompts are not cut: {error}"
            ) from None
        before, self._max_length = self._max_length, max(window, longest)
        try:
            yield
        finally:
            self._max_length = before


@dataclass(frozen=True)
class Family:
    """Requests (by number) that begin alike: their first `common` tokens.

    longest: tokens of the longest with its continuation. plain: what running each by itself reads.
    """

    members: tuple[int, ...]
    common: int
    longest: int
    plain: int


def _row(request: Encoded) -> tuple[int, ...]:
    """What a model reads for a request: all but the last token."""
    return (*request[1], *request[2][:-1])


def plan_sharing(
    requests: Sequence[Encoded], documents: Sequence[tuple[str, int]], batch_cost: int
) -> tuple[list[tuple[Family, int]], list[int]]:
    """The requests of each document that are worth running together, with where to cut them, and all other requests.

    A context's last token is read with the continuation: what it says is the first score. batch_cost: tokens that could
    be read in the time that one more batch takes.
    """
    by_document: dict[tuple[str, int], list[int]] = defaultdict(list)
    for i, document in enumerate(documents):
        by_document[document].append(i)
    by_count: dict[int, list[Family]] = defaultdict(list)
    alone: list[int] = []
    for members in by_document.values():
        rows = {_row(requests[i]) for i in members}
        common = min(_common(rows), *(len(requests[i][1]) - 1 for i in members))
        if common < 1 or len(rows) < len(members):
            alone += members
            continue
        longest, plain = max(len(row) for row in rows) + 1, sum(map(len, rows))
        by_count[len(members)].append(Family(tuple(members), common, longest, plain))
    together = []
    for count, families in by_count.items():
        for batch in _batches(families, count, batch_cost):
            cut = batch[0].common
            if sum(family.plain for family in batch) >= WORTH_SHARING * _slots(batch, count):
                together += [(family, cut) for family in batch]
            else:
                alone += [i for family in batch for i in family.members]
    return together, alone


def _common(rows: Iterable[tuple[int, ...]]) -> int:
    """How many tokens all rows begin with; the first and the last in order differ soonest."""
    first, last = min(rows), max(rows)
    same = (a == b for a, b in zip(first, last, strict=False))
    return next((place for place, equal in enumerate(same) if not equal), min(len(first), len(last)))


def _slots(batch: Sequence[Family], count: int) -> int:
    """Tokens and padding of families of `count` members, shortest beginning first, that are all cut at the shortest."""
    cut = batch[0].common
    return len(batch) * (cut + count * (max(family.longest for family in batch) - cut))


def _batches(families: Sequence[Family], count: int, batch_cost: int) -> list[list[Family]]:
    """Families that stand together: the cheapest choice, by dynamic programming over them in order of length.

    best[j] = min over i of best[i] + batch_cost + slots of i..j-1.
    """
    ordered = sorted(families, key=lambda family: family.common)
    best, opened = [0], [0]
    for stop in range(1, len(ordered) + 1):
        longest, costs = 0, {}
        for start in range(stop - 1, max(-1, stop - 1 - MOST_TOGETHER), -1):
            longest, cut = max(longest, ordered[start].longest), ordered[start].common
            costs[start] = best[start] + batch_cost + (stop - start) * (cut + count * (longest - cut))
        opened.append(min(costs, key=lambda start: costs[start]))
        best.append(costs[opened[-1]])
    found, stop = [], len(ordered)
    while stop > 0:
        found.append(ordered[opened[stop] : stop])
        stop = opened[stop]
    return found
