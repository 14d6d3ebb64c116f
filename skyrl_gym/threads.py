"""A call in a thread that does not keep the process alive: a user's code, or a read that nothing may ever answer."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import Future
from threading import Thread
from typing import TypeVar

from skyrl_gym.contract import Outcome

T = TypeVar("T")


def in_daemon_thread(call: Callable[[], T]) -> Future[T]:
    """Return the future of a call in a thread of its own."""
    future: Future[T] = Future()

    def run() -> None:
        outcome = Outcome.of(call)
        if not future.set_running_or_notify_cancel():  # nobody waits any more
            return
        if outcome.error is None:
            future.set_result(outcome.value)
        else:
            future.set_exception(outcome.error)

    Thread(target=run, daemon=True).start()
    return future
