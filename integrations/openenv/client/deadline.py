"""asyncio.timeout for one wait after the other: the timer is set now and then, not for every wait."""

from __future__ import annotations

import asyncio
from types import TracebackType


class Deadline:
    """`with deadline:` raises TimeoutError if its body takes longer than `seconds`. One body at a time."""

    def __init__(self, seconds: float) -> None:
        self.seconds = seconds
        self._task: asyncio.Task[object] | None = None  # whoever waits now
        self._num_cancels = 0  # that others asked for before the wait began
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
            self._timer = loop.call_at(self._ends_s, self._look)

    def __exit__(
        self, exc_type: type[BaseException] | None, exc: BaseException | None, traceback: TracebackType | None
    ) -> None:
        task, self._task = self._task, None
        if not self._late or task is None:
            return
        if task.uncancel() <= self._num_cancels and exc_type is asyncio.CancelledError:
            raise TimeoutError from exc

    def stop(self) -> None:
        """There will be no further wait."""
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None

    def _look(self) -> None:
        """The timer was set for an earlier wait: set it for the one under way, or end that."""
        self._timer = None
        if self._task is None:
            return
        loop = asyncio.get_running_loop()
        if loop.time() < self._ends_s:
            self._timer = loop.call_at(self._ends_s, self._look)
        else:
            self._late = True
            self._task.cancel()
