"""Check that processes have ended."""

from __future__ import annotations

import time

import psutil


def gone(pids: list[int], within_s: float = 60.0) -> bool:
    """Return whether all processes end within that time. Zombies count as ended: they may be reaped later."""
    end = time.monotonic() + within_s
    while time.monotonic() < end:
        if not any(_lives(pid) for pid in pids):
            return True
        time.sleep(0.05)
    return False


def no_children_but(before: set[psutil.Process], within_s: float = 60.0) -> bool:
    """Return whether all processes below this one end within that time, but for those that were there before."""
    return gone([child.pid for child in psutil.Process().children(recursive=True) if child not in before], within_s)


def _lives(pid: int) -> bool:
    try:
        return psutil.Process(pid).status() != "zombie"
    except psutil.NoSuchProcess:
        return False
