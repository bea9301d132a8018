"""Models and sets of mixers on disk: safetensors and JSON only, written whole or not at all, read with clear errors."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from huggingface_hub.errors import StrictDataclassError
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    PretrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

from halobench.config import to_dict
from halobench.errors import HalobenchError, UserError, reason_of, some
from halobench.files import atomic_path, read_json, write_json
from halobench.mixers import MIXERS
from halobench.mixers.contract import Mixer, build_mixer
from halobench.surgery.anatomy import honour_caps, read_attention
from halobench.surgery.hybrid import HybridConfig  # registers the hybrid with the Auto classes

MIXERS_FORMAT = 1
# What transformers raises for a configuration that is damaged or says what cannot be.
BAD_CONFIG = (
    OSError, ValueError, KeyError, TypeError, AttributeError, IndexError, ArithmeticError, StrictDataclassError,
)  # fmt: skip


def save_model(directory: Path, model: PreTrainedModel, tokenizer: Any | None = None) -> None:
    """Writes the model (and its tokenizer) as a folder that `load_model` and from_pretrained read.

    A model that is there already is replaced, once the new one is complete. A folder with anything else is refused.
    """
    directory = Path(directory)
    _check_replaceable(directory, "config.json")
    with atomic_path(directory) as temporary:
        model.save_pretrained(temporary)
        if tokenizer is not None:
            tokenizer.save_pretrained(temporary)


def _check_replaceable(directory: Path, marker: str) -> None:
    """Refuses a place that holds something else than what is to be replaced, known by the file `marker`."""
    if directory.exists() and not directory.is_dir():
        raise UserError(f"{directory} is a file; name a folder")
    if directory.is_dir() and any(directory.iterdir()) and not (directory / marker).is_file():
        raise UserError(
            f"{directory} holds files but no {marker}; choose a new folder, for saving replaces it as a whole"
        )


def load_model(
    path: str | Path, dtype: torch.dtype | str | None = None, device: torch.device | str | None = None
) -> PreTrainedModel:
    """A hybrid or any Hugging Face decoder, in evaluation mode.

    Args:
        path: a folder, or a hub name such as "Qwen/Qwen3-0.6B".
        dtype: of the weights; as saved by default.
        device: where to put it; the CPU by default.

    Raises:
        UserError: what is wrong with the checkpoint, in one line. No pickle is opened and no remote code is run.
    """
    folder = Path(path)
    if folder.exists():
        _check_folder(folder)
    elif folder.is_absolute() or str(path).count("/") > 1 or str(path).startswith("."):
        raise UserError(f"{path} does not exist; give a model folder, or a hub name such as Qwen/Qwen3-0.6B")
    try:
        loaded: Any = AutoModelForCausalLM.from_pretrained(
            str(path),
            dtype="auto" if dtype is None else dtype,
            use_safetensors=True,
            trust_remote_code=False,
            ignore_mismatched_sizes=True,  # told below, all at once
            output_loading_info=True,
        )
    except UserError:
        raise
    except (*BAD_CONFIG, ImportError, RuntimeError, SafetensorError) as error:
        what = "cannot be loaded" if folder.exists() else "is neither a folder here nor a model the hub will give"
        raise UserError(f"{path} {what}: {reason_of(error)}") from error
    model, report = loaded
    check_report(path, report)
    honour_caps(model)
    return model.to(device).eval() if device is not None else model.eval()


def load_tokenizer(path: str | Path) -> PreTrainedTokenizerBase:
    """The tokenizer beside a model; UserError when there is none."""
    try:
        tokenizer = AutoTokenizer.from_pretrained(str(path), trust_remote_code=False)
    except (OSError, ValueError, KeyError, TypeError, AttributeError, ImportError) as error:
        raise UserError(
            f"{path} has no tokenizer that can be loaded; put the teacher's tokenizer files there"
        ) from error
    if len(tokenizer) <= len(tokenizer.all_special_tokens):  # made of nothing, by the name of the model's family
        raise UserError(f"{path} has no tokenizer; put the teacher's tokenizer files there")
    return tokenizer


def load_config(path: str | Path) -> PretrainedConfig:
    """The configuration in a JSON file, a model folder or a hub name, without weights."""
    if Path(path).is_dir():
        _check_json(Path(path))
    try:
        return AutoConfig.from_pretrained(str(path), trust_remote_code=False)
    except BAD_CONFIG as error:
        raise UserError(f"{path} holds no configuration of a model: {reason_of(error)}") from error


def _check_folder(folder: Path) -> None:
    """What can be told before anything is loaded."""
    _check_json(folder)
    weight_files(folder)


def _check_json(folder: Path) -> None:
    """The configuration is there, is JSON, and is of a known kind."""
    config = model_json(folder)
    kind = config.get("model_type")
    if kind != HybridConfig.model_type and kind not in CONFIG_MAPPING:
        if kind in ("hypenet", "hybrid") and "mixer_types" in config:
            raise UserError(f"{folder} is a released HypeNet; `halobench import {folder} -o OUT` makes it one of ours")
        if "auto_map" in config:
            raise UserError(f"{folder} needs code of its own (model_type {kind!r}, auto_map); halobench runs none")
        raise UserError(f"{folder} has model_type {kind!r}, which this transformers does not know")


def model_json(folder: Path) -> dict[str, Any]:
    """The config.json of a model folder, of whatever kind; UserError when there is none that can be read."""
    if not folder.is_dir():
        what = "is a file" if folder.exists() else "does not exist"
        raise UserError(f"{folder} {what}; give the folder that holds config.json and the weights")
    path = folder / "config.json"
    if not path.is_file():
        raise UserError(f"{folder} has no config.json; it is not a model folder")
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise UserError(f"{path} is not valid JSON ({error}); it may be damaged or half-written") from error
    if not isinstance(config, dict):
        raise UserError(f"{path} holds a {type(config).__name__} in place of fields; it is no model's config")
    return config


def weight_files(folder: Path) -> list[Path]:
    """The safetensors of a model folder, each of which can be opened; pickles are never read."""
    files = _named_files(folder)
    for file in files:
        try:
            with safe_open(file, "pt"):
                pass
        except (SafetensorError, OSError) as error:
            raise UserError(f"{file} is damaged or cut short ({error}); copy or download it again") from error
    return files


def _named_files(folder: Path) -> list[Path]:
    index = folder / "model.safetensors.index.json"
    if index.is_file():
        try:
            names = sorted(set(read_json(index)["weight_map"].values()))
        except (HalobenchError, KeyError, TypeError, AttributeError) as error:
            raise UserError(f"{index} is damaged: it names no weight files; copy or download it again") from error
        missing = [name for name in names if not (folder / name).is_file()]
        if missing:
            raise UserError(f"{folder} lacks the weight files {some(missing)}, which its index names")
        return [folder / name for name in names]
    if (folder / "model.safetensors").is_file():
        return [folder / "model.safetensors"]
    pickles = [file.name for pattern in ("*.bin", "*.pt", "*.pth") for file in folder.glob(pattern)]
    if pickles:
        raise UserError(f"{folder} has its weights as pickle only ({some(pickles)}); convert them to safetensors")
    raise UserError(f"{folder} has no model.safetensors; it holds no weights")


def check_report(path: str | Path, report: dict[str, Any]) -> None:
    """Refuses a checkpoint whose tensors are not exactly the model's."""
    problems = []
    for key, word in (("missing_keys", "lacks"), ("unexpected_keys", "has beyond the model"), ("mismatched_keys", "")):
        entries = sorted(report.get(key, ()), key=str)
        if key == "mismatched_keys":
            shapes = [f"{name} is {tuple(got)}, expected {tuple(wanted)}" for name, got, wanted in entries]
            problems += [some(shapes)] if shapes else []
        elif entries:
            problems.append(f"{word} {len(entries)} tensors: {some(entries)}")
    if report.get("error_msgs"):
        problems.append(str(report["error_msgs"]).splitlines()[0])
    if problems:
        raise UserError(f"{path} does not fit its own config: {'; '.join(problems)}")


def save_mixers(directory: Path, mixers: Mapping[int, Mixer]) -> None:
    """Writes mixers apart from any model: mixers.safetensors, and mixers.json with each one's name and options."""
    if not mixers:
        raise UserError("there are no mixers to save")
    _check_replaceable(Path(directory), "mixers.json")
    tensors = {
        f"layers.{index}.{name}": tensor.detach().contiguous().cpu()
        for index, mixer in mixers.items()
        for name, tensor in mixer.state_dict().items()
    }
    layers = {str(i): {"mixer": mixer.name, "options": to_dict(mixer.options)} for i, mixer in sorted(mixers.items())}
    with atomic_path(Path(directory)) as temporary:
        temporary.mkdir()
        save_file(tensors, temporary / "mixers.safetensors", metadata={"format": "pt"})
        write_json(temporary / "mixers.json", {"format": MIXERS_FORMAT, "layers": layers})


def load_mixers(directory: Path, teacher: PreTrainedModel, dtype: torch.dtype | None = None) -> dict[int, Mixer]:
    """The mixers that `save_mixers` wrote, built for `teacher`: on its device, in its dtype or another.

    Raises:
        UserError: the files are missing or damaged, or the mixers were made for a model of another shape.
    """
    directory = Path(directory)
    if not (directory / "mixers.json").is_file():
        raise UserError(f"{directory} holds no mixers (no mixers.json); give the output of the align stage")
    described = read_json(directory / "mixers.json")
    if described.get("format") != MIXERS_FORMAT:
        raise UserError(f"{directory} has mixers of format {described.get('format')!r}, expected {MIXERS_FORMAT}")
    try:
        tensors = load_file(directory / "mixers.safetensors")
    except (SafetensorError, OSError) as error:
        raise UserError(f"{directory / 'mixers.safetensors'} is missing or damaged ({error})") from error
    views = read_attention(teacher)
    mixers = {}
    nameless = {name.split(".")[1] for name in tensors} - set(described["layers"])
    if nameless:
        raise UserError(f"{directory / 'mixers.json'} is damaged: it has no layer {', '.join(sorted(nameless))}")
    for key, layer in described["layers"].items():
        index = int(key)
        if index >= len(views):
            raise UserError(f"{directory} has a mixer for layer {index}; the teacher has {len(views)} layers")
        mixer = build_mixer(MIXERS.get(layer["mixer"]), views[index], layer["options"])
        mixer = mixer if dtype is None else mixer.to(dtype)
        prefix = f"layers.{index}."
        saved = {name.removeprefix(prefix): x for name, x in tensors.items() if name.startswith(prefix)}
        _fill(mixer, saved, f"{directory}, layer {index}")
        mixers[index] = mixer
    return mixers


def _fill(mixer: Mixer, saved: dict[str, torch.Tensor], where: str) -> None:
    """Loads exactly the mixer's tensors."""
    wanted = mixer.state_dict()
    report = {
        "missing_keys": sorted(wanted.keys() - saved.keys()),
        "unexpected_keys": sorted(saved.keys() - wanted.keys()),
        "mismatched_keys": [
            (name, saved[name].shape, tensor.shape)
            for name, tensor in wanted.items()
            if name in saved and saved[name].shape != tensor.shape
        ],
    }
    check_report(where, report)
    mixer.load_state_dict(saved)
