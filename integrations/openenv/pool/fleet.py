"""The servers of one environment, and the queue of leases that wait for a slot on one of them.

Leases are served in the order in which they came. The capacity of a server is learned: sessions are opened one at a
time, then two, four, ... while it accepts. CAPACITY_REACHED sets its capacity; then another server is started (up to
`max_servers`), or the lease goes on waiting. A server that loses a session is suspect: it gets no new session until it
has answered a health check, and one that does not answer is replaced while the others go on: at once, then after pauses
that double as long as no episode gets through. A session also needs a file descriptor of this process
(session_budget.py): when those are used up, leases wait as they do for a full server.
"""

from __future__ import annotations

import asyncio
import bisect
import contextlib
import math
import os
import re
from collections.abc import Coroutine
from dataclasses import dataclass, field
from typing import Any

from loguru import logger

from integrations.openenv.client.addresses import fetch_json, is_healthy
from integrations.openenv.client.errors import CapacityReached, OpenEnvError, OutOfDescriptors
from integrations.openenv.config import OpenEnvConfig
from integrations.openenv.hosting.launch import (
    announce,
    choose_runtime,
    default_max_servers,
    reap_orphans,
    start_server,
)
from integrations.openenv.hosting.server import Server, ServersGivenUp, ServerStartFailed
from integrations.openenv.hosting.source import ServerSource
from integrations.openenv.pool.pooled_server import PooledServer
from integrations.openenv.pool.session_budget import SessionBudget

MAX_FAILURES = 7  # servers in a row that failed without an episode getting through; then the environment is given up
FIRST_PAUSE_S, LONGEST_PAUSE_S = 1.0, 30.0  # before a replacement, from the second failure in a row on; doubles
LONGEST_SILENCE_S = 5.0  # within which a suspect server must answer its health check
LOG_DELAY_S, LOG_LOOK_S = 5.0, 0.2  # until an error that a server has met is in its log, at the latest; looks at it
EXCEPTION = re.compile(r"[A-Za-z_][\w.]*(Error|Exception|Interrupt|Exit|NotFound|Timeout)\b.*|[A-Za-z_][\w.]*: \S.*")
NO_GROWTH_S = 60.0  # in which no further server is started, after one beside running ones failed to start


@dataclass(order=True)
class Waiter:
    """A lease in the queue. Its number orders it; `slot` is set to the server it may open a session on."""

    number: int
    slot: asyncio.Future[PooledServer] = field(compare=False)


class Fleet:
    """Assigns slots on servers.

    Call `slot`; then `opened`, `refused`, `out_of_descriptors` or `not_opened`, by how opening the session went; and
    after `opened`, when the session has ended, `give_back`.
    """

    def __init__(self, source: ServerSource, config: OpenEnvConfig, budget: SessionBudget) -> None:
        self.source = source
        self.config = config
        self._budget = budget
        budget.on_free.append(self._dispatch)
        self.members: list[PooledServer] = []
        self.num_restarts = 0  # servers started in place of a dead one
        self._runtime: str | None = None
        self._max_servers = default_max_servers(config, config.runtime)
        self._waiting: list[Waiter] = []
        self._num_starting = 0
        self._num_dead = 0  # not replaced yet
        self._num_failures = 0  # servers in a row that did not start or died, since an episode got through
        self._num_eras = 0  # failures counted so far; a server that started before the latest one does not count again
        self._last_failure = ""
        self._no_growth_until_s = 0.0
        self._tasks: set[asyncio.Task[None]] = set()
        self._closed = False

    async def slot(self, number: int) -> PooledServer:
        """Return a server with a slot, in the order of the numbers. ServerStartFailed if no server can be started."""
        if self._closed:
            raise OpenEnvError("the server pool is closed")
        waiter = Waiter(number, asyncio.get_running_loop().create_future())
        bisect.insort(self._waiting, waiter)
        self._dispatch()
        try:
            return await waiter.slot
        except asyncio.CancelledError:
            if not waiter.slot.cancelled() and waiter.slot.exception() is None:
                member = waiter.slot.result()
                member.num_opening -= 1
                self._vacate(member)
            self._waiting = [other for other in self._waiting if other is not waiter]
            raise

    def opened(self, member: PooledServer) -> None:
        member.opened()
        self._budget.grow()
        self._dispatch()

    def refused(self, member: PooledServer, full: CapacityReached) -> None:
        member.refused(full.max_sessions, asyncio.get_running_loop().time())
        self._budget.give_back()
        self._dispatch()

    def out_of_descriptors(self, member: PooledServer) -> None:
        """The session could not be opened for want of file descriptors: the lease waits and tries again.

        The server is not at fault.
        """
        self._budget.shrink()
        self._budget.warn_once()
        member.refused(None, asyncio.get_running_loop().time())
        self._budget.give_back()
        self._dispatch()

    def not_opened(self, member: PooledServer, *, suspect: bool) -> None:
        """The session could not be opened for a reason other than a full server, or its lease was cancelled.

        suspect: the server may be at fault, so examine it.
        """
        member.num_opening -= 1
        if suspect:
            self.suspect(member)
        self._vacate(member)

    def give_back(self, member: PooledServer, *, got_through: bool) -> None:
        """A session has ended: free its slot. got_through: it was not lost, so the server is well."""
        if got_through:
            member.num_lost_in_a_row = 0
            self._num_failures = 0
        self._vacate(member)

    def suspect(self, member: PooledServer) -> None:
        """A session on this server was lost: give out no slot on it until it has been examined."""
        member.num_lost_in_a_row += 1
        if not member.suspect and member in self.members and not self._closed:
            member.suspect = True
            self._spawn(self._examine(member))

    async def why_no_environment(self, member: PooledServer) -> str:
        """Return, in words, why the server cannot make an environment. Found out once for all its sessions."""
        if member.why_no_environment is None:
            member.why_no_environment = asyncio.get_running_loop().create_task(self._read_why(member.server))
        return await asyncio.shield(member.why_no_environment)

    async def _read_why(self, server: Server) -> str:
        """Return the last exception in the server's log, after a GET /state.

        That makes an environment too, and its error is logged; over a WebSocket the error is neither sent nor logged.
        """
        with contextlib.suppress(OpenEnvError):
            await fetch_json(server.url, "/state", self.config.step_timeout_s)
        for _ in range(round(LOG_DELAY_S / LOG_LOOK_S)):
            await asyncio.sleep(LOG_LOOK_S)
            words = await asyncio.to_thread(server.log_end)
            if lines := [line for line in words.splitlines() if EXCEPTION.match(line)]:
                return f" It says in its log: {lines[-1][:500]}"
        return " Its log may say why."

    def stop(self) -> list[Server]:
        """End the queue: leases that wait get ServerStartFailed. Returns the servers, for the caller to stop."""
        self._closed = True
        servers = [member.server for member in self.members]
        self.members = []
        for task in self._tasks:
            if not task.get_loop().is_closed():
                task.cancel()
        self._refuse_all(ServerStartFailed("the server pool is closed"))
        return servers

    async def ended(self) -> None:
        """Wait, after `stop`, until server starts that were under way have cleaned up."""
        await asyncio.gather(*self._tasks, return_exceptions=True)

    @property
    def is_full(self) -> bool:
        """True if a slot comes free only when a session ends.

        Then no server has a free slot, and none is being started or examined or has sessions being opened.
        """
        coming = self._num_starting or self._num_missing(asyncio.get_running_loop().time())
        full = all(member.is_full for member in self.members)
        return bool(self.members) and not coming and (full or self._budget.is_used_up)

    def describe(self) -> str:
        """Return what the servers are doing, for a message."""
        servers = ", ".join(f"{member.num_open} of {member.capacity} sessions open" for member in self.members)
        few = f"; {self._budget.describe()}" if self._budget.is_used_up else ""
        running = f"{len(self.members)} of at most {self._max_servers} servers run ({servers})"
        return f"{running}, {len(self._waiting)} wait{few}"

    # Assignment of slots

    def _vacate(self, member: PooledServer) -> None:
        member.num_open -= 1
        member.pause_s = member.refused_until_s = 0.0  # a slot has come free, so try again at once
        self._budget.give_back()
        self._dispatch()

    def _dispatch(self) -> None:
        """Give free slots to the first leases in the queue, and start servers for the rest."""
        if self._closed:
            return
        now_s = asyncio.get_running_loop().time()
        while self._waiting:
            if self._budget.is_used_up:
                self._budget.warn_once()
                return
            free = [member for member in self.members if member.has_slot(now_s)]
            if not free:
                break
            waiter = self._waiting.pop(0)
            if not waiter.slot.done():
                member = min(free, key=lambda member: member.num_open / member.capacity)
                self._budget.take()
                member.num_open += 1
                member.num_opening += 1
                waiter.slot.set_result(member)
        for _ in range(self._num_missing(now_s)):
            self._num_starting += 1
            self._spawn(self._start())
        if self._waiting:
            self._dispatch_after_pause(now_s)

    def _num_missing(self, now_s: float) -> int:
        """Return how many servers to start for the leases that wait."""
        per_server = min((member.capacity for member in self.members), default=self.config.max_sessions)
        slots = sum(member.num_free_slots(now_s) for member in self.members) + self._num_starting * per_server
        allowed = self._max_servers if self._runtime else 1
        if self.members and now_s < self._no_growth_until_s:
            return 0
        wanted = math.ceil(max(0, len(self._waiting) - slots) / per_server)
        at_once = os.cpu_count() or 1  # more starts at once would only slow each other down
        return max(0, min(wanted, allowed - len(self.members) - self._num_starting, at_once - self._num_starting))

    def _dispatch_after_pause(self, now_s: float) -> None:
        pauses = [m.refused_until_s for m in self.members if m.refused_until_s > now_s]
        if pauses:
            asyncio.get_running_loop().call_at(min(pauses), self._dispatch)

    # Starts and ends of servers

    async def _start(self) -> None:
        era = self._num_eras
        try:
            if self._num_failures >= MAX_FAILURES:
                raise ServersGivenUp(
                    f"given up, {MAX_FAILURES} servers in a row failed before an episode got through"
                    f"{self._last_failure}"
                )
            await self._pause()
            era = self._num_eras
            runtime = await self._chosen_runtime()
            patience_s = self.config.startup_timeout_s if self._runtime else 0.0
            server = await start_server(self.source, runtime, self.config, patience_s=patience_s)
        except (OpenEnvError, OSError) as failed:
            self._num_starting -= 1
            self._start_failed(failed, era)
            return
        except BaseException as broken:
            self._num_starting -= 1
            if isinstance(broken, Exception):  # a fault of ours: nobody waits for a server that will not come
                self._start_failed(OpenEnvError(f"no server was started: {type(broken).__name__}: {broken}"), era)
            raise
        self._num_starting -= 1
        if self._runtime is None:
            self._runtime = runtime
            self._max_servers = 1 if runtime == "url" else default_max_servers(self.config, runtime)
            announce(self.source, runtime, server)
        if self._num_dead:
            self._num_dead -= 1
            self.num_restarts += 1
        self.members.append(PooledServer(server, self._capacity(), era=era))
        self._dispatch()

    async def _pause(self) -> None:
        """Wait before replacing a dead server; the pause doubles with each that died in a row."""
        if self._runtime is None or self.members or self._num_failures < 2:
            return
        pause_s = min(FIRST_PAUSE_S * 2 ** (self._num_failures - 2), LONGEST_PAUSE_S)
        logger.warning(
            f"{self.source.name}: {self._num_failures} servers in a row failed before an episode got through; the next "
            f"is started in {pause_s:g} s, and after {MAX_FAILURES} the environment is given up"
        )
        await asyncio.sleep(pause_s)

    async def _chosen_runtime(self) -> str:
        if self._runtime is not None:
            return self._runtime
        runtime = await choose_runtime(self.source, self.config)
        await reap_orphans(containers=runtime == "docker")
        return runtime

    def _capacity(self) -> int:
        """Return the assumed capacity of a new server: the smallest that another one has turned out to have."""
        return min((member.capacity for member in self.members), default=self.config.max_sessions)

    def _count_failure(self, era: int, words: str) -> None:
        """Count a server that died or did not start; servers that ran at the same time count as one failure."""
        if era == self._num_eras and self._num_failures < MAX_FAILURES:
            self._num_eras += 1
            self._num_failures += 1
            self._last_failure = words

    def _start_failed(self, failed: Exception, era: int) -> None:
        self._count_failure(era, f"; the last one: {failed}")
        if self.members:  # the other servers serve the waiting leases in turn
            logger.warning(f"{self.source.name}: no further server, {failed}")
            self._no_growth_until_s = asyncio.get_running_loop().time() + NO_GROWTH_S
        elif isinstance(failed, ServersGivenUp):
            self._refuse_all(failed)
        elif self._runtime is None:  # the first server of a run: report the reason at once
            self._refuse_all(ServerStartFailed(str(failed)))
        else:
            logger.warning(f"{self.source.name}: {failed}")
            self._dispatch()

    def _refuse_all(self, reason: ServerStartFailed) -> None:
        waiting, self._waiting = self._waiting, []
        for waiter in waiting:
            if not waiter.slot.done() and not waiter.slot.get_loop().is_closed():
                waiter.slot.set_exception(type(reason)(str(reason)))

    async def _examine(self, member: PooledServer) -> None:
        """Examine a suspect server: use it again if it is healthy, else replace it."""
        server = member.server
        running = await asyncio.to_thread(lambda: server.is_running)
        healthy = running and await self._is_healthy(server)
        if healthy and not member.is_hopeless:
            member.suspect = False
        else:
            running = running and await asyncio.to_thread(lambda: server.is_running)  # it may have ended meanwhile
            what = "is silent" if not healthy else f"lost {member.num_lost_in_a_row} sessions in a row"
            await self._replace(member, what if running else "has ended")
        self._dispatch()

    async def _is_healthy(self, server: Server) -> bool:
        """Return whether the server answers in time; repeats while this process has no file descriptor left."""
        while True:
            try:
                return await is_healthy(server.url, min(LONGEST_SILENCE_S, self.config.step_timeout_s))
            except OutOfDescriptors:
                self._budget.warn_once()
                await asyncio.sleep(1.0)

    async def _replace(self, member: PooledServer, why: str) -> None:
        self.members.remove(member)
        self._num_dead += 1
        words = await asyncio.to_thread(member.server.log_end)
        self._count_failure(member.era, f"; the last one {why}{words}")
        logger.warning(f"{self.source.name}: the server at {member.server.url} {why}; it is replaced{words}")
        await asyncio.to_thread(member.server.stop)

    def _spawn(self, work: Coroutine[Any, Any, None]) -> None:
        task = asyncio.get_running_loop().create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
