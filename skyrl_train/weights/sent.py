"""Pushes weights without a file: sent to all engines at once (broadcast.py), or copied by them (ipc.py)."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from functools import partial
from typing import TYPE_CHECKING, Any

from skyrl_train.weights.broadcast import Broadcast
from skyrl_train.weights.shared_memory import (
    PUBLISH_S,
    OpenWeights,
    SharedMemory,
    SharedMemoryWeights,
    SharedWeights,
    computed,
    within,
)

if TYPE_CHECKING:
    from skyrl_train.engine.base import LoadingEngine
    from skyrl_train.learner.base import Learner  # both import from this room


class SentWeights:
    """Weights under way to the engines, as the driver holds them.

    An engine that is started later cannot take part any more: it gets a file that the learner writes for it alone.
    """

    def __init__(self, broadcast: Broadcast, learner: Learner, no_push: asyncio.Lock) -> None:
        """no_push: is held while a push is announced; engines that wait for one must not wait for this file first."""
        self.broadcast, self._learner, self._no_push = broadcast, learner, no_push
        self._lock = asyncio.Lock()
        self._written: OpenWeights | None = None

    @property
    def version(self) -> int:
        return self.broadcast.version

    @property
    def num_bytes(self) -> int:
        return self.broadcast.num_bytes

    async def at_hand(self) -> SharedWeights | None:
        """Return them in a file, once the learner has time to write it. None if it holds newer weights by then."""
        async with self._lock:
            if self._written is None:
                self._written = await self._write()
        shared = self._written.shared
        return shared if shared.version == self.version else None

    async def _write(self) -> OpenWeights:
        memory = SharedMemory()
        try:
            async with self._no_push:
                writing = computed(self._learner.publish, memory.path)
            written = OpenWeights(await writing)
        except BaseException:
            memory.empty()
            raise
        memory.close()
        return written


class BroadcastWeights(SharedMemoryWeights):
    """Pauses, proves and resumes like SharedMemoryWeights, but the weights go from device to device, or stay on it.

    An engine that is lost meanwhile is replaced by the pool; the others take the weights all the same.
    """

    way_around = (
        "; generator.weight_sync_backend=shared_memory takes the weights through the memory of the host instead"
    )

    def __init__(self, *args: Any, num_engines: Callable[[], int], num_readers: int = 0, **options: Any) -> None:
        """Take the arguments of SharedMemoryWeights. num_engines: returns how many engines are up.

        num_readers: workers of engines on each rank's device, if they copy the weights there; 0: they are sent.
        """
        super().__init__(*args, **options)
        self._num_engines, self._num_readers = num_engines, num_readers
        self._announcing = asyncio.Lock()

    async def _replace(self, learner: Learner, engine: LoadingEngine) -> tuple[int, list[float]]:
        """Return the bytes that were sent, and how far the engine's logprobs are from the learner's afterwards."""
        async with self._announcing:
            announcing = computed(partial(learner.announce_weights, num_readers=self._num_readers))
            broadcast = await within(PUBLISH_S, "the learner's announcement", announcing)
            sending = computed(learner.send_weights, broadcast, self._num_engines())
        sent = SentWeights(broadcast, learner, self._announcing)
        loading = asyncio.ensure_future(self._load(sent, learner, engine))
        try:
            await asyncio.wait((sending, loading), return_when=asyncio.FIRST_EXCEPTION)
            if sending.done():
                sending.result()
            return broadcast.num_bytes, await loading
        finally:
            loading.cancel()  # it closes an engine that may hold half of the weights
            await asyncio.wait((sending, loading), timeout=2 * self._deadline_s)
