"""`trainer.profile=true`: where each step's time went, one file per step, in Chrome's trace format for Perfetto.

profile/step_3.json.gz holds step 3 with its evaluation and checkpoint, step_0 the evaluation before training:

trainer            step > rollout, logprobs, advantages, update, weights;  evaluation;  checkpoint
compute thread     engine step > forward, sample;  micro batch > forward, backward;  optimizer step
episode lane N     episode > reset, generate, environment step, ..., generate, ...;  64 lanes at most
"""

from __future__ import annotations

import gzip
import json
from collections.abc import Generator, Iterable
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from skyrl_train.files import write_whole
from skyrl_train.run.run_folder import PROFILE
from skyrl_train.spans import Recorder, Span, recording

VIEWER = "https://ui.perfetto.dev"
THREAD_NAMES = {"MainThread": "trainer", "compute_0": "compute thread"}
RUN, EPISODES = 1, 2  # the trace's process ids: two groups of lanes that fold


class Profile:
    """Of one run. Without `enabled` nothing is recorded or written."""

    def __init__(self, run_folder: Path, *, enabled: bool) -> None:
        self.folder, self.enabled = run_folder / PROFILE, enabled

    @contextmanager
    def step(self, step: int) -> Generator[None]:
        """Everything within the block goes into this step's file, also if the block fails."""
        if not self.enabled:
            yield
            return
        with recording() as recorder:
            try:
                yield
            finally:
                write_whole(self.folder / f"step_{step}.json.gz", _compressed(trace_of(recorder)))


def trace_of(recorder: Recorder) -> dict[str, Any]:
    """The object form of Chrome's trace event format."""
    lanes = _lanes(recorder.spans)
    events = [*_names(lanes), *(_event(span, *lanes[span.lane]) for span in recorder.spans)]
    return {
        "traceEvents": events,
        "displayTimeUnit": "ms",
        "otherData": {"episodes without a lane": recorder.num_left_out},
    }


def _lanes(spans: Iterable[Span]) -> dict[str, tuple[int, int]]:
    """(process id, thread id) of every lane; the trainer's first, then the compute thread's."""
    order = list(THREAD_NAMES)
    names = {span.lane for span in spans}
    threads = sorted(
        (name for name in names if not _is_episode(name)),
        key=lambda name: (order.index(name) if name in order else len(order), name),
    )
    lanes = {name: (RUN, number) for number, name in enumerate(threads, start=1)}
    return lanes | {name: (EPISODES, 1000 + int(name.split()[-1])) for name in names if _is_episode(name)}


def _is_episode(lane: str) -> bool:
    return lane.startswith("episode lane ")


def _names(lanes: dict[str, tuple[int, int]]) -> Generator[dict[str, Any]]:
    for process, name in ((RUN, "run"), (EPISODES, "episodes")):
        yield {"ph": "M", "name": "process_name", "pid": process, "tid": 0, "args": {"name": name}}
        yield {"ph": "M", "name": "process_sort_index", "pid": process, "tid": 0, "args": {"sort_index": process}}
    for lane, (process, thread) in lanes.items():
        where = {"ph": "M", "pid": process, "tid": thread}
        yield {**where, "name": "thread_name", "args": {"name": THREAD_NAMES.get(lane, lane)}}
        yield {**where, "name": "thread_sort_index", "args": {"sort_index": thread}}


def _event(span: Span, process: int, thread: int) -> dict[str, Any]:
    """A complete event; ts and dur are microseconds."""
    return {
        "ph": "X",
        "name": span.name,
        "pid": process,
        "tid": thread,
        "ts": span.start_ns / 1000,
        "dur": (span.end_ns - span.start_ns) / 1000,
        "args": span.details,
    }


def _compressed(trace: dict[str, Any]) -> bytes:
    return gzip.compress(json.dumps(trace, separators=(",", ":")).encode(), compresslevel=3, mtime=0)
