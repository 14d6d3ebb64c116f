"""SkyRL's import path `skyrl_train.utils.rate_limiter`: a limit for the trajectories that a generator starts."""

from __future__ import annotations

import asyncio
from collections.abc import Mapping
from dataclasses import dataclass
from types import TracebackType
from typing import Any


@dataclass(frozen=True)
class RateLimiterConfig:
    """A limit for starts per second, and one for trajectories under way; None is no limit."""

    enabled: bool = False
    trajectories_per_second: float | None = None
    max_concurrency: int | None = None

    def __post_init__(self) -> None:
        for name in ("trajectories_per_second", "max_concurrency"):
            value = getattr(self, name)
            if value is not None and not value >= 1:
                raise ValueError(f"{name}={value} must be at least 1, or null for no limit")


class AsyncRateLimiter:
    """`async with limiter:` waits for a turn. The first second's worth of trajectories starts at once."""

    def __init__(self, rate: float | None = None, max_concurrency: int | None = None) -> None:
        RateLimiterConfig(trajectories_per_second=rate, max_concurrency=max_concurrency)
        self._rate = rate
        self._next_start: float | None = None  # when the newest trajectory would start at an even pace
        self._places = None if max_concurrency is None else asyncio.Semaphore(max_concurrency)

    async def acquire(self) -> None:
        if self._rate is not None:
            await asyncio.sleep(self._seconds_to_wait(self._rate))
        if self._places is not None:
            await self._places.acquire()

    def release(self) -> None:
        if self._places is not None:
            self._places.release()

    async def __aenter__(self) -> AsyncRateLimiter:
        await self.acquire()
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.release()

    def _seconds_to_wait(self, rate: float) -> float:
        """Take the next place at the even pace 1 / rate; up to `rate` places may be taken ahead of their time."""
        now = asyncio.get_running_loop().time()
        earliest = now - (rate - 1) / rate
        self._next_start = earliest if self._next_start is None else max(self._next_start + 1 / rate, earliest)
        return max(self._next_start - now, 0.0)


def create_rate_limiter(config: RateLimiterConfig | Mapping[str, Any] | None) -> AsyncRateLimiter:
    """Return a limiter; without limits for None and for `enabled: false`. ValueError for a limit below 1."""
    if isinstance(config, Mapping):
        config = RateLimiterConfig(**{str(name): value for name, value in config.items()})
    if config is None or not config.enabled:
        return AsyncRateLimiter()
    return AsyncRateLimiter(config.trajectories_per_second, config.max_concurrency)
