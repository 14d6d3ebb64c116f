"""The one thread in which this process computes: engine steps, updates and the loading of weights take turns there.

OpenMP's threads belong to the thread that started them. As soon as two threads of a process have started some, there
are more than the machine has processors, and libgomp stops spinning at its barriers: a decoding step of many small
operations then takes 69 ms instead of 43 ms (2 cores, 32 sequences). So only this thread has more than one.
"""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from functools import cache
from typing import ParamSpec, TypeVar

import torch

P = ParamSpec("P")
T = TypeVar("T")


def submit(call: Callable[P, T], *args: P.args, **kwargs: P.kwargs) -> Future[T]:
    """Run a call in the compute thread, after those submitted before. RuntimeError once the interpreter is ending."""
    return _executor().submit(call, *args, **kwargs)


@cache
def _executor() -> ThreadPoolExecutor:
    """Takes torch's number of threads over from the thread that first computes; leaves one to every other thread."""
    num_threads = torch.get_num_threads()
    executor = ThreadPoolExecutor(1, "compute", initializer=torch.set_num_threads, initargs=(num_threads,))
    executor.submit(torch.get_num_threads).result()  # its own number is set, so the next line does not change it
    torch.set_num_threads(1)
    return executor
