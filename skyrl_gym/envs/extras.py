"""Readers of dataset rows, shared by the built-in environments; their errors name the column."""

from __future__ import annotations

from collections.abc import Mapping
from decimal import Decimal
from typing import Any

from skyrl_gym.reply import number


def ground_truth(extras: Mapping[str, Any]) -> Any:
    """Return `reward_spec.ground_truth`, or `reward_model.ground_truth` in rows that use the older name."""
    for column in ("reward_spec", "reward_model"):
        spec = extras.get(column)
        if isinstance(spec, Mapping) and spec.get("ground_truth") is not None:
            return spec["ground_truth"]
    raise ValueError(f"the row needs reward_spec.ground_truth; it has the columns {sorted(map(str, extras))}")


def numeric_ground_truth(extras: Mapping[str, Any]) -> Decimal:
    truth = ground_truth(extras)
    value = number(str(truth))
    if value is None:
        raise ValueError(f"reward_spec.ground_truth must be a number, not {truth!r}")
    return value


def turn_limit(extras: Mapping[str, Any], default: int) -> int:
    """Return `max_turns` of the run, else of the row's `extra_info`, else the environment's default."""
    info = extras.get("extra_info")
    own = info.get("max_turns") if isinstance(info, Mapping) else None
    limit = int(extras.get("max_turns") or own or default)
    if limit < 1:
        raise ValueError(f"max_turns={limit} must be at least 1")
    return limit
