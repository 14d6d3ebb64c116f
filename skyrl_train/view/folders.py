"""Finds the runs below the folders that the user gave, and opens no file that lies outside them."""

from __future__ import annotations

import fcntl
import hashlib
import os
import struct
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from skyrl_train.files import told
from skyrl_train.run.run_folder import CHECKPOINT_NAME, LOCK, METRICS, PROFILE, RUN_INFO, TENSORBOARD, TRAJECTORIES

NOT_RUNS = {TRAJECTORIES, PROFILE, TENSORBOARD, "exports", "node_modules", "__pycache__"}
MAX_DEPTH, MAX_FOLDERS = 8, 50_000  # below a given folder


@dataclass(frozen=True)
class RunFolder:
    """A folder with the records of a run. root: the folder, given by the user, in which it was found."""

    path: Path
    root: Path

    @property
    def id(self) -> str:
        """Return a short name for addresses of the page, the same at every start."""
        return hashlib.sha256(os.fsencode(self.path)).hexdigest()[:12]

    @property
    def name(self) -> str:
        """Return the path below the root's parent: two roots may hold runs of one name."""
        return str(self.path.relative_to(self.root.parent)) or str(self.path)

    def file(self, name: str) -> Path:
        """Return a file of the run. OSError unless it is a plain file inside the root, links resolved."""
        path = self.path / name
        real = path.resolve()
        if not real.is_relative_to(self.root):
            raise PermissionError(f"{path} is a link that leads out of {self.root}; give that folder, too")
        if real.exists() and not real.is_file():
            raise PermissionError(f"{path} is not a plain file")
        return real

    def is_written_now(self) -> bool:
        """Return whether a trainer holds the run's lock. False where the system cannot say."""
        if not sys.platform.startswith("linux"):
            return False
        question = struct.pack("hhqqi", fcntl.F_RDLCK, os.SEEK_SET, 0, 0, 0)
        try:
            with self.file(LOCK).open("rb") as file:
                answer = fcntl.fcntl(file, fcntl.F_GETLK, question)
        except OSError:
            return False
        return struct.unpack("hhqqi", answer)[0] != fcntl.F_UNLCK


def given_folder(text: str) -> Path:
    """Return the folder with links resolved. ValueError if there is none."""
    try:
        path = Path(text).expanduser().resolve()
        found = path.is_dir()
    except (OSError, RuntimeError, ValueError) as error:
        raise ValueError(
            f"{text!r} cannot be read ({told(error)}); give the folder of a run, or one that holds runs"
        ) from error
    if not found:
        raise ValueError(f"{text!r} is no folder; give trainer.ckpt_path of a run, or a folder that holds runs")
    return path


def find_runs(root: Path) -> Iterator[RunFolder]:
    """Yield the runs in and below a folder. Links to folders are not followed."""
    waiting, seen = [(root, 0)], 0
    while waiting and seen < MAX_FOLDERS:
        folder, depth = waiting.pop()
        seen += 1
        try:
            entries = {entry.name: entry for entry in os.scandir(folder)}
        except OSError:
            continue
        if not entries.keys().isdisjoint((RUN_INFO, METRICS, TRAJECTORIES)):
            yield RunFolder(folder, root)
        if depth < MAX_DEPTH:
            waiting += [(folder / name, depth + 1) for name, entry in sorted(entries.items()) if _may_hold_runs(entry)]


def _may_hold_runs(entry: os.DirEntry[str]) -> bool:
    if entry.name.startswith(".") or entry.name in NOT_RUNS or CHECKPOINT_NAME.fullmatch(entry.name):
        return False
    try:
        return entry.is_dir(follow_symlinks=False)
    except OSError:
        return False
