"""An event loop in a background thread, for callers who have none of their own."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Coroutine
from functools import cache
from typing import Any, TypeVar

T = TypeVar("T")
_starting = threading.Lock()


def run_in_background(work: Coroutine[Any, Any, T]) -> T:
    """Run a coroutine on the background loop, wait for it and return its result."""
    return asyncio.run_coroutine_threadsafe(work, background_loop()).result()


def background_loop() -> asyncio.AbstractEventLoop:
    """Return the loop, which runs in a daemon thread as long as the process lives."""
    with _starting:
        return _loop()


@cache
def _loop() -> asyncio.AbstractEventLoop:
    loop = asyncio.new_event_loop()
    threading.Thread(target=loop.run_forever, name="openenv-loop", daemon=True).start()
    return loop
