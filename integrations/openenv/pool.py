"""Local servers shared by many episodes: one per environment, started when first needed, replaced when it dies.

An episode holds a lease: a session that is connected and reset. A pool belongs to one event loop.
"""

from __future__ import annotations

import asyncio
import atexit
import time
from collections.abc import Iterator
from typing import Any

from integrations.openenv.client import OpenEnvClient, OpenEnvError, SessionLost, StepResult, is_healthy, open_session
from integrations.openenv.config import OpenEnvConfig
from integrations.openenv.server_process import ServerProcess, ServerStartFailed
from integrations.openenv.source import ServerSource


class Lease:
    """One episode's session. Whoever took it gives it back with `release`."""

    def __init__(self, host: _Host, server_url: str, client: OpenEnvClient, first: StepResult) -> None:
        self.first = first  # what reset gave
        self._host = host
        self._server_url = server_url
        self._client: OpenEnvClient | None = client

    @property
    def url(self) -> str:
        """Of the server."""
        return self._server_url

    async def step(self, action: dict[str, Any]) -> StepResult:
        """Act. A lost session makes the pool look after its server: a dead one is replaced for the next lease."""
        if self._client is None:
            raise SessionLost("this lease was released")
        try:
            return await self._client.step(action)
        except SessionLost:
            await self._host.look_after(self._server_url)
            raise

    async def mcp(self, method: str, params: dict[str, Any]) -> dict[str, Any]:
        """Ask the environment's MCP side, such as for tools/list."""
        if self._client is None:
            raise SessionLost("this lease was released")
        return await self._client.mcp(method, params)

    async def release(self) -> None:
        """Close the session and free the slot. May be called twice."""
        client, self._client = self._client, None
        if client is None:
            return
        try:
            await client.close()
        finally:
            self._host.slots.release()


class _Host:
    """Where one environment is served: a server of ours, or a given url."""

    def __init__(self, source: ServerSource, config: OpenEnvConfig) -> None:
        self.source = source
        self.config = config
        self.slots = asyncio.Semaphore(config.max_sessions)
        self.server: ServerProcess | None = None
        self.num_starts = 0
        self._failed: ServerStartFailed | None = None  # the last start that failed
        self._failed_s = 0.0
        self._changing = asyncio.Lock()  # held while the server is started or replaced

    async def lease(self, reset_kwargs: dict[str, Any]) -> Lease:
        await self.slots.acquire()
        try:
            url = await self._url()
            try:
                client, first = await open_session(
                    url,
                    reset_kwargs,
                    deadline_s=self.config.startup_timeout_s,
                    step_timeout_s=self.config.step_timeout_s,
                )
            except SessionLost:
                await self.look_after(url)
                raise
        except BaseException:
            self.slots.release()
            raise
        return Lease(self, url, client, first)

    async def look_after(self, url: str) -> None:
        """After a lost session: stop the server at `url` if it is dead or silent. The next lease starts one."""
        async with self._changing:
            server = self.server
            if server is None or server.url != url or (server.is_running and await is_healthy(url)):
                return
            self.server = None
            await asyncio.to_thread(server.stop)

    async def _url(self) -> str:
        if self.config.uses_url:
            assert self.config.url is not None
            return self.config.url
        if self.source.url is not None:
            return self.source.url
        asked_s = time.monotonic()
        async with self._changing:
            if self.server is not None and not self.server.is_running:
                self.server.stop()
                self.server = None
            if self.server is None:
                if self._failed is not None and self._failed_s > asked_s:
                    raise ServerStartFailed(str(self._failed))  # the start that this lease waited for
                self.server = await self._start()
            return self.server.url

    async def _start(self) -> ServerProcess:
        if self.source.module is None:
            raise ServerStartFailed(f"{self.source.name}: there is no server of ours for it")
        try:
            server = await ServerProcess.start(
                self.source.module,
                arguments=self.source.arguments,
                max_sessions=self.config.max_sessions,
                timeout_s=self.config.startup_timeout_s,
            )
        except ServerStartFailed as failed:
            self._failed, self._failed_s = failed, time.monotonic()
            raise
        self.num_starts += 1
        return server

    def stop(self) -> None:
        server, self.server = self.server, None
        if server is not None:
            server.stop()


class ServerPool:
    """Servers by environment. Closed by `close`, at the latest when Python exits."""

    def __init__(self, config: OpenEnvConfig) -> None:
        self.config = config
        self._hosts: dict[ServerSource, _Host] = {}
        self._closed = False
        atexit.register(self.stop)

    async def lease(self, source: ServerSource, **reset_kwargs: Any) -> Lease:
        """A session of this environment, connected and reset; waits while all `max_sessions` are taken."""
        if self._closed:
            raise OpenEnvError("the server pool is closed")
        if source not in self._hosts:
            self._hosts[source] = _Host(source, self.config)
        return await self._hosts[source].lease(reset_kwargs)

    @property
    def num_restarts(self) -> int:
        """Servers that were started in place of a dead one."""
        return sum(max(host.num_starts - 1, 0) for host in self._hosts.values())

    def servers(self) -> Iterator[tuple[str, ServerProcess]]:
        """The running servers of our own, by environment name."""
        for source, host in self._hosts.items():
            if host.server is not None:
                yield source.name, host.server

    async def close(self) -> None:
        """Stop every server. Sessions still open are lost."""
        await asyncio.to_thread(self.stop)

    def stop(self) -> None:
        """What `close` does, for callers without a loop."""
        self._closed = True
        atexit.unregister(self.stop)
        for host in self._hosts.values():
            host.stop()


_shared: dict[tuple[int, tuple[Any, ...]], tuple[asyncio.AbstractEventLoop, ServerPool]] = {}
_restarts_of_closed_pools = 0


def shared_pool(config: OpenEnvConfig) -> ServerPool:
    """This process's pool for the running event loop and this configuration."""
    loop = asyncio.get_running_loop()
    for key, (owner, pool) in list(_shared.items()):
        if owner.is_closed():
            _forget(key)
            pool.stop()
    key = (id(loop), config.key())
    if key not in _shared:
        _shared[key] = (loop, ServerPool(config))
    return _shared[key][1]


def num_server_restarts() -> int:
    """Servers that this process's shared pools started in place of dead ones. For the run's metrics."""
    return _restarts_of_closed_pools + sum(pool.num_restarts for _, pool in _shared.values())


async def close_shared_pools() -> None:
    """Close the shared pools of the running event loop. The entry point's last act."""
    loop = asyncio.get_running_loop()
    for key, (owner, pool) in list(_shared.items()):
        if owner is loop:
            _forget(key)
            await pool.close()


def _forget(key: tuple[int, tuple[Any, ...]]) -> None:
    global _restarts_of_closed_pools
    _restarts_of_closed_pools += _shared.pop(key)[1].num_restarts
