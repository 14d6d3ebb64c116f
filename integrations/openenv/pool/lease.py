"""A lease: one episode's session on a server of the pool, with its deadlines."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable
from typing import Any, TypeVar

from integrations.openenv.client.errors import SessionLost
from integrations.openenv.client.session import OpenEnvClient, StepResult
from integrations.openenv.config import OpenEnvConfig
from integrations.openenv.pool.fleet import Fleet, PooledServer

T = TypeVar("T")


class Lease:
    """A session that is connected and reset. Its holder gives it back with `release`."""

    def __init__(
        self,
        fleet: Fleet,
        member: PooledServer,
        session: tuple[OpenEnvClient, StepResult],
        config: OpenEnvConfig,
        on_end: Callable[[Lease], None],
    ) -> None:
        self._client, self.first = session  # `first`: the result of reset
        self.num_steps = 0
        self._fleet = fleet
        self._member = member
        self._config = config
        self._on_end = on_end
        self._began_s = self._used_s = time.monotonic()
        self._stepping = False
        self._reported_lost = False  # the fleet knows that this session was lost
        self._ended: str | None = None  # why no step is possible any more
        self._closing: asyncio.Task[None] | None = None
        self._timer = asyncio.get_running_loop().call_later(self._seconds_left(), self._watch)

    @property
    def url(self) -> str:
        """The server's address."""
        return self._member.server.url

    async def step(self, action: dict[str, Any]) -> StepResult:
        """Send an action and return its result. SessionLost: the episode is over; the pool examines the server."""
        self.num_steps += 1
        return await self._request(self._client.step, action)

    async def mcp(self, method: str, params: dict[str, Any]) -> dict[str, Any]:
        """Return the result of a request to the environment's MCP tools, such as tools/list."""
        return await self._request(self._client.mcp, method, params)

    async def _request(self, request: Callable[..., Awaitable[T]], *arguments: Any) -> T:
        if self._ended is not None:
            raise SessionLost(self._ended)
        self._stepping = True
        try:
            return await request(*arguments)
        except SessionLost as lost:
            if self._ended is not None:
                raise SessionLost(self._ended) from lost
            self._report_lost()
            raise
        finally:
            self._stepping = False
            self._used_s = time.monotonic()

    async def release(self) -> None:
        """Close the session and free the slot. May be called twice."""
        if self._ended is None:
            self._end("this lease was released")
        if self._closing is not None:
            await asyncio.shield(self._closing)

    def describe(self) -> str:
        """Return how long the lease has been held and unused, for a message."""
        now_s = time.monotonic()
        what = "in a step" if self._stepping else "unused"
        return f"{self.num_steps} steps in {now_s - self._began_s:.0f} s, {what} for {now_s - self._used_s:.0f} s"

    def _end(self, why: str) -> None:
        self._ended = why
        self._timer.cancel()
        got_through = self._client.lost is None
        if not got_through:
            self._report_lost()
        self._closing = asyncio.get_running_loop().create_task(self._close(got_through))

    def _report_lost(self) -> None:
        if not self._reported_lost:
            self._reported_lost = True
            self._fleet.suspect(self._member)

    async def _close(self, got_through: bool) -> None:
        try:
            await self._client.close()
        finally:
            self._fleet.give_back(self._member, got_through=got_through)
            self._on_end(self)

    def _seconds_left(self) -> float:
        now_s = time.monotonic()
        idle_left = self._config.idle_timeout_s - (0.0 if self._stepping else now_s - self._used_s)
        return min(idle_left, self._config.episode_timeout_s - (now_s - self._began_s))

    def _watch(self) -> None:
        left_s = self._seconds_left()
        if left_s > 0:
            self._timer = asyncio.get_running_loop().call_later(left_s, self._watch)
            return
        idle = not self._stepping and time.monotonic() - self._used_s >= self._config.idle_timeout_s
        name = "idle_timeout_s" if idle else "episode_timeout_s"
        limit = getattr(self._config, name)
        what = "was not used" if idle else "lasted"
        self._end(f"the session {what} for {limit:g} s (openenv.{name}) and was taken back")
