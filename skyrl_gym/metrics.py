"""Aggregation of the metrics of single episodes to those of a batch."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from skyrl_gym.core import load_entry_point
from skyrl_gym.envs.registration import spec
from skyrl_gym.episode_metrics import INVALID_ACTIONS, default_aggregate_metrics
from skyrl_gym.error import Error

__all__ = ["INVALID_ACTIONS", "aggregate_for_environment", "default_aggregate_metrics"]


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
