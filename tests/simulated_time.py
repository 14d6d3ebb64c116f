"""An event loop whose clock jumps to the next timer as soon as nothing else is ready: an hour passes at once."""

from __future__ import annotations

import asyncio
import selectors
from collections.abc import Coroutine
from typing import Any, TypeVar

T = TypeVar("T")
LONGEST_S = 100_000.0


class _Selector(selectors.SelectSelector):
    """Waits for nothing: the time to wait is added to the clock."""

    passed_s = 0.0

    def select(self, timeout: float | None = None) -> list[tuple[selectors.SelectorKey, int]]:
        if timeout is None:
            raise RuntimeError("everything waits, and no timer is set: this would take for ever")
        self.passed_s += max(timeout, 0.0)
        if self.passed_s > LONGEST_S:
            raise RuntimeError(f"{LONGEST_S:.0f} s have passed, and the test is not over")
        return super().select(0)


class _Loop(asyncio.SelectorEventLoop):
    def __init__(self) -> None:
        self._clock = _Selector()
        super().__init__(self._clock)

    def time(self) -> float:
        return self._clock.passed_s


def in_simulated_time(main: Coroutine[Any, Any, T]) -> T:
    """Run a coroutine that uses no threads. RuntimeError where it would wait for ever."""
    with asyncio.Runner(loop_factory=_Loop) as runner:
        return runner.run(main)
