"""Short causal convolution, one filter per channel, that sees past padding and carries its last inputs over calls."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class ShortConvolution(nn.Module):
    """y_t = sum_i w_i x_{t - width + 1 + i}, channel by channel; starts as the identity, so that nothing changes yet.

    Args:
        channels: features of the input.
        width: tokens a filter spans, itself included.
        like: dtype and device of the weight.
    """

    def __init__(self, channels: int, width: int, like: Tensor) -> None:
        super().__init__()
        weight = torch.zeros(channels, width, dtype=like.dtype, device=like.device)
        weight[:, -1] = 1
        self.weight = nn.Parameter(weight)

    def forward(self, x_BTC: Tensor, past_BPC: Tensor | None, real_BT: Tensor | None) -> tuple[Tensor, Tensor]:
        """Returns the filtered input and the last width - 1 real inputs, to be given as `past_BPC` with the next ones.

        Args:
            past_BPC: what the last call returned; None at the start of the text, which counts as zeros.
            real_BT: True at real tokens; padded ones are stepped over. None when all are real.
        """
        kept = self.weight.shape[1] - 1
        history = previous_inputs(x_BTC, past_BPC, real_BT, kept)
        filtered = F.conv1d(history.x_BNC.transpose(1, 2), self.weight[:, None], groups=self.weight.shape[0])
        return history.place(filtered.transpose(1, 2)), history.last_BPC


class History:
    """New inputs behind the `kept` real ones before them, with padding moved out of the way.

    Attributes:
        x_BNC: (B, kept + T, C); entry i + kept belongs to the i-th new token once padding is moved to the front.
        last_BPC: the last `kept` real inputs, (B, kept, C).
    """

    def __init__(self, x_BNC: Tensor, kept: int, order_BN: Tensor | None) -> None:
        self.x_BNC = x_BNC
        self.kept = kept
        self.last_BPC = x_BNC[:, x_BNC.shape[1] - kept :]
        self._order_BN = order_BN

    def place(self, y_BTC: Tensor) -> Tensor:
        """Moves results, one for each entry from `kept` on, to the places of their tokens; padding gets whatever."""
        if self._order_BN is None:
            return y_BTC
        whole = torch.cat((y_BTC.new_zeros(y_BTC.shape[0], self.kept, y_BTC.shape[2]), y_BTC), dim=1)
        back_BN1 = self._order_BN.argsort(dim=1)[..., None].expand(-1, -1, y_BTC.shape[2])
        return whole.gather(1, back_BN1)[:, self.kept :]


def previous_inputs(x_BTC: Tensor, past_BPC: Tensor | None, real_BT: Tensor | None, kept: int) -> History:
    """Lines new inputs up behind the `kept` ones before them, for operators that look a few tokens back.

    Padding may stand on either side or between calls: within a row it is moved before everything real, by a stable
    sort, and `History.place` moves results back.
    """
    batch, _, channels = x_BTC.shape
    past = x_BTC.new_zeros(batch, kept, channels) if past_BPC is None else past_BPC
    x_BNC = torch.cat((past, x_BTC), dim=1)
    if real_BT is None:
        return History(x_BNC, kept, None)
    real_BN = torch.cat((real_BT.new_ones(batch, kept), real_BT), dim=1).bool()
    order_BN = real_BN.to(torch.uint8).argsort(dim=1, stable=True)
    x_BNC = x_BNC.masked_fill(~real_BN[..., None], 0)
    return History(x_BNC.gather(1, order_BN[..., None].expand(-1, -1, channels)), kept, order_BN)
