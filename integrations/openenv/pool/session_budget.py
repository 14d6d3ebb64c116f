"""The limit on a pool's sessions by open files: episodes wait before the process runs out of file descriptors."""

from __future__ import annotations

from collections.abc import Callable

from loguru import logger

from integrations.openenv.client.descriptors import num_affordable


class SessionBudget:
    """Counter of the sessions that all fleets of a pool hold together, and their limit.

    A fleet that finds the limit reached waits for its function in `on_free` to be called.
    """

    def __init__(self) -> None:
        self.num_open = 0
        self.most = self._planned = num_affordable()
        self.on_free: list[Callable[[], None]] = []
        self._warned = False

    @property
    def is_used_up(self) -> bool:
        return self.most is not None and self.num_open >= self.most

    def take(self) -> None:
        self.num_open += 1

    def give_back(self) -> None:
        was_used_up = self.is_used_up
        self.num_open -= 1
        if was_used_up and not self.is_used_up:
            for notify in list(self.on_free):
                notify()

    def shrink(self) -> None:
        """Lower the limit to the sessions open now, after one could not be opened for want of descriptors."""
        self.most = max(1, self.num_open - 1)

    def grow(self) -> None:
        """Raise a lowered limit by one after a session was opened: descriptors used elsewhere may be free again."""
        if self.most is not None and self._planned is not None:
            self.most = min(self._planned, self.most + 1)

    def warn_once(self) -> None:
        """Log, once, why episodes wait although servers have free slots."""
        if not self._warned:
            self._warned = True
            logger.warning(
                f"{self.describe()}; further episodes wait for their turn. Raise the hard limit (ulimit -Hn) to play "
                "more at once"
            )

    def describe(self) -> str:
        return f"this process may hold {self.most} sessions at once, by its limit of open files (ulimit -n)"
