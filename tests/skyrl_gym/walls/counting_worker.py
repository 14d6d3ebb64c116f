"""A worker module that counts its requests, and dies, hangs or holds memory as a request says."""

from __future__ import annotations

import mmap
import os
import signal
import time
from collections.abc import Callable
from typing import Any


def make_answer(start: int) -> Callable[[Any], Any]:
    count = start
    held: list[Any] = []

    def answer(request: Any) -> Any:
        nonlocal count
        match request:
            case "count":
                count += 1
                return [count, os.getpid()]
            case "environment":
                return dict(os.environ)
            case {"hold_mb": size}:
                held.append(b"x" * (size << 20))
                return True
            case {"hold_shared_mb": size}:
                held.append(mmap.mmap(-1, size << 20))
                for start in range(0, size << 20, 4096):
                    held[-1][start] = 1
                return True
            case "die":
                os._exit(3)
            case "hang":
                signal.signal(signal.SIGTERM, signal.SIG_IGN)
                time.sleep(600)
            case {"say": text, "times": times}:
                for descriptor in range(3, 64):  # whichever of them is the session
                    try:
                        for _ in range(times):
                            os.write(descriptor, text.encode())
                    except OSError:
                        continue
        return None

    return answer
