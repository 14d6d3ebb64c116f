"""The process of a run: its exit statuses, signals, and settings of its memory."""

from __future__ import annotations

import asyncio
import ctypes
import signal
import threading
from enum import IntEnum
from typing import Any

from skyrl_train.signals import ENDING, forget, ignore_more, note

_M_TRIM_THRESHOLD, _M_MMAP_MAX, _M_ARENA_MAX = -1, -4, -8  # of malloc.h


class Exit(IntEnum):
    """The exit statuses of a run. One that was interrupted has that of skyrl_train/signals.py."""

    DONE = 0
    STOPPED = 1  # broken off: no environment works, the engine died, no room on the disk
    REFUSED = 2  # before training


def cancel_on_signals() -> None:
    """Let SIGTERM and SIGHUP cancel the current task, as Ctrl-C does, so that everything it opened is closed.

    Those that come after the first are ignored, until `usual_signals_afterwards` ends. A SIGHUP that is ignored, as
    under nohup, stays ignored.
    """
    if threading.current_thread() is not threading.main_thread():  # as in a notebook: its signals are not ours
        return
    loop, task = asyncio.get_running_loop(), asyncio.current_task()
    assert task is not None
    forget()
    for number in ENDING:
        if signal.getsignal(number) is not signal.SIG_IGN:
            loop.add_signal_handler(number, _cancel, task, number)


def _cancel(task: asyncio.Task[Any], number: int) -> None:
    note(number)
    for each in ENDING:
        task.get_loop().remove_signal_handler(each)
    ignore_more()
    task.cancel()


def keep_freed_memory() -> None:
    """Ask glibc to reuse large blocks instead of giving them back: fresh pages cost an update on a CPU 15% of its time.

    One arena for all threads: with one each, what the engine, the learner and autograd free stays with the thread that
    freed it, and a run held 11 GB that now holds 8. Without effect where the C library has no mallopt.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is not None:
        mallopt(_M_ARENA_MAX, 1)
        mallopt(_M_MMAP_MAX, 0)
        mallopt(_M_TRIM_THRESHOLD, 2**30)
