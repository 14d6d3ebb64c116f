"""A worker's side of side_by_side.py: wait for a request, do the work, report how long it took."""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable
from typing import Any


class NoMoreTurns(Exception):
    """No further request will come. Raised to leave the loop in which the work runs."""


class Turns:
    """Requests for work. The first run is a warm-up, without a request and without a report."""

    def __init__(self) -> None:
        self._num_begun = 0
        self._began = self._began_cpu = self._seconds = self._cores = 0.0

    def begin(self) -> None:
        """Wait for a request and start the clock; NoMoreTurns if no further one will come."""
        if self._num_begun == 1:
            print(json.dumps({"ready": True}), flush=True)
        if self._num_begun > 0 and not sys.stdin.readline():
            raise NoMoreTurns
        self._num_begun += 1
        self._began, self._began_cpu = time.perf_counter(), time.process_time()

    def end(self) -> None:
        """Stop the clock."""
        self._seconds = time.perf_counter() - self._began
        self._cores = (time.process_time() - self._began_cpu) / self._seconds

    def tell(self, facts: dict[str, Any]) -> None:
        if self._num_begun > 1:
            print(json.dumps({"seconds": self._seconds, "cores": self._cores, **facts}), flush=True)


def settings() -> dict[str, Any]:
    """Return the benchmark's settings: JSON in the last word of the command line."""
    return json.loads(sys.argv[-1])


def serve(settings_to_work: Callable[[dict[str, Any]], Callable[[], dict[str, Any]]]) -> None:
    """Run a worker: make the work (a function) from the settings, then call it once per request."""
    work, turns = settings_to_work(settings()), Turns()
    try:
        while True:
            turns.begin()
            facts = work()
            turns.end()
            turns.tell(facts)
    except NoMoreTurns:
        return
