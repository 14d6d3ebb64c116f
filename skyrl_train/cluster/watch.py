"""The driver's look at the learner's ranks: a process that hangs is found out, and a long computation is not.

A process that is stopped gives no sign (signs.py). Ranks that wait for each other all give signs, and none computes.
"""

from __future__ import annotations

import time
from collections.abc import Collection
from typing import Any

from skyrl_train.cluster.actors import Identity
from skyrl_train.cluster.deaths import last_words
from skyrl_train.cluster.signs import Sign
from skyrl_train.learner.base import LearnerDied

SILENT_S = 60.0  # a rank that gives no answer for so long hangs
STUCK_S = 120.0  # ranks hang if all answer, and none has computed or written anything for so long
START_S = 900.0  # both of a rank that starts, imports and loads its policy
LONGEST_LOOK_S = 5.0  # counted between two looks: the driver itself may have been stopped
LEAST_CPU_S = 1e-3


class Watch:
    """Looks at the ranks while a call is under way. LearnerDied names those that hang."""

    def __init__(
        self, ray: Any, ranks: list[Any], identities: list[Identity | None], silent_s: float, stuck_s: float
    ) -> None:
        self._ray, self._ranks, self._identities = ray, ranks, identities
        self._silent_s, self._stuck_s = silent_s, stuck_s
        self._asked: dict[int, Any] = {}
        self._silent = dict.fromkeys(range(len(ranks)), 0.0)  # seconds since a rank was asked
        self._idle = dict.fromkeys(range(len(ranks)), 0.0)  # and since it computed
        self._last_look = time.monotonic()
        self.signs: dict[int, Sign] = {}

    def look(self, waiting: Collection[int]) -> None:
        """Ask the ranks that the call waits for. A rank that is dead is found out by its call."""
        now = time.monotonic()
        passed, self._last_look = min(now - self._last_look, LONGEST_LOOK_S), now
        for rank in waiting:
            self._idle[rank] += passed
            self._silent[rank] += passed
            asked = self._asked.get(rank)
            if asked is None:
                self._ask(rank)
            elif self._ray.wait([asked], timeout=0)[0]:
                self._take(rank, asked)
                self._ask(rank)
            elif self._silent[rank] > self._silent_s:
                raise LearnerDied(
                    f"{self._name(rank)} hangs: it has not answered for {self._silent[rank]:.0f} s. It was last in "
                    f"{self._place(rank)}{last_words(self._identities[rank])}"
                )
        if waiting and all(self._idle[rank] > self._stuck_s for rank in waiting):
            places = "; ".join(f"{self._name(rank)} is in {self._place(rank)}" for rank in waiting)
            raise LearnerDied(f"the learner hangs: no rank has computed anything for {self._stuck_s:.0f} s. {places}")

    def _ask(self, rank: int) -> None:
        self._asked[rank] = self._ranks[rank].sign.options(concurrency_group="progress").remote()
        self._silent[rank] = 0.0

    def _take(self, rank: int, answer: Any) -> None:
        try:
            sign = self._ray.get(answer)
        except self._ray.exceptions.RayActorError:
            return
        if sign is None:
            return
        before, self.signs[rank] = self.signs.get(rank), sign
        has_computed = before is None or sign.cpu_s - before.cpu_s > LEAST_CPU_S or sign.tokens != before.tokens
        if has_computed or sign.is_writing:
            self._idle[rank] = 0.0

    def _name(self, rank: int) -> str:
        identity = self._identities[rank]
        process = "" if identity is None else f" (process {identity.pid})"
        return f"learner rank {rank} of {len(self._ranks)}{process}"

    def _place(self, rank: int) -> str:
        sign = self.signs.get(rank)
        if sign is None:
            return "a call that it never began"
        done, total = sign.tokens
        return sign.place + (f", {done:,} of {total:,} tokens done" if total else "")
