"""How many softmax layers a memory budget allows: `kv=4GB@128k` is four billion bytes of cache at 128K tokens."""

from __future__ import annotations

import re
from dataclasses import dataclass

from halobench.errors import UserError
from halobench.units import format_bytes, format_length, parse_bytes, parse_length

EXAMPLE = "write --budget kv=4GB@128k"


@dataclass(frozen=True, kw_only=True)
class Budget:
    """`size` bytes of cache for one sequence (batch 1, bf16) of `length` tokens; text: as it was given."""

    text: str
    size: int
    length: int


@dataclass(frozen=True, kw_only=True)
class Fit:
    """What fits into a budget. Layers may differ in size: the numbers hold for the k largest, so for any choice of k.

    keep: the most softmax layers whose keys and values fit together with the states of all other layers.
    keep_by_kv: the most whose keys and values fit when states are not counted.
    kv_bytes: keys and values of `keep` layers. total_bytes: the same with the states of the others.
    """

    budget: Budget
    layers: int
    keep: int
    keep_by_kv: int
    kv_bytes: int
    total_bytes: int

    def lines(self) -> list[str]:
        """The answer in words: the layers, then the bytes."""
        where = f"{format_bytes(self.budget.size)} at {format_length(self.budget.length)}"
        with_state = f"{format_bytes(self.total_bytes)} with the states of the other {self.layers - self.keep}"
        return [
            f"budget {self.budget.text}, {where}: {_layers(self.keep)} of {self.layers} fit; "
            f"by KV alone {self.keep_by_kv} would",
            f"  {_layers(self.keep)}: {format_bytes(self.kv_bytes)} of KV alone, {with_state}",
        ]


def _layers(count: int) -> str:
    return f"{count} softmax layer{'' if count == 1 else 's'}"


def parse_budget(text: str) -> Budget:
    """ "kv=4GB@128k" as a Budget; UserError for any other form."""
    match = re.fullmatch(r"\s*kv\s*=\s*([^@]+?)\s*@\s*([^@]+?)\s*", text, flags=re.IGNORECASE)
    if match is None:
        raise UserError(f"--budget {text!r} is not of the form kv=SIZE@LENGTH; {EXAMPLE}")
    try:
        return Budget(text=text.strip(), size=parse_bytes(match[1]), length=parse_length(match[2]))
    except UserError as error:
        raise UserError(f"--budget {text!r}: {error}; {EXAMPLE}") from error


def fit(budget: Budget, kv: list[int], states: list[int]) -> Fit:
    """The answer for layers of `kv` bytes each as softmax layers and `states` as recurrent ones, at that length.

    Raises:
        UserError: not one softmax layer fits, or all do and there is nothing to convert.
    """
    layers = len(kv)
    largest = sorted(kv, reverse=True)
    growth = sorted((k - s for k, s in zip(kv, states, strict=True)), reverse=True)
    alone = [sum(largest[:count]) for count in range(layers + 1)]
    whole = [sum(states) + sum(growth[:count]) for count in range(layers + 1)]
    keep = max((count for count in range(layers + 1) if whole[count] <= budget.size), default=0)
    given = f"--budget {budget.text} ({format_bytes(budget.size)} at {format_length(budget.length)})"
    if keep == 0:
        raise UserError(
            f"{given}: no softmax layer fits; one needs {format_bytes(alone[1])} of KV, {format_bytes(whole[1])} with "
            f"the states of the other {layers - 1} layers; give at least that or a shorter context"
        )
    if keep == layers:
        raise UserError(
            f"{given}: all {layers} layers fit as softmax attention ({format_bytes(alone[layers])}), so nothing needs "
            "converting; give a smaller budget or a longer context"
        )
    by_kv = max(count for count in range(layers + 1) if alone[count] <= budget.size)
    return Fit(budget=budget, layers=layers, keep=keep, keep_by_kv=by_kv, kv_bytes=alone[keep], total_bytes=whole[keep])
