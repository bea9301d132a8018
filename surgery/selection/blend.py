"""The teacher with both of a layer's token mixers in place, its attention and the aligned mixer.

What the selectors share that train something small on frozen aligned mixers: the two branches of a layer, the final
hidden states of the model between them, and a folder for what a selector has trained.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NoReturn

import torch
from torch import Tensor, nn

from halobench.errors import HalobenchError
from halobench.mixers.contract import Mixer
from halobench.surgery.anatomy import attention_modules, decoder_layers
from halobench.surgery.batch import BatchFacts, read_batch
from halobench.surgery.hybrid import MixerAdapter
from halobench.surgery.loop import LoopConfig, Precision
from halobench.surgery.selection.contract import Workbench
from halobench.surgery.selection.sweep import weights_hash


class Branches(nn.Module):
    """y = a * attention(x) + (1 - a) * mixer(x), behind the call of a Hugging Face attention module.

    `share` is a: a scalar tensor runs both branches; the numbers 1.0 and 0.0 run one alone.
    """

    def __init__(self, attention: nn.Module, mixer: Mixer, share: Tensor | float = 1.0) -> None:
        super().__init__()
        self.attention, self.mixer = attention, MixerAdapter(mixer)
        self.share = share

    def forward(self, *args: Any, **kwargs: Any) -> tuple[Any, ...]:
        if not isinstance(self.share, Tensor):
            return (self.attention if self.share else self.mixer)(*args, **kwargs)
        softmax, *rest = self.attention(*args, **kwargs)
        linear = self.mixer(*args, **kwargs)[0]
        # In fp32: the gradient of a is a sum over softmax - linear, which bf16 would cancel to noise.
        return torch.lerp(linear.float(), softmax.float(), self.share).to(softmax.dtype), *rest


def branches_of(teacher: Any, mixers: Mapping[int, Mixer]) -> dict[int, Branches]:
    """Both branches of each layer that has a mixer; the teacher itself is left as it is."""
    attention = attention_modules(teacher)
    return {layer: Branches(attention[layer], mixer) for layer, mixer in sorted(mixers.items())}


def blended_hidden(teacher: Any, branches: Mapping[int, Branches], tokens_BT: Tensor) -> Tensor:
    """Hidden states (B, T, D) after the last norm of the teacher with `branches` in the place of its attention."""
    facts = BatchFacts(
        batch=tokens_BT.shape[0], tokens=tokens_BT.shape[1], device=tokens_BT.device,
        attention_mask=None, position_ids=None, cache=None,
    )  # fmt: skip
    with _in_place(teacher, branches):
        batch = read_batch(facts, kept=True, mixed=True)
        return teacher.get_decoder()(input_ids=tokens_BT, use_cache=False, **batch).last_hidden_state


@contextmanager
def _in_place(teacher: Any, branches: Mapping[int, Branches]) -> Iterator[None]:
    layers, name = decoder_layers(teacher)
    try:
        for layer, both in branches.items():
            setattr(layers[layer], name, both)
        yield
    finally:
        for layer, both in branches.items():
            setattr(layers[layer], name, both.attention)


def squared_distance(got_ND: Tensor, wanted_ND: Tensor, relative: bool) -> Tensor:
    """Sum over N of |got - wanted|^2 (a scalar, fp32).

    relative: in units of the mean of |wanted|^2, so that a weight of another term means the same for every model.
    """
    wanted_ND = wanted_ND.float()
    distance = (got_ND.float() - wanted_ND).square().sum()
    return distance / wanted_ND.square().sum(-1).mean().clamp_min(1e-12) if relative else distance


def check_finite(name: str, loss: Tensor, teacher: Any, branches: Mapping[int, Branches], tokens_BT: Tensor) -> None:
    """Raises HalobenchError that names the first layer whose output is not finite, if the loss is not."""
    if not math.isfinite(float(loss.detach())):
        _name_layer(name, float(loss.detach()), teacher, branches, tokens_BT)


@torch.no_grad()
def _name_layer(name: str, loss: float, teacher: Any, branches: Mapping[int, Branches], tokens_BT: Tensor) -> NoReturn:
    broken: list[int] = []

    def watch(layer: int) -> Any:
        def hook(module: nn.Module, args: Any, output: Any) -> None:
            if not bool(torch.isfinite(output[0]).all()):
                broken.append(layer)

        return hook

    handles = [both.register_forward_hook(watch(layer)) for layer, both in branches.items()]
    try:
        blended_hidden(teacher, branches, tokens_BT)
    finally:
        for handle in handles:
            handle.remove()
    where = f"first in the output of layer {broken[0]}" if broken else "though every layer mixes finite numbers"
    raise HalobenchError(
        f"{name}: numbers stopped being finite (loss {loss}), {where}; "
        "align its mixer anew at a lower rate, or lower the selector's rate"
    )


def precision(workbench: Workbench) -> Precision:
    """Of the loop's matrix products: bf16 where weights or device are made for it."""
    half = workbench.teacher.dtype in (torch.bfloat16, torch.float16)
    return "bf16" if half or torch.device(workbench.device).type == "cuda" else "fp32"


def trained_tokens(config: LoopConfig) -> int:
    """Tokens that the loop will have trained on: whole sequences, whole steps."""
    length = config.lengths[0]
    return config.steps() * (config.batch_tokens // length) * length


def own_folder(workbench: Workbench, name: str, options: Mapping[str, Any]) -> Path:
    """Where the selector `name` keeps what it trains, apart for other `options` of the training, mixers or seed."""
    whole = {"options": dict(options), "seed": workbench.seed, "mixers": weights_hash(workbench.mixers)}
    digest = hashlib.sha256(json.dumps(whole, sort_keys=True).encode()).hexdigest()[:12]
    return workbench.folder / f"{name}-{digest}"
