"""Owners of servers, and the removal of servers whose owner is dead.

Every process and container that the pool starts carries its owner's mark (an environment variable or a label). An owner
that ends, in whatever way, takes its servers with it (serving.py, container_reaper in containers.py); a server that
survives is found by its mark at the next start.
"""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import astuple, dataclass
from functools import cache
from pathlib import Path
from typing import Self

OWNER_VARIABLE = "SKYRL_OPENENV_OWNER"  # in the environment of a process
OWNER_LABEL = "skyrl.openenv.owner"  # of a container
FOLDER_PREFIX = "skyrl-openenv-"


@dataclass(frozen=True, slots=True)
class Owner:
    """A process, distinguished from every other that had or will have the same pid."""

    boot: str  # of the machine, and the pid namespace
    pid: int
    started: str  # in the system's own unit

    def __str__(self) -> str:
        return "|".join(map(str, astuple(self)))

    @classmethod
    def parse(cls, mark: str) -> Self | None:
        boot, _, rest = mark.partition("|")
        pid, _, started = rest.partition("|")
        return cls(boot, int(pid), started) if pid.isdigit() else None

    @property
    def is_of_this_boot(self) -> bool:
        """True if the owner is of this boot, machine and pid namespace, so that we can know whether it lives."""
        return self.boot == _boot()

    @property
    def is_dead(self) -> bool:
        return self.is_of_this_boot and _started(self.pid) != self.started


def this_process() -> Owner:
    return Owner(_boot(), os.getpid(), _started(os.getpid()) or "")


def owner_folder() -> Path:
    """Return this process's folder for its containers' sockets, removed with the process or at the next start."""
    return _folder_of(os.getpid())


@cache
def _folder_of(pid: int) -> Path:
    folder = Path(tempfile.mkdtemp(prefix=f"{FOLDER_PREFIX}{pid}-", dir=_short_temporary_folder()))
    (folder / "owner").write_text(str(this_process()))
    return folder


def reap_processes() -> int:
    """Kill servers of ours whose owner is dead. Returns how many there were."""
    orphans = [pid for pid, mark in _marked_processes() if (owner := Owner.parse(mark)) and owner.is_dead]
    for pid in orphans:
        try:
            os.kill(pid, signal.SIGKILL)
        except OSError:  # it ended by itself
            continue
    return len(orphans)


def reap_folders() -> None:
    """Remove the socket folders of dead owners."""
    for note in _short_temporary_folder().glob(f"{FOLDER_PREFIX}*/owner"):
        try:
            owner = Owner.parse(note.read_text())
        except OSError:  # another user's
            continue
        if owner is not None and owner.is_dead:
            shutil.rmtree(note.parent, ignore_errors=True)


def is_orphan(mark: str, container_state: str) -> bool:
    """Return whether a container's owner is dead, or is of another boot and the container has stopped."""
    owner = Owner.parse(mark)
    if owner is None:
        return False
    return owner.is_dead or (not owner.is_of_this_boot and container_state in ("exited", "dead"))


def _marked_processes() -> Iterator[tuple[int, str]]:
    start = f"{OWNER_VARIABLE}=".encode()
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            variables = (folder / "environ").read_bytes().split(b"\0")
        except OSError:  # another user's, or gone
            continue
        for variable in variables:
            if variable.startswith(start):
                yield int(folder.name), variable.removeprefix(start).decode(errors="replace")


@cache
def _boot() -> str:
    if sys.platform == "linux":
        namespace = os.readlink("/proc/self/ns/pid")
        return f"{Path('/proc/sys/kernel/random/boot_id').read_text().strip()} {namespace}"
    return _output("sysctl", "-n", "kern.boottime")


def _started(pid: int) -> str | None:
    """Return when a process started, in the system's unit; None if it does not exist or is a zombie."""
    if sys.platform != "linux":
        return _output("ps", "-o", "lstart=", "-p", str(pid)) or None
    try:
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()  # from field 3 on: see proc(5)
    except OSError:
        return None
    return None if fields[0] in "ZX" else fields[19]


def _output(*command: str) -> str:
    return subprocess.run(command, capture_output=True, text=True, check=False).stdout.strip()


def _short_temporary_folder() -> Path:
    """Return a temporary folder with a short path: a socket's path may have at most 107 characters."""
    usual = Path(tempfile.gettempdir())
    return usual if len(str(usual)) < 40 else Path("/tmp")
