"""Spans of time that code opens around its work, and the recorders that listen to them.

    with span("engine step", sequences=32):
        ...

While nobody records, a span is a function call. Each belongs to a lane, and within a lane spans nest: the lane of the
episode that is played, in whatever task or thread it is awaited, else the thread's own.
"""

from __future__ import annotations

import heapq
import threading
import time
from collections.abc import Callable, Generator, Iterable
from contextlib import AbstractContextManager, contextmanager, nullcontext
from contextvars import ContextVar
from dataclasses import dataclass, field
from types import TracebackType
from typing import Any, TypeVar

T = TypeVar("T")
MAX_EPISODE_LANES = 64  # a thousand would be neither drawn nor read


@dataclass(frozen=True, slots=True)
class Span:
    """start and end: time.perf_counter_ns()."""

    name: str
    lane: str
    start_ns: int
    end_ns: int
    details: dict[str, Any]


@dataclass(slots=True)
class Recorder:
    """Spans in the order in which they ended. Threads may add to it at once."""

    spans: list[Span] = field(default_factory=list)
    num_left_out: int = 0  # episodes for which there was no lane
    free_lanes: list[int] = field(default_factory=lambda: list(range(1, MAX_EPISODE_LANES + 1)))  # a heap


_recorder: Recorder | None = None
_lane: ContextVar[str | None] = ContextVar("lane", default=None)  # None: the thread's own; "": not recorded
_NOTHING = nullcontext()


@contextmanager
def recording() -> Generator[Recorder]:
    """Record every span of this process that ends within the block."""
    global _recorder
    if _recorder is not None:
        raise RuntimeError("spans are being recorded already, and one process has one recorder")
    _recorder = recorder = Recorder()
    try:
        yield recorder
    finally:
        _recorder = None


def span(name: str, **details: Any) -> AbstractContextManager[Any]:
    """Record what happens in the block under this name; details are numbers or words to read beside it."""
    return _NOTHING if _recorder is None else _Open(_recorder, name, details)


def each_in_a_span(name: str, items: Iterable[T], details: Callable[[T], dict[str, Any]]) -> Generator[T]:
    """The items, each with a span around what the caller does with it before it takes the next."""
    for item in items:
        with span(name, **details(item)):
            yield item


@contextmanager
def episode_lane(name: str, **details: Any) -> Generator[None]:
    """A span with a lane of its own, the first free one, for everything that the current task awaits in the block."""
    if (recorder := _recorder) is None:
        yield
        return
    number = heapq.heappop(recorder.free_lanes) if recorder.free_lanes else None
    recorder.num_left_out += number is None
    token = _lane.set("" if number is None else f"episode lane {number}")
    try:
        with span(name, **details):
            yield
    finally:
        _lane.reset(token)
        if number is not None:
            heapq.heappush(recorder.free_lanes, number)


class _Open:
    __slots__ = ("details", "name", "recorder", "start_ns")

    def __init__(self, recorder: Recorder, name: str, details: dict[str, Any]) -> None:
        self.recorder, self.name, self.details = recorder, name, details

    def __enter__(self) -> None:
        self.start_ns = time.perf_counter_ns()

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        lane = _lane.get()
        if lane != "":
            lane = threading.current_thread().name if lane is None else lane
            end_ns = time.perf_counter_ns()
            self.recorder.spans.append(Span(self.name, lane, self.start_ns, end_ns, self.details))
