"""The metrics of single episodes: the shared key of unreadable actions, and the mean over episodes."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

INVALID_ACTIONS = "invalid_actions"  # the key under which `get_metrics` counts the actions that could not be read


def default_aggregate_metrics(metrics: Sequence[dict[str, Any]]) -> dict[str, float]:
    """Return the mean of each numeric or bool key over the episodes that have it; other values are dropped.

    [{"won": True, "steps": 2}, {"won": False}] -> {"won": 0.5, "steps": 2.0}
    """
    values: dict[str, list[float]] = {}
    for episode in metrics:
        for key, value in episode.items():
            if isinstance(value, int | float):
                values.setdefault(key, []).append(float(value))
    return {key: sum(numbers) / len(numbers) for key, numbers in values.items()}
