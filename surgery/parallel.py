"""Several processes that train together, by accelerate: who leads, whose sequences are whose, DDP and FSDP2.

`accelerate launch` or torchrun starts the processes and describes them in the environment; see docs/training.md.
"""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from copy import copy
from dataclasses import dataclass
from datetime import timedelta
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from halobench.errors import UserError

if TYPE_CHECKING:
    from accelerate import Accelerator

_SET_BY_LAUNCHERS = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")


@dataclass(frozen=True)
class Team:
    """This process's place among those that train together.

    sharded: weights, gradients and moments are split over the processes (FSDP2) rather than held whole by each (DDP).
    """

    rank: int = 0
    size: int = 1
    sharded: bool = False

    @staticmethod
    def join(device: torch.device | str = "cpu") -> Team:
        """Joins the processes that were started with this one, or stands alone; asking again changes nothing.

        Args:
            device: of the models: "cpu" makes a team on gloo, anything else one on the accelerator's own backend.
        """
        accelerator = make_accelerator(device)
        sharded = accelerator.num_processes > 1 and _wants_shards()
        return Team(accelerator.process_index, accelerator.num_processes, sharded)

    @property
    def leads(self) -> bool:
        """Whether this process writes files and speaks."""
        return self.rank == 0

    def share(self, count: int) -> range:
        """The places, among `count` sequences of a batch, that are this process's."""
        return range(self.rank, count, self.size)

    def passes(self, count: int, per_pass: int) -> int:
        """Forward passes every process makes for `count` sequences: as many as the one with the largest share needs."""
        return math.ceil(math.ceil(count / self.size) / per_pass)

    def wait(self) -> None:
        """Returns when every process has come here."""
        if self.size > 1:
            from accelerate import PartialState

            PartialState().wait_for_everyone()


def make_accelerator(device: torch.device | str, *, idle: bool = False, **settings: Any) -> Accelerator:
    """An Accelerator for models on `device`. The recipe decides the precision, not the launcher.

    accelerate keeps one state for the process; where that state belongs to another device it is made anew.

    Args:
        idle: parameters may take no part in a step, which DDP then has to look for.
        settings: more of Accelerator's own.
    """
    from accelerate import Accelerator, PartialState
    from accelerate.utils import DistributedDataParallelKwargs, InitProcessGroupKwargs

    kind = torch.device(device).type
    known = PartialState() if PartialState._shared_state else None
    if known is not None and known.num_processes == 1 and known.device.type != kind:
        leave()
    if _wants_shards():
        # transformers would load weights in the first process alone, and each needs the whole teacher.
        os.environ["FSDP_CPU_RAM_EFFICIENT_LOADING"] = "false"
    ddp = DistributedDataParallelKwargs(find_unused_parameters=idle)
    patience = InitProcessGroupKwargs(timeout=timedelta(days=1))  # one process tokenises or saves while others wait
    return Accelerator(mixed_precision="no", cpu=kind == "cpu", kwargs_handlers=[ddp, patience], **settings)


def leave() -> None:
    """Leaves the team and forgets that there was one; the next `Team.join` reads the environment again."""
    from accelerate.state import AcceleratorState

    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()
    AcceleratorState._reset_state(reset_partial_state=True)


@contextmanager
def membership(rank: int, size: int, port: int) -> Iterator[None]:
    """Makes this process number `rank` of `size` on this machine for the length of a block, and alone again after it.

    Args:
        port: a free TCP port, the same in every process.
    """
    before = {name: os.environ.get(name) for name in _SET_BY_LAUNCHERS}
    values = (rank, size, rank, size, "127.0.0.1", port)
    leave()
    os.environ.update({name: str(value) for name, value in zip(_SET_BY_LAUNCHERS, values, strict=True)})
    try:
        yield
    finally:
        leave()
        for name, value in before.items():
            os.environ.pop(name, None)
            if value is not None:
                os.environ[name] = value


def _wants_shards() -> bool:
    """Whether the launcher asked for FSDP (`accelerate launch --use_fsdp --fsdp_version 2`)."""
    if os.environ.get("ACCELERATE_USE_FSDP", "false").lower() != "true":
        return False
    if os.environ.get("FSDP_VERSION", "1") != "2":
        raise UserError("FSDP version 1 was asked for, and halobench shards by version 2: pass --fsdp_version 2")
    return True


def wrap(module: nn.Module, accelerator: Accelerator, team: Team) -> tuple[nn.Module, Callable[[], None]]:
    """`module` made ready to train in the team: left as it is, behind DDP, or sharded in place by FSDP2.

    FSDP2 is called here and not through accelerate, whose own path needs a GPU: each layer is a unit that is gathered
    when it runs, and the rest (embeddings, last norm, unembedding) is gathered for the whole pass.

    Returns:
        (the module to call, a function that every process calls at the end, after which `module` holds whole tensors
        and can be run and saved by each process alone; torch does not let it be sharded a second time).
    """
    if not team.sharded:
        return accelerator.prepare_model(module, device_placement=False), lambda: None
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    before = [(part, type(part), _hooks(part)) for part in module.modules()]
    mesh = init_device_mesh(accelerator.device.type, (team.size,))
    for layer in _layers(module):
        fully_shard(layer, mesh=mesh)
    fully_shard(module, mesh=mesh, reshard_after_forward=False)

    def undo() -> None:
        _gather(module)
        for part, kind, hooks in before:
            part.__class__ = kind
            vars(part).update(hooks)

    return module, undo


def _layers(module: nn.Module) -> list[nn.Module]:
    """The members of the outermost lists of modules: the layers of a decoder, or one mixer a layer."""
    if isinstance(module, nn.ModuleList | nn.ModuleDict):
        return list(module.values() if isinstance(module, nn.ModuleDict) else module)
    return [layer for child in module.children() for layer in _layers(child)]


def _hooks(module: nn.Module) -> dict[str, Any]:
    """Copies of a module's tables of hooks, by attribute."""
    return {name: copy(value) for name, value in vars(module).items() if "_hooks" in name and isinstance(value, dict)}


def _gather(module: nn.Module) -> None:
    """Puts whole parameters in place of sharded ones; tied ones stay tied."""
    from torch.distributed.fsdp import FSDPModule

    for part in module.modules():
        if isinstance(part, FSDPModule):
            part.reshard()
    gathered: dict[int, nn.Parameter] = {}
    for part in module.modules():
        for name, p in part.named_parameters(recurse=False, remove_duplicate=False):
            if id(p) not in gathered:
                gathered[id(p)] = nn.Parameter(whole(p.detach()), requires_grad=p.requires_grad)
            setattr(part, name, gathered[id(p)])


def agree(team: Team, value: Any) -> list[Any]:
    """What every process gave, in the order of their ranks; values must be picklable."""
    if team.size == 1:
        return [value]
    from accelerate.utils import gather_object

    return gather_object([value])


def local(tensor: Tensor) -> Tensor:
    """The part of a tensor that this process holds; shares memory with it."""
    return tensor.to_local() if hasattr(tensor, "to_local") else tensor


def whole(tensor: Tensor) -> Tensor:
    """The whole of a tensor, gathered from all processes (which must all ask) when it is sharded."""
    return tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor


def fill(target: Tensor, source: Tensor) -> None:
    """Copies the whole tensor `source` into `target`, which may be sharded; every process must call with the same."""
    target.copy_(like(target, source))


def like(target: Tensor, source: Tensor) -> Tensor:
    """`source`, a whole tensor, on the device of `target` and sharded as `target` is."""
    from torch.distributed.tensor import DTensor, distribute_tensor

    moved = source.to(target.device)
    return distribute_tensor(moved, target.device_mesh, target.placements) if isinstance(target, DTensor) else moved
