"""Temporary folders that are removed after use; after a kill -9, at the next start of any of our processes.

A process holds a lock (flock) on each of its folders, which the kernel releases however the process ends. A folder of
ours without a lock therefore belongs to a dead process.
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

COMPILER, PROGRAM = "skyrl-c-", "skyrl_gym_"  # prefixes of folder names; older versions made PROGRAM's
FETCHED, EXPORTED = "skyrl-fetching-", "skyrl-export-"
PREFIXES = (COMPILER, PROGRAM, FETCHED, EXPORTED)


@contextmanager
def temporary_folder(prefix: str) -> Generator[Path]:
    """Make an empty folder whose name begins with `prefix`, and remove it when the block ends.

    The first call in a process also removes the folders of dead processes.
    """
    _reap_once()
    folder, lock = _held_folder(prefix)
    try:
        yield folder
    finally:
        _remove(folder)
        os.close(lock)


def reap_temporary_folders() -> list[Path]:
    """Remove this user's folders whose process is dead. Returns the removed folders."""
    places = Path(tempfile.gettempdir())
    return [folder for prefix in PREFIXES for folder in places.glob(f"{prefix}*") if _is_reaped(folder)]


@cache
def _reap_once() -> None:
    reap_temporary_folders()


def _held_folder(prefix: str) -> tuple[Path, int]:
    """Return a new folder and the descriptor that holds its lock."""
    while True:
        folder = Path(tempfile.mkdtemp(prefix=prefix))
        with suppress(FileNotFoundError):
            lock = os.open(folder, os.O_RDONLY)
            fcntl.flock(lock, fcntl.LOCK_EX)
            if folder.exists():
                return folder, lock
            os.close(lock)  # another process removed it before the lock was taken


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
    except OSError:  # locked: its owner is alive
        return False
    finally:
        os.close(lock)
    return not folder.exists()


def _remove(folder: Path) -> None:
    """Remove a folder, also the parts that a program has made unreadable."""
    for parent, names, _ in os.walk(folder):
        for name in names:
            if not os.path.islink(path := os.path.join(parent, name)):
                with suppress(OSError):
                    os.chmod(path, 0o700)
    shutil.rmtree(folder, ignore_errors=True)
