"""A worker's side: wait until asked, do the work, say how long it took (the other side is side_by_side.py)."""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable
from typing import Any


class NoMoreTurns(Exception):
    """Nobody will ask again: thrown through whatever loop the work runs in."""


class Turns:
    """Turns of work. The first one warms up: nobody asks for it, and nobody is told of it."""

    def __init__(self) -> None:
        self._num_begun = 0
        self._began = self._began_cpu = self._seconds = self._cores = 0.0

    def begin(self) -> None:
        """Returns when the work is asked for; NoMoreTurns once nobody will ask any more."""
        if self._num_begun == 1:
            print(json.dumps({"ready": True}), flush=True)
        if self._num_begun > 0 and not sys.stdin.readline():
            raise NoMoreTurns
        self._num_begun += 1
        self._began, self._began_cpu = time.perf_counter(), time.process_time()

    def end(self) -> None:
        """Stops the clock."""
        self._seconds = time.perf_counter() - self._began
        self._cores = (time.process_time() - self._began_cpu) / self._seconds

    def tell(self, facts: dict[str, Any]) -> None:
        if self._num_begun > 1:
            print(json.dumps({"seconds": self._seconds, "cores": self._cores, **facts}), flush=True)


def settings() -> dict[str, Any]:
    """What the benchmark asks of this worker: the last word of its command line."""
    return json.loads(sys.argv[-1])


def serve(settings_to_work: Callable[[dict[str, Any]], Callable[[], dict[str, Any]]]) -> None:
    """A worker's main function where the work is a call: prepare from the settings, then work once a turn."""
    work, turns = settings_to_work(settings()), Turns()
    try:
        while True:
            turns.begin()
            facts = work()
            turns.end()
            turns.tell(facts)
    except NoMoreTurns:
        return
