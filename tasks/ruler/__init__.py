"""RULER (arXiv 2404.06654), all 13 tasks: generated offline, in a model's own tokens, at any length there is room for.

Wording, layout and scoring are those of github.com/NVIDIA/RULER at c3f5e3b, in its base form (no chat template, the
answer's first words given), and so is the room for an answer, whatever the tokenizer. A prompt and that room fill the
length to within one part in a hundred and never exceed it (RULER takes filler away in steps until a prompt fits); no
haystack ends with its corpus, and nothing is truncated. What else differs from RULER is said where it is made: essays
and variable tracking in haystacks.py, word lists in counting.py, documents in questions.py.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from halobench.registry import Registry
from halobench.tasks.ruler.contract import MakeBuilder

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedTokenizerBase

    from halobench.tasks.ruler.task import RulerTask

_ROOM = "halobench.tasks.ruler"
_NEEDLES = ("single_1", "single_2", "single_3", "multikey_1", "multikey_2", "multikey_3", "multivalue", "multiquery")
RULER_TASKS: Registry[MakeBuilder] = Registry(
    "RULER task",
    {
        **{f"niah_{name}": f"{_ROOM}.haystacks:niah_{name}" for name in _NEEDLES},
        "vt": f"{_ROOM}.haystacks:TrackingBuilder",
        "cwe": f"{_ROOM}.counting:CommonWords",
        "fwe": f"{_ROOM}.counting:FrequentWords",
        "qa_1": f"{_ROOM}.questions:qa_1",
        "qa_2": f"{_ROOM}.questions:qa_2",
    },
)


def available(data_dir: Path | None) -> tuple[list[str], dict[str, str]]:
    """The tasks that can be run with this data folder, and of each of the others why it cannot."""
    from halobench.tasks.ruler.questions import HOTPOT_FILES, SQUAD_FILES, find_file, missing

    needed = {"qa_1": SQUAD_FILES, "qa_2": HOTPOT_FILES}
    out = {name: missing(files, data_dir) for name, files in needed.items() if find_file(files, data_dir) is None}
    return [name for name in RULER_TASKS.names() if name not in out], out


def make_ruler_task(
    name: str,
    tokenizer: PreTrainedTokenizerBase,
    *,
    seed: int,
    data_dir: Path | None = None,
    device: str | torch.device | None = None,
) -> RulerTask:
    """The task `name` of RULER_TASKS in the tokens of `tokenizer`.

    Args:
        seed: decides all samples, each by itself.
        data_dir: a folder with the files of qa_1 and qa_2.
        device: where inputs go; the model's own by default.

    Raises:
        UserError: a name that is none, or a file that is missing or malformed.
    """
    from halobench.tasks.ruler.task import RulerTask

    builder = RULER_TASKS.get(name)(tokenizer, data_dir, seed)
    return RulerTask(name, tokenizer, builder, seed=seed, device=device)
