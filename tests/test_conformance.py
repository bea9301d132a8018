"""The conformance suite can fail: for every law a mixer with one planted fault, which that law catches."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from halobench.errors import UserError
from halobench.mixers.conformance import LAWS, BrokenLawError, check_law, check_mixer
from halobench.mixers.lightning import LightningMixer
from halobench.mixers.linear import Recurred


class OtherNumbersInChunks(LightningMixer):
    """One form of the recurrence is slightly off."""

    def recur(self, *arguments: Any) -> Recurred:
        found = super().recur(*arguments)
        return found._replace(o_BTHV=found.o_BTHV + (1e-5 if self.used_backend == "torch" else 0))


class ForgetsInDecoding(LightningMixer):
    """A single token is answered from an empty state."""

    def recur(self, q: Tensor, k: Tensor, v: Tensor, gates: Tensor, real: Any, state: Any) -> Recurred:
        return super().recur(q, k, v, gates, real, None if q.shape[1] == 1 else state)


class ForgetsAtCuts(LightningMixer):
    """A state given to more than one token is ignored."""

    def recur(self, q: Tensor, k: Tensor, v: Tensor, gates: Tensor, real: Any, state: Any) -> Recurred:
        return super().recur(q, k, v, gates, real, None if q.shape[1] > 1 else state)


class DecaysOverPadding(LightningMixer):
    """Padded tokens let the state decay."""

    def recur(self, q: Tensor, k: Tensor, v: Tensor, gates: Tensor, real: Any, state: Any) -> Recurred:
        return super().recur(q, k, v, gates, None, state)


class LooksAtNeighbours(LightningMixer):
    """Outputs are divided by the largest of the whole batch."""

    def recur(self, *arguments: Any) -> Recurred:
        found = super().recur(*arguments)
        return found._replace(o_BTHV=found.o_BTHV / found.o_BTHV.abs().max())


class KeepsItsOwnState(LightningMixer):
    """The state lives in the module, where no cache can reorder it."""

    def recur(self, q: Tensor, k: Tensor, v: Tensor, gates: Tensor, real: Any, state: Any) -> Recurred:
        own = getattr(self, "own", None)
        use = own if state is not None and own is not None and own.shape == state.shape else state
        found = super().recur(q, k, v, gates, real, use)
        self.own = found.state_BHKV
        return found


class CutsTheGradient(LightningMixer):
    """Keys are taken out of the graph."""

    def recur(self, q: Tensor, k: Tensor, *arguments: Any) -> Recurred:
        return super().recur(q, k.detach(), *arguments)


class SumsInTheModelsDtype(LightningMixer):
    """A running sum is held in bf16."""

    def recur(self, q: Tensor, k: Tensor, v: Tensor, gates: Tensor, real: Any, state: Any) -> Recurred:
        found, total, sums = super().recur(q, k, v, gates, real, state), torch.zeros_like(v[:, 0]), []
        for t in range(v.shape[1]):
            total = total + v[:, t] + 1
            sums.append(total)
        return found._replace(o_BTHV=found.o_BTHV + torch.stack(sums, dim=1))


class LosesItsBuffer(LightningMixer):
    """Decays stand in a buffer that is not saved."""

    def __init__(self, view: Any, options: Any) -> None:
        super().__init__(view, options)
        slopes = torch.tensor(super().log_decays(), device=view.q_weight.device)
        self.register_buffer("slopes", slopes, persistent=False)

    def _constant(self, like: Tensor) -> Tensor:
        return self.slopes


class SaysTooLittle(LightningMixer):
    """Declares half of its state."""

    def state_bytes(self, batch: int, length: int, bytes_per_element: int = 2) -> int:
        return super().state_bytes(batch, length, bytes_per_element) // 2


class SharesWithTheTeacher(LightningMixer):
    """Takes the teacher's own tensor."""

    def build_gates(self, view: Any) -> None:
        self.q_proj.weight = nn.Parameter(view.q_weight)


class StartsTooLoud(LightningMixer):
    """The output starts a hundred times too large."""

    def build_gates(self, view: Any) -> None:
        with torch.no_grad():
            self.o_norm.weight.mul_(100)


FAULTS = {
    "forms agree": OtherNumbersInChunks,
    "token by token": ForgetsInDecoding,
    "any cut": ForgetsAtCuts,
    "padding": DecaysOverPadding,
    "neighbours": LooksAtNeighbours,
    "reordering": KeepsItsOwnState,
    "gradients": CutsTheGradient,
    "bfloat16": SumsInTheModelsDtype,
    "save and load": LosesItsBuffer,
    "state size": SaysTooLittle,
    "copies": SharesWithTheTeacher,
    "start": StartsTooLoud,
}


def test_every_law_has_a_planted_fault() -> None:
    assert list(FAULTS) == list(LAWS)


@pytest.mark.parametrize("law", LAWS)
def test_a_planted_fault_breaks_its_law(law) -> None:
    check_law(law, LightningMixer)
    with pytest.raises(BrokenLawError, match=f"lightning breaks the law '{law}'"):
        check_law(law, FAULTS[law])


@pytest.mark.parametrize("fault", FAULTS.values())
def test_the_whole_suite_catches_every_fault(fault) -> None:
    with pytest.raises(BrokenLawError):
        check_mixer(fault)


def test_an_unknown_law_is_named() -> None:
    with pytest.raises(UserError, match="did you mean 'padding'"):
        check_law("paddings", LightningMixer)
