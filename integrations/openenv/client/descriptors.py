"""The number of sessions that this process can hold: each is a socket, and the kernel limits its open files."""

from __future__ import annotations

import os
import sys
from pathlib import Path

ENOUGH = 65_536  # descriptors; more would only make the system's tables larger
LEAST_RESERVE = 64  # descriptors for everything else: models, checkpoints, servers' pipes, health checks
USUALLY_OPEN = 64  # assumed where the system does not list open descriptors


def raise_limit() -> int | None:
    """Raise this process's soft limit of open files towards its hard limit. Return it; None if there is no limit."""
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
    """Return how many sessions, of `per_session` descriptors each, fit beside the open ones and a reserve.

    At least 1; None if there is no limit.
    """
    limit = raise_limit()
    if limit is None:
        return None
    try:
        num_open = len(os.listdir("/proc/self/fd" if Path("/proc/self/fd").is_dir() else "/dev/fd"))
    except OSError:
        num_open = USUALLY_OPEN
    reserve = max(LEAST_RESERVE, limit // 8)
    return max(1, (limit - num_open - reserve) // per_session)
