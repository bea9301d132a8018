"""Scores and their bootstrap, read from evidence the way every selector reads them."""

from __future__ import annotations

from dataclasses import replace

import numpy as np

from halobench.errors import UserError
from halobench.surgery.selection.evidence import Evidence, Part
from halobench.surgery.selection.uncertainty import RESAMPLES


def layer_scores(evidence: Evidence, part: Part, tasks: list[str], metric: str | None, what: str) -> np.ndarray:
    """Mean over `tasks` of `metric` with layer i changed, (layers,); `what` names the tasks in an error."""
    if not tasks:
        raise UserError(f"these scores name no {what} tasks; write them in `{what}_tasks`")
    return evidence.scores(part, tasks, metric)


def drawn(
    evidence: Evidence, part: Part, tasks: list[str], metric: str | None, seed: int, *, with_base: bool = False
) -> tuple[np.ndarray, np.ndarray] | None:
    """Bootstrap of the layers' scores, (RESAMPLES, layers), and of the base model's, (RESAMPLES,).

    None where there is nothing to resample: fewer than two samples of a task, or not as many of one layer as of
    another. The base counts only where the score is a difference to it (`with_base`); its column is 0 otherwise.
    """
    layers = getattr(evidence, part)[0].samples or {}
    base = (evidence.original_samples if part == "replaced" else evidence.linear_samples) or {}
    for task in tasks:
        name = metric if metric is not None else next(iter(layers.get(task, {})), "")
        size = len(layers.get(task, {}).get(name, []))
        if size < 2 or (with_base and len(base.get(task, {}).get(name, [])) != size):
            return None
    if not with_base:
        evidence = replace(evidence, original_samples=None, linear_samples=None)
    return evidence.resamples(part, tasks, metric, RESAMPLES, seed)
