"""How many sessions this process may hold: each is a socket, and the kernel limits the open files of a process."""

from __future__ import annotations

import os
import sys
from pathlib import Path

ENOUGH = 65_536  # descriptors; more would only make the system's tables larger
LEAST_RESERVE = 64  # descriptors for everything that is no session: models, checkpoints, servers' pipes, health checks
USUALLY_OPEN = 64  # where the system does not tell how many are


def raise_limit() -> int | None:
    """Raise this process's soft limit of open files towards its hard limit. Return it; None where there is no limit."""
    if sys.platform == "win32":
        return None
    import resource

    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft == resource.RLIM_INFINITY:
        return None
    wanted = ENOUGH if hard == resource.RLIM_INFINITY else min(ENOUGH, hard)
    if wanted > soft:
        try:
            resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, hard))
            soft = wanted
        except (ValueError, OSError):  # a system whose own limit is lower than the hard one
            pass
    return soft


def num_affordable(per_session: int = 1) -> int | None:
    """Return how many sessions of so many descriptors this process can hold beside what it has open and a reserve."""
    limit = raise_limit()
    if limit is None:
        return None
    try:
        num_open = len(os.listdir("/proc/self/fd" if Path("/proc/self/fd").is_dir() else "/dev/fd"))
    except OSError:
        num_open = USUALLY_OPEN
    reserve = max(LEAST_RESERVE, limit // 8)
    return max(1, (limit - num_open - reserve) // per_session)
