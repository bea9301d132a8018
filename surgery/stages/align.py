"""Stage 1, hidden-state alignment: the RNN mixer of each layer learns its attention's output.

Layers do not see one another's errors: each mixer gets the teacher's own hidden state, and what goes on is the
teacher's output.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from halobench.mixers.contract import Mixer, MixerContext
from halobench.surgery.anatomy import attention_modules, watch_attention


class Alignment:
    """Objective: mean squared error between each mixer's output and its attention's (HALO, stage 1).

    Args:
        teacher: frozen.
        mixers: the mixer of each layer, all of which train.
        relative: divide each layer's error by the mean square of the teacher's output there, so that layers with large
            outputs do not drown the others; False is the paper's plain form.
    """

    name = "align"

    def __init__(self, teacher: Any, mixers: dict[int, Mixer], relative: bool) -> None:
        self.teacher, self.mixers, self.relative = teacher, mixers, relative
        self.layer_errors: dict[int, float] = {}

    def parameters(self) -> list[tuple[str, nn.Parameter]]:
        """Every parameter of every mixer, named layer first."""
        return [(f"{i}.{n}", p) for i, m in self.mixers.items() for n, p in m.named_parameters() if p.requires_grad]

    def embeddings(self) -> frozenset[int]:
        """None: mixers hold no tables."""
        return frozenset()

    def loss(self, tokens_BT: Tensor, weights_BT: Tensor) -> tuple[Tensor, Tensor]:
        """Sum over tokens of the mean over layers of the squared error per channel, and the number of tokens."""
        inputs = tokens_BT[:, :-1]
        modules = attention_modules(self.teacher)
        seen = watch_attention(self.teacher, inputs, None, {layer: modules[layer] for layer in self.mixers})
        total = torch.zeros((), device=inputs.device)
        context = MixerContext.plain(inputs.shape[1], inputs.device)
        for layer, (hidden, tables, target, *_) in seen.items():
            output = self.mixers[layer](hidden, position_embeddings=tables, context=context)
            error = (output.float() - target.float()).square().mean()
            scale = target.float().square().mean().clamp_min(1e-12)
            self.layer_errors[layer] = float(error.detach() / scale)
            total = total + (error / scale if self.relative else error)
        count = torch.tensor(float(inputs.numel()), device=inputs.device)
        return total / len(seen) * count, count
