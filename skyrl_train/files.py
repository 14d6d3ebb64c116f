"""Files and folders that exist whole or not at all, whatever kills the process that writes them."""

from __future__ import annotations

import fcntl
import os
import re
import shutil
from collections.abc import Generator
from contextlib import contextmanager, suppress
from pathlib import Path

from safetensors import SafetensorError

WRITING, REMOVING = ".writing", ".removing"  # names that only an unfinished write or removal leaves behind


def user_path(path: Path | str) -> Path:
    """Return the path with ~ as the home folder. `~x`, where x is no user, stays as it is and is then not found."""
    return Path(os.path.expanduser(path))  # where Path.expanduser raises a RuntimeError


def told(error: Exception) -> str:
    """Return what an error says; of the system's, the path and the reason without its number."""
    if isinstance(error, OSError) and error.strerror and error.filename is not None:
        return f"{error.filename}: {error.strerror}"
    return str(error)


@contextmanager
def naming(path: Path) -> Generator[None]:
    """Put the path into an OSError that has none: a full disk is met while writing, where Python knows no name.

    What safetensors says of the system becomes an OSError, too.
    """
    try:
        yield
    except OSError as error:
        if error.filename is None and error.errno is not None:
            error.filename = str(path)
        if error.errno is None:  # numpy's, where a disk takes no more
            raise OSError(f"cannot write {path}: {error}") from error
        raise
    except SafetensorError as error:
        if code := re.search(r"\(os error (\d+)\)", str(error)):
            raise OSError(int(code[1]), os.strerror(int(code[1])), str(path)) from error
        raise


def write_whole(path: Path, content: bytes) -> None:
    """Replace `path` by `content`: after a crash it holds the old bytes or the new ones."""
    path.parent.mkdir(parents=True, exist_ok=True)
    unfinished = path.with_name(path.name + WRITING)
    with naming(path), unfinished.open("wb") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())
    unfinished.replace(path)
    sync_folder(path.parent)


@contextmanager
def whole_file(path: Path) -> Generator[Path]:
    """Yield a path to write to, which takes the name `path` only when the block ends well and all is on the disk."""
    path.parent.mkdir(parents=True, exist_ok=True)
    unfinished = path.with_name(path.name + WRITING)
    try:
        with naming(path):
            yield unfinished
        _sync(unfinished)
    except BaseException:
        unfinished.unlink(missing_ok=True)
        raise
    unfinished.replace(path)
    sync_folder(path.parent)


@contextmanager
def whole_folder(path: Path) -> Generator[Path]:
    """An empty folder to fill, which takes the name `path` only when the block ends well and all is on the disk.

    An older folder of that name goes only once the new one is complete. An error removes the unfinished folder.
    ValueError while another process writes the same one.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    unfinished = path.with_name(path.name + WRITING)
    if _is_being_written(unfinished):
        raise ValueError(f"another process is writing {path} at this moment; wait for it, or give another place")
    if unfinished.exists():
        shutil.rmtree(unfinished)
    unfinished.mkdir()
    with _claimed(unfinished):
        try:
            yield unfinished
            sync_tree(unfinished)
        except BaseException:
            shutil.rmtree(unfinished, ignore_errors=True)
            raise
        remove_folder(path)
        unfinished.rename(path)
    sync_folder(path.parent)


@contextmanager
def _claimed(folder: Path) -> Generator[None]:
    """Hold an exclusive lock on a folder, where the file system has locks."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        with suppress(OSError):
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        yield
    finally:
        os.close(descriptor)


def _is_being_written(folder: Path) -> bool:
    """Return whether a process that lives has claimed the folder."""
    try:
        descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    except OSError:
        return False
    try:
        fcntl.flock(descriptor, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    except OSError:  # a file system without locks
        return False
    finally:
        os.close(descriptor)
    return False


def remove_folder(path: Path) -> None:
    """Remove a folder, if it is there, so that no half of it ever carries its name."""
    if not path.exists():
        return
    leaving = path.with_name(path.name + REMOVING)
    if leaving.exists():
        shutil.rmtree(leaving)
    path.rename(leaving)
    shutil.rmtree(leaving)


def remove_leftovers(folder: Path) -> list[Path]:
    """Remove what killed writes and removals left directly in `folder`; returns what was removed.

    A folder that another process writes now, as `skyrl export` may, is none.
    """
    found = sorted(p for p in folder.glob("*") if p.name.endswith((WRITING, REMOVING)))
    leftovers = [p for p in found if not _is_being_written(p)]
    for path in leftovers:
        if path.is_dir():
            shutil.rmtree(path)
        else:
            path.unlink()
    return leftovers


def folder_bytes(folder: Path) -> int:
    """Return the bytes of all files in a folder and below; 0 if there is none."""
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())


def byte_size(num_bytes: int) -> str:
    """Return a number of bytes for people: "0.27 GB" or "1.4 MB"."""
    return f"{num_bytes / 1e9:.2f} GB" if num_bytes >= 1e8 else f"{num_bytes / 1e6:.1f} MB"


def sync_tree(folder: Path) -> None:
    """Bring every file and folder below `folder`, and `folder` itself, to the disk."""
    for parent, _, names in os.walk(folder, topdown=False):
        for name in names:
            _sync(Path(parent) / name)
        sync_folder(Path(parent))


def sync_folder(folder: Path) -> None:
    """Bring the names in `folder` to the disk (a rename is safe only after this)."""
    _sync(folder)


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        with naming(path):
            os.fsync(descriptor)
    finally:
        os.close(descriptor)
