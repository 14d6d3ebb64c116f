"""Servers shared by many episodes: started when first needed, more if one is not enough, replaced when they die.

An episode holds a lease (lease.py): a session that is connected and reset. The environment's fleet (fleet.py) decides
on which server it is and when it may be opened; hosting/launch.py decides where that server runs. A pool belongs to one
event loop.
"""

from __future__ import annotations

import asyncio
import atexit
from collections.abc import Iterator
from itertools import count
from typing import Any

from integrations.openenv.client.errors import (
    CapacityReached,
    FactoryFailed,
    OpenEnvError,
    OutOfDescriptors,
    SessionLost,
)
from integrations.openenv.client.session import open_session
from integrations.openenv.config import OpenEnvConfig
from integrations.openenv.hosting.server import Server
from integrations.openenv.hosting.source import ServerSource
from integrations.openenv.pool.fleet import Fleet, PooledServer
from integrations.openenv.pool.lease import Lease
from integrations.openenv.pool.session_budget import SessionBudget


class NoFreeSession(OpenEnvError):
    """No session came free within openenv.lease_timeout_s."""


class ServerPool:
    """The servers of all environments of a run. `close` stops them; at the latest Python's exit does."""

    def __init__(self, config: OpenEnvConfig) -> None:
        self.config = config
        self._budget = SessionBudget()
        self._fleets: dict[ServerSource, Fleet] = {}
        self._leases: dict[Lease, ServerSource] = {}
        self._numbers = count()
        self._closed = False
        atexit.register(self.stop)

    async def lease(self, source: ServerSource, **reset_kwargs: Any) -> Lease:
        """Return a session of this environment, connected and reset, in order of the calls.

        NoFreeSession: none came free within openenv.lease_timeout_s. reset_kwargs: for the server's reset.
        """
        if self._closed:
            raise OpenEnvError("the server pool is closed")
        fleet = self._fleets.get(source)
        if fleet is None:
            fleet = self._fleets[source] = Fleet(source, self.config, self._budget)
        number = next(self._numbers)
        try:
            async with asyncio.timeout(self.config.lease_timeout_s):
                lease = None
                while lease is None:
                    lease = await self._opened(fleet, await fleet.slot(number), reset_kwargs)
        except TimeoutError:
            raise NoFreeSession(self._who_holds_what(source, fleet)) from None
        self._leases[lease] = source
        return lease

    async def _opened(self, fleet: Fleet, member: PooledServer, reset_kwargs: dict[str, Any]) -> Lease | None:
        """Open a session on this server; None if it was full, or if this process has no file descriptor left."""
        try:
            session = await open_session(
                member.server.url, reset_kwargs, deadline_s=0.0, step_timeout_s=self.config.step_timeout_s
            )
        except CapacityReached as full:
            fleet.refused(member, full)
            return None
        except FactoryFailed as failed:
            words = await fleet.why_no_environment(member)
            fleet.not_opened(member, suspect=True)
            raise FactoryFailed(f"{failed}{words}") from failed
        except OutOfDescriptors:
            fleet.out_of_descriptors(member)
            return None
        except BaseException as failed:
            fleet.not_opened(member, suspect=isinstance(failed, SessionLost))
            raise
        fleet.opened(member)
        return Lease(fleet, member, session, self.config, on_end=self._forget)

    def is_full(self, source: ServerSource) -> bool:
        """Return whether a waiting lease gets a session only when another one is released."""
        return source in self._fleets and self._fleets[source].is_full

    def _forget(self, lease: Lease) -> None:
        self._leases.pop(lease, None)

    def _who_holds_what(self, source: ServerSource, fleet: Fleet) -> str:
        holders = [lease.describe() for lease, leased in self._leases.items() if leased == source]  # the oldest first
        held = f"; the oldest of {len(holders)} sessions: {'; '.join(holders[:3])}" if holders else ""
        return (
            f"no session came free within {self.config.lease_timeout_s:g} s "
            f"(openenv.lease_timeout_s): {fleet.describe()}{held}"
        )

    @property
    def num_restarts(self) -> int:
        """The number of servers that were started in place of a dead one."""
        return sum(fleet.num_restarts for fleet in self._fleets.values())

    def servers(self) -> Iterator[tuple[str, Server]]:
        """Yield (environment name, server) of the servers in use."""
        for source, fleet in self._fleets.items():
            for member in fleet.members:
                yield source.name, member.server

    async def close(self) -> None:
        """Stop every server. Sessions still open are lost."""
        servers = self._end()
        await asyncio.gather(*(asyncio.to_thread(server.stop) for server in servers))
        await asyncio.gather(*(fleet.ended() for fleet in self._fleets.values()))

    def stop(self) -> None:
        """Do what `close` does, for callers without an event loop."""
        for server in self._end():
            server.stop()

    def _end(self) -> list[Server]:
        self._closed = True
        atexit.unregister(self.stop)
        return [server for fleet in self._fleets.values() for server in fleet.stop()]


_shared: dict[tuple[int, tuple[Any, ...]], tuple[asyncio.AbstractEventLoop, ServerPool]] = {}
_restarts_of_closed_pools = 0


def shared_pool(config: OpenEnvConfig) -> ServerPool:
    """Return this process's pool for the running event loop and this configuration, made at the first call."""
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
    """Return how many servers this process's shared pools started in place of dead ones, for the run's metrics."""
    return _restarts_of_closed_pools + sum(pool.num_restarts for _, pool in _shared.values())


async def close_shared_pools() -> None:
    """Close the shared pools of the running event loop, at the end of a run."""
    loop = asyncio.get_running_loop()
    for key, (owner, pool) in list(_shared.items()):
        if owner is loop:
            _forget(key)
            await pool.close()


def _forget(key: tuple[int, tuple[Any, ...]]) -> None:
    global _restarts_of_closed_pools
    _restarts_of_closed_pools += _shared.pop(key)[1].num_restarts
