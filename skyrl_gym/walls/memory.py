"""Limit on the memory that all workers of a nursery hold together; the largest worker is killed when it is exceeded.

cgroup   if we may make one below our own: the kernel counts, and kills the largest worker
watch    else: a thread counts every tenth of a second, and kills the largest worker

If neither is fast enough, the kernel's out-of-memory killer takes a worker before it takes the trainer (FIRST_TO_GO).
"""

from __future__ import annotations

import contextlib
import os
import signal
import threading
import time
import uuid
from collections.abc import Iterator
from pathlib import Path

SHARE = 8  # all programs of one nursery together get 1/SHARE of this machine's memory
LEAST_BYTES = 1 << 30
WATCH_S = 0.1
PREFIX = "skyrl-programs"
# Command prefix: the kernel kills what follows first when memory runs out. Raising one's own score needs no privilege.
FIRST_TO_GO = ("/bin/sh", "-c", 'echo 1000 2>/dev/null >/proc/self/oom_score_adj; exec "$@"', "sh")


def memory_of_programs() -> int:
    """Return how many bytes all programs together may hold: an eighth of what this machine or container has."""
    total = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    for folder, version in _own_cgroups():
        with contextlib.suppress(OSError, ValueError):  # "max" is no number
            total = min(total, int((folder / LIMIT_FILES[version][0]).read_text()))
    return max(LEAST_BYTES, total // SHARE)


LIMIT_FILES = {  # by cgroup version: the file of the memory limit, the file of the swap limit
    1: ("memory.limit_in_bytes", "memory.memsw.limit_in_bytes"),
    2: ("memory.max", "memory.swap.max"),
}


class Cgroup:
    """A memory cgroup below our own.

    `close` removes it once empty; else the next `make` does when its owner is dead.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    @classmethod
    def make(cls, limit_bytes: int) -> Cgroup | None:
        """Return a new group; None if this process may not make one, as in most containers and for most users."""
        for parent, version in _own_cgroups():
            folder = parent / f"{PREFIX}-{os.getpid()}-{uuid.uuid4().hex[:8]}"
            try:
                if version == 2 and "memory" not in (parent / "cgroup.subtree_control").read_text().split():
                    continue
                _remove_forgotten(parent)
                folder.mkdir()
                limit, swap = LIMIT_FILES[version]
                (folder / limit).write_text(str(limit_bytes))
            except OSError:
                with contextlib.suppress(OSError):
                    folder.rmdir()
                continue
            with contextlib.suppress(OSError):  # many machines count no swap
                (folder / swap).write_text("0" if version == 2 else str(limit_bytes))
            return cls(folder)
        return None

    def take(self, process_id: int) -> bool:
        """Move a process and its descendants into the group. Processes that they start later are born in it.

        Returns False if the kernel refuses.
        """
        try:
            (self.folder / "cgroup.procs").write_text(str(process_id))
            for child in descendants(process_id):
                (self.folder / "cgroup.procs").write_text(str(child))
        except OSError:
            return False
        return True

    def close(self) -> None:
        for _ in range(50):
            try:
                self.folder.rmdir()
                return
            except FileNotFoundError:
                return
            except OSError:  # a process is still ending
                time.sleep(0.01)


class MemoryWatch:
    """Thread that kills the largest process below a nursery while all of them together hold too much memory."""

    def __init__(self, nursery: int, limit_bytes: int) -> None:
        self._nursery, self._limit_bytes = nursery, limit_bytes
        self._stopped = threading.Event()
        threading.Thread(target=self._watch, name="memory-watch", daemon=True).start()

    def close(self) -> None:
        self._stopped.set()

    def _watch(self) -> None:
        while not self._stopped.wait(WATCH_S):
            shared = private_bytes(self._nursery)  # pages shared with the nursery are not counted for a worker
            held = {process: max(private_bytes(process) - shared, 0) for process in descendants(self._nursery)}
            while sum(held.values()) > self._limit_bytes:
                largest = max(held, key=held.__getitem__)
                del held[largest]
                with contextlib.suppress(ProcessLookupError, PermissionError):
                    os.kill(largest, signal.SIGKILL)


def bound(process_id: int, limit_bytes: int) -> Cgroup | MemoryWatch:
    """Limit the memory of a nursery's workers, by a cgroup or else by a MemoryWatch.

    Call it before the first worker is forked. process_id: of the nursery, or of the bubblewrap around it.
    """
    group = Cgroup.make(limit_bytes)
    if group is not None:
        if group.take(process_id):
            return group
        group.close()
    return MemoryWatch([process_id, *descendants(process_id)][-1], limit_bytes)


def descendants(process_id: int) -> list[int]:
    found = []
    with contextlib.suppress(OSError, ValueError):  # it has ended, or this kernel does not list children
        for task in Path(f"/proc/{process_id}/task").iterdir():
            for child in map(int, (task / "children").read_text().split()):
                found += [child, *descendants(child)]
    return found


def private_bytes(process_id: int) -> int:
    """Return the resident memory that is not backed by files; 0 for a process that has ended.

    Shared memory, such as mmap.mmap(-1, size) of a program, counts: /proc/PID/statm takes it for that of a file.
    """
    try:
        lines = Path(f"/proc/{process_id}/status").read_text(errors="replace").splitlines()
    except OSError:
        return 0
    return sum(int(line.split()[1]) << 10 for line in lines if line.startswith(("RssAnon:", "RssShmem:")))


def _own_cgroups() -> Iterator[tuple[Path, int]]:
    """Yield (folder, cgroup version) of the groups of this process that can count memory."""
    try:
        mounts = [line.split() for line in Path("/proc/self/mounts").read_text().splitlines()]
        groups = [line.split(":", 2) for line in Path("/proc/self/cgroup").read_text().splitlines()]
    except OSError:
        return
    for _, mount, kind, options, *_ in mounts:
        for number, controllers, path in groups:
            is_second = kind == "cgroup2" and number == "0"
            if is_second or (
                kind == "cgroup" and "memory" in options.split(",") and "memory" in controllers.split(",")
            ):
                below = Path(mount, path.lstrip("/"))
                yield (below if below.is_dir() else Path(mount)), 2 if is_second else 1


def _remove_forgotten(parent: Path) -> None:
    """Remove the groups whose owner was killed."""
    for folder in parent.glob(f"{PREFIX}-*"):
        owner = folder.name.removeprefix(f"{PREFIX}-").partition("-")[0]
        if owner.isdigit() and not Path("/proc", owner).exists():
            with contextlib.suppress(OSError):
                folder.rmdir()
