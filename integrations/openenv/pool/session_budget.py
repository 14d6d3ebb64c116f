"""How many sessions a pool may hold, by what this process may open: it waits rather than runs into the limit."""

from __future__ import annotations

from collections.abc import Callable

from loguru import logger

from integrations.openenv.client.descriptors import num_affordable


class SessionBudget:
    """The sessions that all fleets of a pool may hold together. Whoever finds none left waits for `on_free`."""

    def __init__(self) -> None:
        self.num_open = 0
        self.most = self._planned = num_affordable()
        self.on_free: list[Callable[[], None]] = []
        self._said = False

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
        """A session could not be opened for want of descriptors: those that are open now are the most for a while."""
        self.most = max(1, self.num_open - 1)

    def grow(self) -> None:
        """A session was opened: whoever took the descriptors that we had planned with may have given them back."""
        if self.most is not None and self._planned is not None:
            self.most = min(self._planned, self.most + 1)

    def say_once(self) -> None:
        """Tell the user, once, why episodes wait though servers have places."""
        if not self._said:
            self._said = True
            logger.warning(
                f"{self.describe()}; further episodes wait for their turn. Raise the hard limit (ulimit -Hn) to play "
                "more at once"
            )

    def describe(self) -> str:
        return f"this process may hold {self.most} sessions at once, by its limit of open files (ulimit -n)"
