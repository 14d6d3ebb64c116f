"""An event loop in a background thread, for callers who have none of their own."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Coroutine
from concurrent.futures import wait
from functools import cache
from typing import Any, TypeVar

T = TypeVar("T")
CLOSING_S = 10.0
LOOK_S = 0.5  # between two looks at the signals that came
_starting = threading.Lock()


def run_in_background(work: Coroutine[Any, Any, T]) -> T:
    """Run a coroutine on the background loop, wait for it and return its result.

    Ctrl-C cancels it, and is raised when what it opened has been closed, or after CLOSING_S.
    """
    ended = threading.Event()

    async def noted() -> T:
        try:
            return await work
        finally:
            ended.set()

    future = asyncio.run_coroutine_threadsafe(noted(), background_loop())
    try:
        while not wait([future], LOOK_S).done:  # a signal that another thread was given wakes nobody here
            pass
    except KeyboardInterrupt:
        future.cancel()
        ended.wait(CLOSING_S)
        raise
    return future.result()


def background_loop() -> asyncio.AbstractEventLoop:
    """Return the loop, which runs in a daemon thread as long as the process lives."""
    with _starting:
        return _loop()


@cache
def _loop() -> asyncio.AbstractEventLoop:
    loop = asyncio.new_event_loop()
    threading.Thread(target=loop.run_forever, name="openenv-loop", daemon=True).start()
    return loop
