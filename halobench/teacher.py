"""Trains the embedded teacher `tiny` from text: tokenizer, pre-training stages, and the finished model folder.

Deterministic given the data, the recipe and the number of processes; resumable at any moment.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from halobench.config import from_dict, read_yaml, write_yaml
from halobench.errors import UserError
from halobench.files import atomic_path, write_json, write_text
from halobench.progress import say
from halobench.provenance import file_hash
from halobench.surgery.loop import Loop, LoopConfig
from halobench.surgery.parallel import Team

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast, Qwen3ForCausalLM

END_OF_TEXT = "<|endoftext|>"


@dataclass(frozen=True, kw_only=True)
class TeacherModel:
    """Shape of the decoder, in transformers' terms; `embedding_std` is the spread of the token table at the start."""

    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int
    num_key_value_heads: int
    head_dim: int
    rope_theta: float
    max_position_embeddings: int
    embedding_std: float


@dataclass(frozen=True, kw_only=True)
class PretrainStage(LoopConfig):
    """One stage of pre-training: a loop with a name."""

    name: str


@dataclass(frozen=True, kw_only=True)
class TeacherRecipe:
    """Everything that decides the teacher but the text."""

    seed: int
    vocabulary: int
    model: TeacherModel
    stages: list[PretrainStage]


def load_recipe(path: Path) -> TeacherRecipe:
    """The recipe in a YAML file."""
    return from_dict(TeacherRecipe, read_yaml(path), f"recipe {path.name}")


def train_tokenizer(files: list[Path], vocabulary: int) -> PreTrainedTokenizerFast:
    """A byte-level BPE with single digits, trained on the documents of `files`."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    from halobench.surgery.documents import read_documents

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocabulary,
        special_tokens=[END_OF_TEXT],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(read_documents(files), trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        eos_token=END_OF_TEXT,
        bos_token=END_OF_TEXT,
        pad_token=END_OF_TEXT,
        clean_up_tokenization_spaces=False,
    )


def new_model(shape: TeacherModel, vocabulary: int, eos: int, seed: int) -> Qwen3ForCausalLM:
    """The untrained decoder: Qwen3 architecture, tied embeddings."""
    import torch
    from transformers import Qwen3Config, Qwen3ForCausalLM

    fields = {k: v for k, v in vars(shape).items() if k not in ("embedding_std", "rope_theta")}
    config = Qwen3Config(
        **fields,
        vocab_size=vocabulary,
        tie_word_embeddings=True,
        rope_parameters={"rope_type": "default", "rope_theta": shape.rope_theta},
        bos_token_id=eos,
        eos_token_id=eos,
        pad_token_id=eos,
    )
    config._attn_implementation = "eager"  # at 512 tokens and fewer the explicit form trains faster on a CPU
    torch.manual_seed(seed)
    model = Qwen3ForCausalLM(config)
    with torch.no_grad():
        model.model.embed_tokens.weight.normal_(0.0, shape.embedding_std)
    return model


def train(recipe: TeacherRecipe, data: str, folder: Path, *, device: str = "cpu") -> Path:
    """Runs every stage in `folder` and leaves the finished teacher in `folder/model`; returns that path."""
    from halobench.surgery.corpus import open_text
    from halobench.surgery.documents import source_files
    from halobench.surgery.planted import Mixture, Planted
    from halobench.surgery.stages.language import LanguageModelling

    team = Team.join(device)
    if team.sharded:
        raise UserError("the embedded teacher is small and trains its stages on one model: use DDP, without --use_fsdp")
    files = source_files(data)
    if files is None:
        raise UserError(f"the teacher is trained on files; {data!r} is a hub name: download it first")
    tokenizer = _tokenizer(recipe, files, folder, team)
    if team.leads:
        open_text(data, tokenizer, recipe.seed)  # tokenised by one process, for all
    team.wait()
    text = open_text(data, tokenizer, recipe.seed)
    model: Any = new_model(recipe.model, len(tokenizer), tokenizer.eos_token_id, recipe.seed)
    model.to(device)
    sequences = position = 0
    for stage in recipe.stages:
        loop = Loop(
            folder / stage.name,
            LanguageModelling(model, stage.name),
            Mixture(text, Planted(tokenizer, text, recipe.seed), stage.planted, recipe.seed),
            stage,
            first_sequence=sequences,
            first_position=position,
            device=device,
            team=team,
        )
        result = loop.run()
        sequences, position = result.sequences, result.position
        if team.leads:
            say(f"{stage.name}: loss {result.first_loss:.3f} -> {result.last_loss:.3f}, {result.seconds:.0f} s")
    if team.leads:
        _finish(model, tokenizer, recipe, files, folder)
    team.wait()
    return folder / "model"


def _tokenizer(recipe: TeacherRecipe, files: list[Path], folder: Path, team: Team) -> PreTrainedTokenizerFast:
    from transformers import AutoTokenizer

    path = folder / "tokenizer"
    if team.leads and not path.exists():
        say(f"training a tokenizer of {recipe.vocabulary} tokens on {len(files)} files")
        with atomic_path(path) as temporary:
            train_tokenizer(files, recipe.vocabulary).save_pretrained(temporary)
    team.wait()
    return cast("PreTrainedTokenizerFast", AutoTokenizer.from_pretrained(path))


def _finish(
    model: Qwen3ForCausalLM,
    tokenizer: PreTrainedTokenizerFast,
    recipe: TeacherRecipe,
    files: list[Path],
    folder: Path,
) -> None:
    """Writes the model in bf16, with the tokenizer, the recipe that made it and the hashes of its text."""
    import copy

    import torch

    finished: Any = copy.deepcopy(model)
    finished.to(torch.bfloat16)
    finished.config._attn_implementation = "sdpa"
    with atomic_path(folder / "model") as path:
        finished.save_pretrained(path)
        tokenizer.save_pretrained(path)
        write_text(path / "recipe.yaml", write_yaml(recipe))
        write_json(path / "data.json", [{"file": file.name, "sha256": file_hash(file)} for file in files])
