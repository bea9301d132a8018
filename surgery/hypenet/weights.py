"""Whole checkpoints in the released HypeNet layout: folders read into hybrids, hybrids written as folders.

Tensors go over bit for bit, under another name: the layout has a mixer's parts in `self_attn`, ours in
`self_attn.mixer`, and our decoder stands one level deeper. Names and shapes are compared before any weight is read.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import split_torch_state_dict_into_shards
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor
from transformers import GenerationConfig

from halobench.errors import UserError
from halobench.files import atomic_path, write_json
from halobench.surgery.checkpoint import check_report, model_json, weight_files
from halobench.surgery.hybrid import HybridConfig, HybridForCausalLM
from halobench.surgery.hypenet.reading import read_hypenet
from halobench.surgery.hypenet.writing import write_hypenet

OUR_PREFIX, OUR_MIXER, THEIR_MIXER = "backbone.", ".self_attn.mixer.", ".self_attn."
HEAD, EMBEDDING = "lm_head.weight", "model.embed_tokens.weight"
DTYPES = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
SHARD_BYTES = 5_000_000_000


def import_hypenet(directory: str | Path) -> HybridForCausalLM:
    """The released checkpoint in `directory` as a hybrid, in evaluation mode and in the dtype of its weights.

    Raises:
        UserError: the folder is not such a checkpoint, has a switch that cannot be honoured, or has weights that are
            missing, too many, misshapen, damaged, of several types or pickled.
    """
    folder = Path(directory)
    try:
        source, plan = read_hypenet(model_json(folder))
    except UserError as error:
        raise UserError(f"{folder}: {error}" if str(folder) not in str(error) else str(error)) from error
    config = HybridConfig.of(source, plan)
    tensors, dtype = _read(folder, config)
    loaded: Any = HybridForCausalLM.from_pretrained(
        None, config=config, state_dict=tensors, dtype=dtype, output_loading_info=True
    )
    model, report = loaded
    check_report(folder, report)
    if (folder / "generation_config.json").is_file():
        try:
            model.generation_config = GenerationConfig.from_pretrained(folder)
        except (OSError, ValueError, TypeError) as error:
            raise UserError(f"{folder / 'generation_config.json'} cannot be read; repair or remove it") from error
    return model.eval()


def export_hypenet(
    model: Any, directory: str | Path, tokenizer: Any | None = None, *, shard_bytes: int = SHARD_BYTES
) -> None:
    """Writes a hybrid as a folder that the released HypeNetForCausalLM reads: config, safetensors, tokenizer.

    Layers kept untouched are written as what they are, softmax layers with RoPE and without a gate.

    Args:
        directory: new, or an empty folder.
        shard_bytes: weights beyond this are spread over several files with an index.

    Raises:
        UserError: the layout cannot say what this hybrid is; the message says what.
    """
    folder = Path(directory)
    if not isinstance(model, HybridForCausalLM):
        raise UserError(f"only hybrids of halobench are written as HypeNets, this is a {type(model).__name__}")
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise UserError(f"{folder} exists and is not empty; choose a new folder")
    written = write_hypenet(model.config)
    tensors = {_their_name(name): tensor for name, tensor in model.state_dict().items()}
    if model.config.tie_word_embeddings:
        tensors.pop(HEAD)
    shapes = {name: tuple(tensor.shape) for name, tensor in tensors.items()}
    _compare("the hybrid", shapes, HybridConfig.of(*read_hypenet(written)))
    dtypes = sorted({str(tensor.dtype).removeprefix("torch.") for tensor in tensors.values()})
    if len(dtypes) > 1:
        raise UserError(f"the hybrid has weights of several types ({', '.join(dtypes)}); cast it to one")
    with atomic_path(folder) as temporary:
        temporary.mkdir()
        write_json(temporary / "config.json", {**written, "torch_dtype": dtypes[0]})
        _write(tensors, temporary, shard_bytes)
        if model.generation_config is not None:
            model.generation_config.save_pretrained(temporary)
        if tokenizer is not None:
            tokenizer.save_pretrained(temporary)


def _their_name(name: str) -> str:
    """The released name of one of our tensors."""
    return name.removeprefix(OUR_PREFIX).replace(OUR_MIXER, THEIR_MIXER)


def _expected(config: HybridConfig) -> dict[str, tuple[str, tuple[int, ...]]]:
    """Released name -> our name and shape, for every tensor that a file of this config holds."""
    with torch.device("meta"):
        empty = HybridForCausalLM(config)
    expected = {_their_name(name): (name, tuple(x.shape)) for name, x in empty.state_dict().items()}
    if config.tie_word_embeddings:
        expected.pop(HEAD)
    return expected


def _compare(where: str | Path, shapes: Mapping[str, tuple[int, ...]], config: HybridConfig) -> dict[str, str]:
    """Refuses tensors (by released name) other than those expected; returns our name of each."""
    expected = _expected(config)
    report = {
        "missing_keys": expected.keys() - shapes.keys(),
        "unexpected_keys": shapes.keys() - expected.keys(),
        "mismatched_keys": [
            (name, shapes[name], wanted) for name, (_, wanted) in expected.items() if shapes.get(name, wanted) != wanted
        ],
    }
    check_report(where, report)
    return {name: ours for name, (ours, _) in expected.items()}


def _read(folder: Path, config: HybridConfig) -> tuple[dict[str, Tensor], torch.dtype]:
    """The checkpoint's tensors by our names, and the one dtype they have."""
    found = _headers(folder)
    shapes = {name: shape for name, (_, shape, _) in found.items()}
    again = config.tie_word_embeddings and shapes.pop(HEAD, None) is not None
    ours = _compare(folder, shapes, config)
    kinds = sorted({kind for _, _, kind in found.values()})
    if len(kinds) > 1 or kinds[0] not in DTYPES:
        raise UserError(f"{folder} has weights of type {', '.join(kinds)}; one of {', '.join(DTYPES)} can be read")
    tensors: dict[str, Tensor] = {}
    for file in sorted({file for file, _, _ in found.values()}):
        with safe_open(file, "pt") as opened:
            tensors |= {name: opened.get_tensor(name) for name in opened.keys()}  # noqa: SIM118 - no dict
    if again and not torch.equal(tensors.pop(HEAD), tensors[EMBEDDING]):
        raise UserError(f"{folder} has a {HEAD} of its own, but its config says tie_word_embeddings; set that to false")
    return {ours[name]: tensor for name, tensor in tensors.items()}, DTYPES[kinds[0]]


def _headers(folder: Path) -> dict[str, tuple[Path, tuple[int, ...], str]]:
    """File, shape and type of each tensor, without its numbers."""
    found: dict[str, tuple[Path, tuple[int, ...], str]] = {}
    for file in weight_files(folder):
        with safe_open(file, "pt") as opened:
            for name in opened.keys():  # noqa: SIM118 - no dict
                if name in found:
                    raise UserError(f"{folder} has {name} in both {found[name][0].name} and {file.name}; remove one")
                part = opened.get_slice(name)
                found[name] = (file, tuple(part.get_shape()), part.get_dtype())
    return found


def _write(tensors: dict[str, Tensor], folder: Path, shard_bytes: int) -> None:
    """One file, or several with an index when they are larger than `shard_bytes` together."""
    split = split_torch_state_dict_into_shards(
        tensors, filename_pattern="model{suffix}.safetensors", max_shard_size=shard_bytes
    )
    for file, names in split.filename_to_tensors.items():
        shard = {name: tensors[name].detach().cpu().contiguous() for name in names}
        save_file(shard, folder / file, metadata={"format": "pt"})
    if split.is_sharded:
        index = {"metadata": split.metadata, "weight_map": split.tensor_to_filename}
        write_json(folder / "model.safetensors.index.json", index)
