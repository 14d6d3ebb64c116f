"""Temporary folders that go with their process: at once when it is done with them, at the next start after a kill -9.

A process holds a lock (flock) on each of its folders, which the system takes back however the process ends. So a folder
of ours that nobody holds is a dead process's.
"""

from __future__ import annotations

import fcntl
import os
import shutil
import tempfile
from collections.abc import Generator
from contextlib import contextmanager, suppress
from functools import cache
from pathlib import Path

COMPILER, PROGRAM = "skyrl-c-", "skyrl_gym_"  # how the names of the folders begin; a program's is from older versions
PREFIXES = (COMPILER, PROGRAM)


@contextmanager
def temporary_folder(prefix: str) -> Generator[Path]:
    """An empty folder of a name that begins so, until the block ends. The first one of a process reaps dead ones'."""
    _reap_once()
    folder, lock = _held_folder(prefix)
    try:
        yield folder
    finally:
        _remove(folder)
        os.close(lock)


def reap_temporary_folders() -> list[Path]:
    """Remove our user's folders of processes that are dead; returns those that are gone."""
    places = Path(tempfile.gettempdir())
    return [folder for prefix in PREFIXES for folder in places.glob(f"{prefix}*") if _is_reaped(folder)]


@cache
def _reap_once() -> None:
    reap_temporary_folders()


def _held_folder(prefix: str) -> tuple[Path, int]:
    """A new folder, and the descriptor that holds its lock."""
    while True:
        folder = Path(tempfile.mkdtemp(prefix=prefix))
        with suppress(FileNotFoundError):
            lock = os.open(folder, os.O_RDONLY)
            fcntl.flock(lock, fcntl.LOCK_EX)
            if folder.exists():
                return folder, lock
            os.close(lock)  # another process took it for a dead one's before it was held, and removed it


def _is_reaped(folder: Path) -> bool:
    try:
        lock = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW)
    except OSError:  # another user's, no folder, or gone by now
        return False
    try:
        if os.fstat(lock).st_uid != os.getuid():
            return False
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        _remove(folder)
    except OSError:  # its owner lives
        return False
    finally:
        os.close(lock)
    return not folder.exists()


def _remove(folder: Path) -> None:
    """Also what a program has made unreadable."""
    for parent, names, _ in os.walk(folder):
        for name in names:
            if not os.path.islink(path := os.path.join(parent, name)):
                with suppress(OSError):
                    os.chmod(path, 0o700)
    shutil.rmtree(folder, ignore_errors=True)
