"""What a fleet knows about one of its servers."""

from __future__ import annotations

import asyncio
from dataclasses import dataclass

from integrations.openenv.hosting.server import Server

MAX_OPENING = 32  # sessions at once that are being opened on one server
FIRST_PAUSE_S, LONGEST_PAUSE_S = 0.05, 1.0  # between attempts at a server whose sessions others hold
MIN_LOST = 3  # sessions in a row that a server must lose, though it looks healthy, before it is replaced


@dataclass(eq=False)
class Member:
    """One server and what we know about its sessions."""

    server: Server
    capacity: int  # sessions at once, as far as we know
    era: int = 0  # the fleet's, when it was started
    num_open: int = 0  # our sessions, those that are being opened included
    num_opening: int = 0
    window: int = 1  # how many may be opened at once
    pause_s: float = 0.0
    refused_until_s: float = 0.0
    doubted: bool = False
    num_lost_in_a_row: int = 0
    why_no_environment: asyncio.Task[str] | None = None  # the end of its log, once it could not make an environment

    def has_place(self, now_s: float) -> bool:
        return (
            not self.doubted
            and self.num_open < self.capacity
            and self.num_opening < self.window
            and now_s >= self.refused_until_s
        )

    def num_places(self, now_s: float) -> int:
        """For leases that wait: none on a server that refuses although we think it has some."""
        return 0 if now_s < self.refused_until_s else max(0, self.capacity - self.num_open)

    @property
    def is_full(self) -> bool:
        """As many as we know it to take are open, or it has refused again and again since the last one ended."""
        known = self.num_open >= self.capacity and not self.num_opening
        return not self.doubted and (known or self.pause_s >= LONGEST_PAUSE_S)

    @property
    def is_hopeless(self) -> bool:
        """It loses one session after the other, though it looks healthy: as many as are open on it now."""
        return self.num_lost_in_a_row >= max(MIN_LOST, self.num_open)

    def opened(self) -> None:
        self.num_opening -= 1
        self.window = min(2 * self.window, MAX_OPENING)
        self.pause_s = 0.0

    def refused(self, max_sessions: int | None, now_s: float) -> None:
        """The server was full. Its sessions may be others', or still ending, or this was a busy one of its workers."""
        self.num_opening -= 1
        self.num_open -= 1
        self.window = 1
        if max_sessions is not None and self.server.num_workers is not None:
            self.capacity = min(self.capacity, max_sessions * self.server.num_workers)
        if self.num_open < self.capacity:
            self.pause_s = min(max(2 * self.pause_s, FIRST_PAUSE_S), LONGEST_PAUSE_S)
            self.refused_until_s = now_s + self.pause_s
