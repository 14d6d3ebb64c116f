"""A worker module whose programs have escaped already: it runs plain Python where the real one has an interpreter."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import time
from collections.abc import Callable
from typing import Any

from skyrl_gym.walls.confinement import confine

OPENED_BEFORE = (os, signal, socket, subprocess, time)  # a confined worker cannot import anything


def make_answer(secret: str) -> Callable[[dict[str, Any]], Any]:
    held = secret.encode() + b"/" * 64
    import ctypes

    address = ctypes.cast(ctypes.c_char_p(held), ctypes.c_void_p).value
    os.dup2(1, 2)  # as the real worker does
    confine()

    def answer(request: dict[str, Any]) -> Any:
        if not request:
            return {"pid": os.getpid(), "address": address, "held": len(held)}
        names: dict[str, Any] = {"given": request["given"]}
        try:
            exec(request["code"], names)
        except (OSError, MemoryError, RuntimeError) as error:
            return f"{type(error).__name__}: {error}"
        return str(names["loot"])

    return answer
