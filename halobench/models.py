"""From what a user types to a model: `tiny`, a folder, a run, or a hub name."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from halobench.assets import TINY_TEACHER
from halobench.config import from_dict
from halobench.errors import UserError
from halobench.files import read_json
from halobench.provenance import model_hash
from halobench.records import ModelCard

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedTokenizerBase

CARD = "halobench.json"


def resolve(name: str) -> str:
    """The folder (or hub name) that `name` stands for.

    "tiny" is the embedded teacher; the folder of a finished run stands for its model.
    """
    if name == "tiny":
        return str(TINY_TEACHER)
    path = Path(name).expanduser()
    if path.is_dir():
        if (path / "run.json").exists():
            if not (path / "model" / "config.json").exists():
                raise UserError(f"run {name} is not finished; `halobench convert` with the same -o resumes it")
            return str(path / "model")
        return str(path)
    if path.exists() or name.startswith((".", "/", "~")) or name.count("/") != 1:
        raise UserError(f"model {name!r} not found; give a model folder, a run, a hub name (owner/name) or `tiny`")
    return name


def default_device() -> str:
    """ "cuda" where a GPU is, else "cpu"."""
    import torch

    return "cuda" if torch.cuda.is_available() else "cpu"


def load(name: str, *, device: str, dtype: torch.dtype | None = None) -> tuple[Any, PreTrainedTokenizerBase]:
    """The model in evaluation mode, and its tokenizer. dtype None: bf16 on a GPU, fp32 on a CPU."""
    import torch
    from transformers.utils import logging

    from halobench.surgery.checkpoint import load_model, load_tokenizer

    logging.disable_progress_bar()
    where = resolve(name)
    if dtype is None:
        dtype = torch.bfloat16 if device != "cpu" else torch.float32
    model = load_model(where, dtype=dtype, device=device)
    return model.eval(), load_tokenizer(where)


def card_of(name: str, model: Any) -> ModelCard:
    """The card in a hybrid's folder, or one made for an untouched decoder."""
    where = Path(resolve(name))
    if (where / CARD).exists():
        card = from_dict(ModelCard, read_json(where / CARD), str(where / CARD))
        files = model_hash(where) if card.files else ""
        return card if files == card.files else replace(card, hash=files, files=files)
    config = model.config
    local = where.is_dir()
    called = where.name if local and name != "tiny" else name
    return ModelCard(
        name=called,
        path=name,
        hash=model_hash(where) if local else name,
        layers=config.num_hidden_layers,
        parameters=sum(p.numel() for p in model.parameters()),
        teacher=called,
        trained_length=getattr(config, "max_position_embeddings", None),
    )
