"""The folder of a run (`trainer.ckpt_path`): its layout, its lock, and how it is rewound or moved aside.

global_step_N/  latest_ckpt_global_step.txt      checkpoints (checkpoint.py)
metrics.jsonl                                     one line per step (metrics.py)
trajectories/{train,eval}_step_N.jsonl.zst        every episode (records/trajectories.py)
trajectories/advantages_step_N.jsonl.zst          of its tokens (records/advantages.py)
profile/step_N.json.gz                            where its time went, with trainer.profile (records/profile.py)
model/                                            the model in Hugging Face format (model_folder.py)
run.json  report.html  summary.json  tensorboard/
previous/<n>/                                     an earlier run that was moved aside
"""

from __future__ import annotations

import fcntl
import json
import math
import os
import re
import shutil
import struct
import sys
from collections.abc import Generator
from contextlib import contextmanager
from pathlib import Path

from loguru import logger

from skyrl_train.files import user_path, write_whole
from skyrl_train.run.digests import DIGESTS

LATEST, METRICS, TRAJECTORIES, REPORT, SUMMARY = (
    "latest_ckpt_global_step.txt", "metrics.jsonl", "trajectories", "report.html", "summary.json",
)  # fmt: skip
RUN_INFO, TENSORBOARD, PROFILE, PREVIOUS, LOCK = "run.json", "tensorboard", "profile", "previous", ".lock"
MODEL, ORIGIN = "model", "skyrl.json"  # ORIGIN: in an exported model's folder, the run that it comes from
USUAL_FOLDERS = ("~/ckpts", "runs")  # below them lie the runs of our scripts, and of a project that follows docs/
CHECKPOINT_NAME = re.compile(r"global_step_(\d+)")
TRAJECTORY_NAME = re.compile(r"(train|eval)_step_(\d+)\.jsonl\.zst")
ADVANTAGES_NAME = re.compile(r"advantages_step_(\d+)\.jsonl\.zst")
PROFILE_NAME = re.compile(r"step_(\d+)\.json\.gz")


def usual_folders() -> list[str]:
    """Return where runs are looked for if nobody says: in USUAL_FOLDERS, else in the current folder."""
    return [folder for folder in USUAL_FOLDERS if user_path(folder).is_dir()] or ["."]


@contextmanager
def run_lock(folder: Path) -> Generator[None]:
    """Hold the run's folder: a second process that asks for it is refused. The lock dies with the process."""
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / LOCK).open("a+") as file:
        try:
            fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except (BlockingIOError, PermissionError):
            file.seek(0)
            raise RuntimeError(
                f"another trainer (process {file.read().strip() or 'unknown'}) is writing into {folder}. "
                "Wait for it, end it, or give this run its own trainer.ckpt_path"
            ) from None
        file.truncate(0)
        file.write(str(os.getpid()))
        file.flush()
        try:
            yield
        finally:
            fcntl.lockf(file, fcntl.LOCK_UN)


def writing_process(folder: Path) -> int | None:
    """Return the process that holds the run's folder, which it does until it ends; None if there is none.

    The lock is only looked at, never taken, so that a trainer that starts meanwhile is not refused.
    """
    path = folder / LOCK
    if not path.is_file() or sys.platform != "linux":
        return None
    with path.open("rb") as file:  # a run of another user can be read, and not written
        asked = struct.pack("hhqqi", fcntl.F_WRLCK, os.SEEK_SET, 0, 0, 0)
        answer = struct.unpack("hhqqi", fcntl.fcntl(file, fcntl.F_GETLK, asked))
    return None if answer[0] == fcntl.F_UNLCK else answer[4]


def refuse_inside(path: Path) -> None:
    """Raise ValueError for a place in a checkpoint, whose digests name all its files, or in an exported model."""
    for place in (path.resolve(), *path.resolve().parents):
        if CHECKPOINT_NAME.fullmatch(place.name) and (place / DIGESTS).is_file():
            raise ValueError(f"{path} lies in the checkpoint {place}, which would be damaged; give another place")
        if (place / ORIGIN).is_file():
            raise ValueError(
                f"{path} lies in the exported model {place}, which the next export replaces; give another place"
            )


def run_around(path: Path) -> Path | None:
    """Return the folder of the run that a file or folder belongs to; None if it lies in none."""
    places = (place for place in path.absolute().parents if place.name != PREVIOUS)
    return next((place for place in places if any((place / name).is_file() for name in (RUN_INFO, METRICS))), None)


def where_its_run_is(path: Path) -> str:
    """Return the end of a refusal: where the run is that the path belongs to; "" if it belongs to none."""
    around = run_around(path)
    return "" if around is None else f". It belongs to the run in {around}: name that folder"


def checkpoint_steps(folder: Path) -> list[int]:
    """Return the steps with a checkpoint, ascending. A damaged one counts, so that loading it reports the damage."""
    found = [(path, CHECKPOINT_NAME.fullmatch(path.name)) for path in folder.glob("global_step_*")]
    return sorted(int(match[1]) for path, match in found if match and path.is_dir() and any(path.iterdir()))


def trajectory_steps(folder: Path) -> dict[Path, tuple[str, int]]:
    """Return every trajectory file of the run with its phase ("train" or "eval") and step, ordered by step."""
    found = {}
    for path in (folder / TRAJECTORIES).glob("*.jsonl.zst"):
        match = TRAJECTORY_NAME.fullmatch(path.name)
        if match:
            found[path] = (match[1], int(match[2]))
    return dict(sorted(found.items(), key=lambda item: (item[1][1], item[1][0])))


def profile_steps(folder: Path) -> dict[Path, int]:
    """Return every profile trace of the run with its step, ordered by step."""
    return _numbered(folder / PROFILE, PROFILE_NAME)


def advantages_steps(folder: Path) -> dict[Path, int]:
    """Return every file of advantages of the run with its step, ordered by step."""
    return _numbered(folder / TRAJECTORIES, ADVANTAGES_NAME)


def _numbered(folder: Path, name: re.Pattern[str]) -> dict[Path, int]:
    found = {path: name.fullmatch(path.name) for path in folder.glob("*")}
    steps = {path: int(match[1]) for path, match in found.items() if match}
    return dict(sorted(steps.items(), key=lambda item: item[1]))


def move_aside(folder: Path) -> Path | None:
    """Move an earlier run's files into `previous/<n>/`. Return that folder, or None if there was no run."""
    checkpoints = sorted(p for p in folder.glob("global_step_*") if CHECKPOINT_NAME.fullmatch(p.name))
    names = (METRICS, TRAJECTORIES, RUN_INFO, REPORT, SUMMARY, TENSORBOARD, PROFILE, MODEL)
    # Checkpoints last: a move that is killed half-way still shows a run that can be resumed.
    present = [path for path in (*(folder / name for name in names), *checkpoints, folder / LATEST) if path.exists()]
    if not present:
        return None
    target = _next_previous(folder)
    for path in present:
        path.rename(target / path.name)
    return target


def rewind(folder: Path, step: int | None) -> Path | None:
    """Remove the records after `step` (None: all), so that no step is recorded twice after a resume.

    Later checkpoints, which exist only if the user went back to an older one, are kept in `previous/<n>/` with the
    trajectories and metrics that belong to them. Return that folder. A second call changes nothing more.
    """
    last = -1 if step is None else step
    later = [s for s in checkpoint_steps(folder) if s > last]
    target = _next_previous(folder) if later else None
    episodes = {path: path_step for path, (_, path_step) in trajectory_steps(folder).items()}
    for path, path_step in (episodes | advantages_steps(folder) | profile_steps(folder)).items():
        if path_step > last:
            if target:
                (target / path.parent.name).mkdir(exist_ok=True)
                path.rename(target / path.parent.name / path.name)
            else:
                path.unlink()
    if target and (folder / METRICS).exists():
        shutil.copy2(folder / METRICS, target / METRICS)
    truncate_metrics(folder / METRICS, last)
    if target:
        write_whole(folder / LATEST, str(last).encode())
        for later_step in later:
            (folder / f"global_step_{later_step}").rename(target / f"global_step_{later_step}")
    return target


def truncate_metrics(path: Path, last_step: int) -> None:
    """Keep the lines of steps up to `last_step`, without an incomplete last line, which a killed writer leaves.

    A damaged line is removed as well, with a warning.
    """
    if not path.exists():
        return
    content = path.read_bytes()
    lines = content.splitlines(keepends=True)
    steps = [_line_step(line) for line in lines]
    for number, (line, step) in enumerate(zip(lines, steps, strict=True), start=1):
        if step == math.inf and line.endswith(b"\n"):
            logger.warning(f"line {number} of {path} is damaged and was removed: its step is missing in the report")
    kept = b"".join(line for line, step in zip(lines, steps, strict=True) if step <= last_step)
    if kept != content:
        write_whole(path, kept)


def _line_step(line: bytes) -> float:
    """Return the step of a line, or infinity for a line that is not whole."""
    if not line.endswith(b"\n"):
        return math.inf
    try:
        return int(json.loads(line)["step"])
    except (ValueError, KeyError, TypeError, OverflowError, RecursionError):
        return math.inf


def _next_previous(folder: Path) -> Path:
    taken = [int(p.name) for p in (folder / PREVIOUS).glob("*") if p.name.isdigit()]
    target = folder / PREVIOUS / str(max(taken, default=0) + 1)
    target.mkdir(parents=True)
    return target
