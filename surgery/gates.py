"""What a stage must pass: before it trains, in its first steps, at any step, and after.

Before: the student with nothing replaced is the teacher, bit for bit; what trains is written down; the first loss is
plausible. In the first steps: gradients reach what trains, all of it and nothing else. At any step: numbers are finite,
or the place where they stopped being so is named. After: the loss fell.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from halobench.errors import HalobenchError, UserError, some
from halobench.progress import say
from halobench.surgery.parallel import local

REACH_WARNING, REACH_LIMIT = 5, 20  # steps after which a tensor without a gradient is told, and stops the run
MARGIN = 5.0  # nats above the uniform distribution's loss that a first step may have

Named = Sequence[tuple[str, nn.Parameter]]


def trained(module: nn.Module) -> list[tuple[str, nn.Parameter]]:
    """The parameters of a module that train, by name; a tied one once."""
    return [(name, p) for name, p in module.named_parameters() if p.requires_grad]


def inventory(named: Named) -> list[dict[str, Any]]:
    """What trains, by kind: the name with numbers as *, how many tensors, their shape, and their parameters in all."""
    kinds: dict[tuple[str, tuple[int, ...]], int] = {}
    for name, p in named:
        key = (re.sub(r"(?<![^.])\d+(?![^.])", "*", name), tuple(p.shape))
        kinds[key] = kinds.get(key, 0) + 1
    return [
        {"name": name, "tensors": count, "shape": list(shape), "parameters": count * math.prod(shape)}
        for (name, shape), count in kinds.items()
    ]


def table(rows: list[dict[str, Any]]) -> str:
    """An inventory as lines of text."""
    shown = [
        (row["name"], f"{row['tensors']} x {'x'.join(map(str, row['shape'])) or '1'}", f"{row['parameters']:,}")
        for row in rows
    ]
    widths = [max((len(row[column]) for row in shown), default=0) for column in range(3)]
    return "\n".join(f"  {name:<{widths[0]}}  {size:<{widths[1]}}  {count:>{widths[2]}}" for name, size, count in shown)


def check_identity(teacher: Any, tokens_BT: Tensor) -> None:
    """Raises HalobenchError unless the student that replaces nothing gives the teacher's logits, bit for bit.

    Raises UserError when the teacher's logits are no numbers, or are not those that losses would make of its hidden
    states.
    """
    from halobench.surgery import SurgeryPlan, transplant
    from halobench.surgery.heads import check_head

    with torch.no_grad():
        wanted = teacher.to(tokens_BT.device).eval()(input_ids=tokens_BT).logits
    if wanted.isnan().any():
        raise UserError(
            "the teacher's logits of ordinary text are not numbers (NaN): its weights are damaged, or overflow in "
            f"{str(wanted.dtype).removeprefix('torch.')}; give another checkpoint"
        )
    check_head(teacher)
    student: Any = transplant(teacher, SurgeryPlan.for_model(teacher, keep="all"))
    with torch.no_grad():
        got = student.to(tokens_BT.device).eval()(input_ids=tokens_BT).logits
    if not torch.equal(wanted, got):
        raise HalobenchError(
            f"identity: the student with nothing replaced differs from the teacher by up to "
            f"{float((wanted - got).abs().max()):.3g} in its logits; this family is not read rightly, so nothing "
            "trained from here would mean anything"
        )


def check_start(name: str, loss: float, ceiling: float | None) -> None:
    """Raises HalobenchError when the loss of the first step (nats a token) is above what any sound start gives."""
    if ceiling is not None and loss > ceiling + MARGIN:
        raise HalobenchError(
            f"{name}: the first step's loss is {loss:.3f}, and a student that knew nothing would have {ceiling:.3f}: "
            "the weights it starts from do not belong together; check the teacher, the tokenizer and the stage before"
        )


def loss_fell(losses: Sequence[float]) -> bool:
    """Whether the mean loss of the last fifth of the steps is below that of the first fifth."""
    part = max(1, len(losses) // 5)
    return sum(losses[-part:]) < sum(losses[:part])


class Reach:
    """Whether gradients reach what trains: followed over the first steps, since a zero elsewhere may hold one up.

    Args:
        name: of the stage.
        waiting: names of the trained tensors that no gradient has reached yet.
        speaks: whether this process warns; of several one does.
    """

    def __init__(self, name: str, waiting: Sequence[str], *, speaks: bool = True) -> None:
        self.name, self.waiting, self.speaks = name, list(waiting), speaks

    def note(self, norms: dict[str, float], step: int, last: bool) -> None:
        """Takes the gradient norms of step number `step` (from 1); raises HalobenchError when it has been too long.

        A step without any gradient says nothing: a student that is its teacher has nothing to learn.
        """
        if not self.waiting or not any(norms.values()):
            return
        self.waiting = [name for name in self.waiting if not norms.get(name)]
        if not self.waiting:
            return
        if step >= REACH_LIMIT or (last and step >= REACH_WARNING):
            raise HalobenchError(
                f"{self.name}: after {step} steps no gradient has reached {some(self.waiting)}, which should train; "
                "freeze what the loss does not use (requires_grad_(False)), or repair the path to it"
            )
        if self.speaks and (step == REACH_WARNING or last):
            say(f"{self.name}: no gradient has reached {some(self.waiting)} in {step} steps")


def check_frozen(name: str, module: nn.Module, frozen: Sequence[nn.Module]) -> None:
    """Raises HalobenchError when a tensor that does not train was given a gradient."""
    held = [(n, p) for n, p in module.named_parameters() if not p.requires_grad]
    for index, part in enumerate(frozen):
        held += [(f"frozen model {index}: {n}", p) for n, p in part.named_parameters()]
    touched = [n for n, p in held if p.grad is not None]
    if touched:
        raise HalobenchError(f"{name}: gradients came to {some(touched)}, which must not train; detach it in the loss")


def find_nonfinite(module: nn.Module, frozen: Sequence[nn.Module], passes: Callable[[], None]) -> str | None:
    """Runs `passes` (forward and backward) again and says where numbers first stop being finite, or None.

    The first module in the order of the forward passes whose output is not finite, with its own parameter that is not;
    else the first parameter, in the order of the backward passes, whose gradient is not.
    """
    places: list[str] = []
    with _watching(module, frozen, places):
        passes()
    if not places:  # sharded gradients arrive unseen
        places += [f"the gradient of {n}" for n, p in reversed(trained(module)) if _broken(p.grad)]
    return places[0] if places else None


@contextmanager
def _watching(module: nn.Module, frozen: Sequence[nn.Module], places: list[str]) -> Iterator[None]:
    handles = []

    def after_forward(name: str) -> Callable[..., None]:
        def look(part: nn.Module, inputs: Any, output: Any) -> None:
            if not places and any(_broken(t) for t in _tensors(output)):
                bad = [n for n, p in part.named_parameters(recurse=False) if _broken(p)]
                places.append(f"the output of {name}" + (f", whose {bad[0]} is not finite" if bad else ""))

        return look

    def after_gradient(name: str) -> Callable[[Tensor], None]:
        def look(parameter: Tensor) -> None:
            if not places and _broken(parameter.grad):
                places.append(f"the gradient of {name}")

        return look

    for prefix, part in [("", module), *(("teacher ", other) for other in frozen)]:
        for name, child in part.named_modules():
            handles.append(child.register_forward_hook(after_forward(prefix + (name or type(child).__name__))))
    for name, parameter in trained(module):
        handles.append(parameter.register_post_accumulate_grad_hook(after_gradient(name)))
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _broken(tensor: Tensor | None) -> bool:
    return tensor is not None and tensor.is_floating_point() and not bool(torch.isfinite(local(tensor)).all())


def _tensors(value: Any) -> Iterator[Tensor]:
    """The tensors in a module's output, however it is nested."""
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, dict):
        for item in value.values():
            yield from _tensors(item)
    elif isinstance(value, list | tuple):
        for item in value:
            yield from _tensors(item)
