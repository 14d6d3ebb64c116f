"""Aggregation of the metrics of single episodes to those of a batch."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from skyrl_gym.core import load_entry_point
from skyrl_gym.envs.registration import spec
from skyrl_gym.error import Error

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


def aggregate_for_environment(env_id: str, metrics: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Aggregate with `aggregate_metrics` of the environment registered under `env_id`, or with the default.

    ValueError if no environment has this id.
    """
    try:
        entry_point = spec(env_id).entry_point
    except Error as unknown:
        raise ValueError(f"metrics of unknown environment {env_id!r}: {unknown}") from unknown
    aggregate = getattr(load_entry_point(entry_point), "aggregate_metrics", default_aggregate_metrics)
    return aggregate(list(metrics))
