"""The limiter that SkyRL's Harbor generator imports, in a time that passes only while everyone sleeps."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest
from omegaconf import OmegaConf

from skyrl_train.utils.rate_limiter import RateLimiterConfig, create_rate_limiter
from tests.simulated_time import in_simulated_time


def starts_and_peak(config: Any, num: int) -> tuple[list[float], int]:
    """When each of `num` trajectories of 1 s starts, and how many there are at most at a time."""
    starts: list[float] = []
    running, peak = 0, 0

    async def trajectory(limiter: Any) -> None:
        nonlocal running, peak
        async with limiter:
            starts.append(round(asyncio.get_running_loop().time(), 3))
            running += 1
            peak = max(peak, running)
            await asyncio.sleep(1.0)
            running -= 1

    async def all_of_them() -> None:
        limiter = create_rate_limiter(config)
        await asyncio.gather(*(trajectory(limiter) for _ in range(num)))

    in_simulated_time(all_of_them())
    return [start - starts[0] for start in starts], peak


def test_the_first_second_starts_at_once_and_then_the_pace_holds():
    starts, _ = starts_and_peak(RateLimiterConfig(enabled=True, trajectories_per_second=2), 5)
    assert starts == pytest.approx([0.0, 0.0, 0.5, 1.0, 1.5])


def test_no_more_than_allowed_are_under_way():
    limits = OmegaConf.create({"enabled": True, "max_concurrency": 2, "trajectories_per_second": None})
    assert starts_and_peak(limits, 5) == ([0.0, 0.0, 1.0, 1.0, 2.0], 2)


@pytest.mark.parametrize("config", [None, {"enabled": False, "max_concurrency": 1}, {"enabled": True}])
def test_without_limits_all_start_at_once(config):
    assert starts_and_peak(config, 4) == ([0.0] * 4, 4)


@pytest.mark.parametrize("limits", [{"max_concurrency": 0}, {"trajectories_per_second": 0.5}])
def test_a_limit_below_one_is_refused(limits):
    with pytest.raises(ValueError, match="must be at least 1, or null"):
        create_rate_limiter({"enabled": True, **limits})
