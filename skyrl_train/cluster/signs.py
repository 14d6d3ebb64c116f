"""A sign of life of a learner rank: where it is and how long it has computed for, told beside its computation.

It needs the standard library alone, for it is asked for while another thread imports torch.
"""

from __future__ import annotations

import sys
import time
from dataclasses import dataclass
from pathlib import Path

import skyrl_train

ROOT = Path(skyrl_train.__file__).parents[1]
THIS_ROOM = str(Path(__file__).parent)


@dataclass(frozen=True, slots=True)
class Sign:
    """A rank at one moment."""

    place: str  # "update, skyrl_train/learner/gradient.py:88 in accumulate_gradient"
    cpu_s: float  # of the thread that computes
    tokens: tuple[int, int]  # done and in all, of an update
    is_writing: bool  # a checkpoint, which may wait for the disk


def place_of(thread: int) -> str:
    """Return the call that a thread is in, and the innermost line of ours."""
    frame = sys._current_frames().get(thread)
    call = line = ""
    while frame is not None:
        path = frame.f_code.co_filename
        if path.startswith(THIS_ROOM):
            call = frame.f_code.co_name
        elif not line and path.startswith(str(ROOT / "skyrl_train")):
            line = f"{Path(path).relative_to(ROOT)}:{frame.f_lineno} in {frame.f_code.co_name}"
        frame = frame.f_back
    return ", ".join(part for part in (call, line) if part) or "between two calls"


def cpu_seconds_of(thread: int) -> float:
    return time.clock_gettime(time.pthread_getcpuclockid(thread))
