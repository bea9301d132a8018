"""The perplexity suite: which text is read in which windows, the same at every length."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from halobench.errors import UserError
from halobench.progress import say
from halobench.records import Metric
from halobench.tasks.estimate import Work
from halobench.tasks.request import Request
from halobench.units import format_length

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

DEFAULT_TEXT_TOKENS = 65_536


@dataclass(frozen=True, kw_only=True)
class Text:
    """A measurement: at most `tokens`, of the first windows of all documents, then of their second ones.

    each: tokens of each document at most; None for no bound.
    """

    name: str
    documents: list[str]
    window: int
    tokens: int
    each: int | None = None

    @property
    def settings(self) -> dict[str, Any]:
        """What decides its number, beside the documents."""
        return {"window": self.window, "tokens": self.tokens, "each": self.each}


class PerplexitySuite:
    """Bits per byte: long novels in windows of every length, and short modern documents in windows of the shortest.

    At every length the novels are the same text, the first tokens of each novel: as many as the budget gives each, or
    the longest window where that is more. So the numbers differ by how much context a token sees, and by nothing else.
    A window longer than a novel is left out, aloud, for its label would not be true.
    """

    needs_lengths = True
    takes = frozenset({"lengths"})
    version = 2  # 2: the same text at every length

    def texts(self, request: Request) -> tuple[list[Text], dict[str, str]]:
        """What is measured, and what is left out and why."""
        from halobench.assets import TEXT_HELDOUT, TEXT_LONG
        from halobench.tasks.text import read_jsonl

        budget = request.limit * 1024 if request.limit else DEFAULT_TEXT_TOKENS
        novels = [document.text for document in read_jsonl(TEXT_LONG)]
        modern = [document.text for document in read_jsonl(TEXT_HELDOUT) if document.kind == "modern"]
        longest = max(_sizes(request.tokenizer, modern, request.lengths[0]))
        shortest = min(_sizes(request.tokenizer, novels, max(request.lengths)))
        texts, out = [], {}
        if longest >= request.lengths[0]:
            tokens = max(budget, request.lengths[0])
            texts.append(Text(name="modern", documents=modern, window=request.lengths[0], tokens=tokens))
        else:
            out[f"modern at {format_length(request.lengths[0])}"] = f"its longest document has {longest} tokens"
        windows = [length for length in request.lengths if length <= shortest]
        each = max(budget // len(novels), *windows) if windows else 0
        for window in windows:
            texts.append(Text(name="novels", documents=novels, window=window, tokens=each * len(novels), each=each))
        for length in request.lengths[len(windows) :]:
            out[f"novels at {format_length(length)}"] = f"the shortest novel has {shortest} tokens"
        return texts, out

    def __call__(self, request: Request) -> list[Metric]:
        from halobench.tasks.perplexity import bits_per_byte

        texts, out = self.texts(request)
        if not texts:
            raise UserError(
                f"no text of suite ppl is as long as {format_length(min(request.lengths))}; choose shorter lengths"
            )
        for what, why in out.items():
            say(f"left out {what}: {why}")
        request.details |= {"left_out": out} if out else {}
        metrics: list[Metric] = []
        truncated = 0
        for text in texts:

            def make(text: Text = text) -> tuple[list[Metric], dict[str, Any]]:
                score = bits_per_byte(
                    request.model, request.tokenizer, text.documents, window=text.window, max_tokens=text.tokens,
                    each=text.each, name=text.name, device=request.device,
                )  # fmt: skip
                return [score.metric], {"truncated": score.truncated}

            part = request.part("ppl", text.name, text.window, self._part_settings(text), make)
            if part is not None:
                metrics += part.metrics
                truncated += part.details["truncated"]
        request.details["work"] = {"truncated": truncated}
        return metrics

    def _part_settings(self, text: Text) -> dict[str, Any]:
        return {"version": self.version, **text.settings}

    def work(self, request: Request) -> list[Work]:
        """The budget of each text, or all of the text where that is less."""
        from halobench.tasks.lm_eval_suite import tokens_per_character

        rate = tokens_per_character(request.tokenizer)
        rows = []
        for text in self.texts(request)[0]:
            tokens = round(min(text.tokens, rate * sum(map(len, text.documents))))
            done = request.kept("ppl", text.name, self._part_settings(text)) is not None
            rows.append(
                Work(suite="ppl", task=text.name, length=text.window, samples=1, tokens=tokens, known=int(done))
            )
        return rows


def _sizes(tokenizer: PreTrainedTokenizerBase, documents: list[str], enough: int) -> list[int]:
    """Tokens of each document; of a longer one, so many that they are `enough` at least."""
    from halobench.tasks.perplexity import LONGEST_TOKEN
    from halobench.tasks.scoring import encode

    return [len(ids) for ids in encode(tokenizer, [text[: LONGEST_TOKEN * enough] for text in documents])]
