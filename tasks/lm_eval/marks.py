"""What `tiny_continuation.yaml` needs from Python: its items and its three marks."""

from __future__ import annotations

from dataclasses import asdict
from typing import Any

from halobench.tasks.continuation import judge, load_items


def dataset(seed: int = 0, **_: Any) -> dict[str, Any]:
    """The items as the only split; lm-eval passes the run's metadata."""
    from datasets import Dataset

    return {"test": Dataset.from_list([asdict(item) for item in load_items(seed=seed)])}


def process_results(doc: dict[str, Any], results: list[tuple[float, bool]]) -> dict[str, float]:
    """acc, acc_norm and margin of one item from the log-likelihoods of its choices."""
    return judge([logprob for logprob, _ in results], doc["choices"], doc["label"])
