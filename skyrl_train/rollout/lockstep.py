"""A barrier for episodes: they take each turn together, so that timing cannot change what the engine batches."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Callable
from contextlib import asynccontextmanager

LOOK_AGAIN_S = 0.02


class Lockstep:
    """Episodes begin one after another, and all that have begun meet before each turn.

    For evaluation, and with `trainer.deterministic` for training as well.

    Where there are fewer sessions than episodes, the one that is beginning waits until another ends. Then the turn is
    taken without it and those behind it: who plays follows from the order of the episodes and from who has ended.
    """

    def __init__(self, num_episodes: int) -> None:
        self._num_live = num_episodes
        self._begun: set[str] = set()
        self._waiting: list[tuple[str, asyncio.Future[None]]] = []
        self._door = asyncio.Lock()  # first come, first served
        self._is_held_up: Callable[[], bool] = _never

    @asynccontextmanager
    async def beginning(self, episode_id: str, is_held_up: Callable[[], bool]) -> AsyncGenerator[None]:
        """Surround the start of an episode or retry. `is_held_up`: it can go on only when another episode has ended."""
        self._begun.discard(episode_id)
        async with self._door:
            self._is_held_up = is_held_up
            looking = asyncio.create_task(self._look())
            try:
                yield
            finally:
                looking.cancel()
                self._is_held_up = _never
            self._begun.add(episode_id)

    async def arrive(self, episode_id: str) -> None:
        future: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._waiting.append((episode_id, future))
        self._release()
        await future

    def leave(self, episode_id: str) -> None:
        """Take an episode that has ended, and its session, out of the count."""
        self._num_live -= 1
        self._begun.discard(episode_id)
        self._release()

    async def _look(self) -> None:
        """Check again and again whether the turn can be taken: a starting episode may become held up at any moment."""
        while True:
            await asyncio.sleep(LOOK_AGAIN_S)
            self._release()

    def _release(self) -> None:
        if len(self._waiting) < len(self._begun):
            return
        if len(self._begun) < self._num_live and not self._is_held_up():
            return
        released, self._waiting = sorted(self._waiting, key=lambda waiting: waiting[0]), []
        # Woken later, not here: the episode that arrived last does not wait on its future yet and would run first.
        for _, future in released:
            asyncio.get_running_loop().call_soon(_wake, future)


def _never() -> bool:
    return False


def _wake(future: asyncio.Future[None]) -> None:
    if not future.done():
        future.set_result(None)
