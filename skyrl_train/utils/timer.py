"""SkyRL's `Timer`: how long a block took, into a dictionary of the caller's."""

from __future__ import annotations

import time
from types import TracebackType

from loguru import logger


class Timer:
    """`with Timer("work", timings):` adds the seconds of the block to timings["work"]; `async with` does the same."""

    def __init__(self, message: str, update_dict: dict[str, float] | None = None) -> None:
        self.message = message
        self.timings = update_dict

    def __enter__(self) -> Timer:
        self.started = time.monotonic()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        seconds = time.monotonic() - self.started
        logger.info(f"{self.message}: {seconds:.2f} s")
        if self.timings is not None:
            self.timings[self.message] = self.timings.get(self.message, 0.0) + seconds

    async def __aenter__(self) -> Timer:
        return self.__enter__()

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.__exit__(kind, error, trace)
