"""A cheaper asyncio.timeout for many waits one after another: they share a timer, which is seldom set again."""

from __future__ import annotations

import asyncio
from types import TracebackType


class Deadline:
    """`with deadline:` raises TimeoutError if its body takes longer than `seconds`. One body at a time."""

    def __init__(self, seconds: float) -> None:
        self.seconds = seconds
        self._task: asyncio.Task[object] | None = None  # the task that waits now
        self._num_cancels = 0  # cancellations requested by others before the wait began
        self._ends_s = 0.0
        self._late = False
        self._timer: asyncio.TimerHandle | None = None

    def __enter__(self) -> None:
        loop = asyncio.get_running_loop()
        self._task = asyncio.current_task()
        assert self._task is not None
        self._num_cancels = self._task.cancelling()
        self._ends_s = loop.time() + self.seconds
        self._late = False
        if self._timer is None:
            self._timer = loop.call_at(self._ends_s, self._on_timer)

    def __exit__(
        self, exc_type: type[BaseException] | None, exc: BaseException | None, traceback: TracebackType | None
    ) -> None:
        task, self._task = self._task, None
        if not self._late or task is None:
            return
        if task.uncancel() <= self._num_cancels and exc_type is asyncio.CancelledError:
            raise TimeoutError from exc

    def stop(self) -> None:
        """Cancel the timer. Call it when no further wait will come."""
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None

    def _on_timer(self) -> None:
        """Called by the timer, which an earlier wait may have set: set it for the current wait, or end that if late."""
        self._timer = None
        if self._task is None:
            return
        loop = asyncio.get_running_loop()
        if loop.time() < self._ends_s:
            self._timer = loop.call_at(self._ends_s, self._on_timer)
        else:
            self._late = True
            self._task.cancel()
