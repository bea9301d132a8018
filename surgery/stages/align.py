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
from halobench.surgery.objective import Objective


class Alignment(Objective):
    """Objective: mean squared error between each mixer's output and its attention's (HALO, stage 1).

    Args:
        teacher: frozen.
        mixers: the mixer of each layer, all of which train.
        relative: divide each layer's error by the mean square of the teacher's output there, sequence by sequence, so
            that layers with large outputs do not drown the others; False is the paper's plain form.
    """

    name = "align"

    def __init__(self, teacher: Any, mixers: dict[int, Mixer], relative: bool) -> None:
        self.teacher, self.mixers, self.relative = teacher, mixers, relative
        self.module = nn.ModuleDict({str(layer): mixer for layer, mixer in mixers.items()})
        self.frozen = (teacher,)
        self._errors: dict[int, Tensor] = {}

    @property
    def layer_errors(self) -> dict[int, float]:
        """Each layer's squared error on the last micro-batch, as a share of the teacher's output there."""
        return {layer: float(error) for layer, error in self._errors.items()}

    def loss(self, tokens_BT: Tensor, weights_BT: Tensor) -> tuple[Tensor, Tensor]:
        """Sum over tokens of the mean over layers of the squared error per channel, and the number of tokens."""
        inputs = tokens_BT[:, :-1]
        modules = attention_modules(self.teacher)
        with torch.no_grad():
            seen = watch_attention(self.teacher, inputs, None, {layer: modules[layer] for layer in self.mixers})
        total = torch.zeros((), device=inputs.device)
        context = MixerContext.plain(inputs.shape[1], inputs.device)
        for layer, (hidden, tables, target, *_) in seen.items():
            mixer = self.mixers[layer]
            # A teacher may hold bf16 where mixers train in fp32; under autocast that is autocast's business.
            given = hidden if torch.is_autocast_enabled(hidden.device.type) else hidden.to(_dtype(mixer))
            output = mixer(given, position_embeddings=tables, context=context)
            error_B = (output.float() - target.float()).square().mean((1, 2))
            share_B = error_B / target.float().square().mean((1, 2)).clamp_min(1e-12)
            self._errors[layer] = share_B.detach().mean()
            total = total + (share_B if self.relative else error_B).sum()
        length = inputs.shape[1]
        return total / len(seen) * length, torch.tensor(float(inputs.numel()), device=inputs.device)


def _dtype(module: nn.Module) -> torch.dtype:
    return next(module.parameters()).dtype
