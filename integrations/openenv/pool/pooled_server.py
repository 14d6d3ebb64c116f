"""A fleet's record of one of its servers."""

from __future__ import annotations

import asyncio
from dataclasses import dataclass

from integrations.openenv.hosting.server import Server

MAX_OPENING = 32  # sessions at once that are being opened on one server
FIRST_PAUSE_S, LONGEST_PAUSE_S = 0.05, 1.0  # between attempts at a server that refuses below its known capacity
MIN_LOST = 3  # sessions in a row that a server must lose, though it looks healthy, before it is replaced


@dataclass(eq=False)
class PooledServer:
    """One server of a fleet: how many sessions it has and takes, and whether it is suspect."""

    server: Server
    capacity: int  # sessions at once, as far as it is known
    era: int = 0  # the fleet's `_num_eras` when it was started
    num_open: int = 0  # our sessions, including those that are being opened
    num_opening: int = 0
    window: int = 1  # how many may be opened at once
    pause_s: float = 0.0
    refused_until_s: float = 0.0
    suspect: bool = False
    num_lost_in_a_row: int = 0
    why_no_environment: asyncio.Task[str] | None = None  # reads its log, once it failed to make an environment

    def has_slot(self, now_s: float) -> bool:
        return (
            not self.suspect
            and self.num_open < self.capacity
            and self.num_opening < self.window
            and now_s >= self.refused_until_s
        )

    def num_free_slots(self, now_s: float) -> int:
        """Return how many slots are free for waiting leases; 0 while the server refuses below its known capacity."""
        return 0 if now_s < self.refused_until_s else max(0, self.capacity - self.num_open)

    @property
    def is_full(self) -> bool:
        """True if its known capacity is in use, or it has refused again and again since a session last ended.

        A suspect server is not full: its examination may yet free its slots.
        """
        known = self.num_open >= self.capacity and not self.num_opening
        return not self.suspect and (known or self.pause_s >= LONGEST_PAUSE_S)

    @property
    def is_hopeless(self) -> bool:
        """True if it lost as many sessions in a row as are open on it (at least MIN_LOST), however healthy it looks."""
        return self.num_lost_in_a_row >= max(MIN_LOST, self.num_open)

    def opened(self) -> None:
        self.num_opening -= 1
        self.window = min(2 * self.window, MAX_OPENING)
        self.pause_s = 0.0

    def refused(self, max_sessions: int | None, now_s: float) -> None:
        """The server said that it is full: lower its capacity if it told its limit, else pause before the next attempt.

        Its slots may be held by other clients or by sessions that are ending, or one of its workers was full.
        """
        self.num_opening -= 1
        self.num_open -= 1
        self.window = 1
        if max_sessions is not None and self.server.num_workers is not None:
            self.capacity = min(self.capacity, max_sessions * self.server.num_workers)
        if self.num_open < self.capacity:
            self.pause_s = min(max(2 * self.pause_s, FIRST_PAUSE_S), LONGEST_PAUSE_S)
            self.refused_until_s = now_s + self.pause_s
