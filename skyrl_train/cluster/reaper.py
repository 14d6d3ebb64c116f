"""A process that outlives the driver by moments: once the driver is gone, it ends what the driver has left running.

Started as `python -I reaper.py MARK PID`. The processes that Ray starts first carry the run's mark in their
environment; the others descend from them. Those overwrite their environment with a title, and lose their parent when
that is killed: so the reaper notes every two seconds who there is, and which shared memory they map as soon as there is
some new one (the processes of a vLLM engine leave theirs behind when they are killed). It needs the standard library
alone.
"""

from __future__ import annotations

import os
import signal
import sys
import time
from collections.abc import Iterable
from contextlib import suppress
from pathlib import Path
from typing import NamedTuple

VARIABLE = "SKYRL_RUN_MARK"
LOOK_S, NOTE_S = 0.2, 2.0  # between two looks at the driver, and between two at all processes
MEMORY_S = 1.0  # between two looks at what they map, at least: it costs milliseconds for each
SHARED_MEMORY = "/dev/shm/"
SWEEP_S = 8.0  # for which it looks for what is left
Known = dict[int, str]  # process -> when it began, which tells it from a later one of this number


class Seen(NamedTuple):
    """A live process of this machine."""

    parent: int
    began: str
    is_marked: bool


def main(mark: str, driver: int) -> None:
    """Wait until the driver is dead or asks for it with SIGTERM; then kill all that belongs to the mark."""
    asked: list[int] = []
    signal.signal(signal.SIGTERM, lambda number, frame: asked.append(number))
    for number in (signal.SIGINT, signal.SIGHUP):
        signal.signal(number, signal.SIG_IGN)
    known: Known = {}
    memory: set[str] = set()
    seen = set(os.listdir(SHARED_MEMORY))
    noted, looked, num_looks = 0.0, 0.0, 0
    while os.getppid() == driver and not asked:
        names = set(os.listdir(SHARED_MEMORY))
        num_looks = 2 if names - seen else num_looks  # it may have been made, and not be mapped yet
        seen = names
        is_due = num_looks > 0 and time.monotonic() - looked > MEMORY_S
        if is_due or time.monotonic() - noted > NOTE_S:
            known, noted = belonging(mark, known), time.monotonic()
        if is_due:
            memory, looked, num_looks = memory | shared_memory_of(known), time.monotonic(), num_looks - 1
        time.sleep(LOOK_S)
    known = belonging(mark, known)
    memory |= shared_memory_of(known)
    deadline = time.monotonic() + SWEEP_S
    while (known := belonging(mark, known)) and time.monotonic() < deadline:
        for pid in known:
            try:
                os.kill(pid, signal.SIGKILL)
            except ProcessLookupError:
                continue
        time.sleep(0.05)
    for path in memory - shared_memory_of(processes(mark)):  # of nobody: a cluster that was joined goes on
        with suppress(OSError):
            os.unlink(path)


def belonging(mark: str, known: Known) -> Known:
    """Return those that carry the mark or are known, as far as they live, and all of their descendants."""
    there = processes(mark)
    found = {pid for pid, seen in there.items() if seen.is_marked or known.get(pid) == seen.began}
    grown = True
    while grown:
        children = {pid for pid, seen in there.items() if seen.parent in found} - found
        found |= children
        grown = bool(children)
    return {pid: there[pid].began for pid in found - {os.getpid()}}


def shared_memory_of(pids: Iterable[int]) -> set[str]:
    """Return the files of shared memory that any of these processes maps, as far as they have a name still.

    They are found by inode: a semaphore is mapped under another name, which is gone, than the one that it has.
    """
    inodes: set[int] = set()
    for pid in pids:
        try:
            lines = Path(f"/proc/{pid}/maps").read_text(errors="replace").splitlines()
        except OSError:  # ended meanwhile
            continue
        inodes |= {int(line.split()[4]) for line in lines if SHARED_MEMORY in line}
    with os.scandir(SHARED_MEMORY) as files:
        return {file.path for file in files if file.inode() in inodes}


def processes(mark: str) -> dict[int, Seen]:
    """Return every process of this machine that has not ended."""
    wanted, found = f"{VARIABLE}={mark}".encode(), {}
    for entry in Path("/proc").iterdir():
        if not entry.name.isdigit():
            continue
        try:
            state, parent, *rest = (entry / "stat").read_text(errors="replace").rpartition(")")[2].split()
        except OSError:  # ended meanwhile
            continue
        try:
            is_marked = wanted in (entry / "environ").read_bytes().split(b"\0")
        except OSError:  # another user's
            is_marked = False
        if state != "Z":
            found[int(entry.name)] = Seen(int(parent), rest[17], is_marked)
    return found


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]))
