"""The store of every episode: one compressed file per step, written by a thread of its own.

trajectories/train_step_000001.jsonl.zst    trajectories/eval_step_000000.jsonl.zst
trajectories/advantages_step_000001.jsonl.zst (advantages.py)

A file ends with the number of its episodes, in a frame that zstd skips; without it, a file that was cut between two
frames would look whole.
"""

from __future__ import annotations

import io
from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any, BinaryIO, Literal

import zstandard

from skyrl_train.files import write_whole
from skyrl_train.run.records.advantages import advantages_path, write_advantages
from skyrl_train.run.records.episode import EpisodeRecord, episode_record
from skyrl_train.run.records.tokens import TokenTexts
from skyrl_train.run.run_folder import TRAJECTORIES, trajectory_steps
from skyrl_train.types import Batch, Sample, Trajectory

Phase = Literal["train", "eval"]
_END = b"\x50\x2a\x4d\x18" + (8).to_bytes(4, "little")  # a skippable frame (RFC 8878, 3.1.2) of 8 bytes: the number
MAX_WAITING = 4  # calls of add() that may wait for the disk before add() itself waits


class TrajectoryStore:
    """Keeps trajectories of a run. A failed write is raised by a later `add`, by `flush` or by `close`."""

    def __init__(self, run_folder: Path | str, tokenizer: Any) -> None:
        self.folder = Path(run_folder) / TRAJECTORIES
        self.token_texts = TokenTexts(tokenizer)
        self.begun: dict[Path, int] = {}  # file of this process -> its episodes; a file of an earlier one is replaced
        self.thread = ThreadPoolExecutor(max_workers=1, thread_name_prefix="trajectories")
        self.waiting: deque[Future[None]] = deque()

    def add(self, phase: Phase, step: int, trajectories: list[Trajectory]) -> None:
        """Keep these trajectories of a step. Returns before they are written, unless the disk lags far behind."""
        self._later(self._write, phase, step, list(trajectories))

    def add_advantages(self, step: int, samples: list[Sample], batch: Batch) -> None:
        """Keep the advantages of the step's samples, as `add` keeps its episodes."""
        names = [sample.trajectory_id for sample in samples]
        self._later(write_advantages, advantages_path(self.folder.parent, step), names, batch)

    def then(self, work: Callable[[], None]) -> None:
        """Do this in the store's thread, after everything that was added before is written."""
        self._later(work)

    def _later(self, work: Callable[..., None], *arguments: Any) -> None:
        while self.waiting and (self.waiting[0].done() or len(self.waiting) >= MAX_WAITING):
            self.waiting.popleft().result()
        self.waiting.append(self.thread.submit(work, *arguments))

    def flush(self) -> None:
        """Wait until everything is on the disk. Call it before a checkpoint is written."""
        while self.waiting:
            self.waiting.popleft().result()

    def close(self) -> None:
        try:
            self.flush()
        finally:
            self.thread.shutdown(wait=True)

    def _write(self, phase: Phase, step: int, trajectories: list[Trajectory]) -> None:
        path = trajectory_path(self.folder.parent, phase, step)
        num_before = self.begun.get(path)
        before = b"" if num_before is None else path.read_bytes()[: -len(_end(0))]
        lines = (episode_record(t, phase, step, self.token_texts).to_json() for t in trajectories)
        text = "".join(f"{line}\n" for line in lines)
        added = zstandard.ZstdCompressor(level=3, write_checksum=True).compress(text.encode())
        number = (num_before or 0) + len(trajectories)
        write_whole(path, before + added + _end(number))
        self.begun[path] = number


def trajectory_path(run_folder: Path, phase: Phase, step: int) -> Path:
    return run_folder / TRAJECTORIES / f"{phase}_step_{step:06d}.jsonl.zst"


def read_trajectories(path: Path | str) -> list[EpisodeRecord]:
    """Return the episodes of one file, in the order they were added."""
    return list(iterate_trajectories(Path(path)))


def iterate_trajectories(path: Path) -> Iterator[EpisodeRecord]:
    """Yield the episodes of a file, one in memory at a time. ValueError if the file is not as it was written."""
    with path.open("rb") as file:
        wanted, found = _number_at_the_end(file), 0
        reader = zstandard.ZstdDecompressor().stream_reader(file, read_across_frames=True)
        try:
            for line in io.TextIOWrapper(reader, encoding="utf-8"):
                yield EpisodeRecord.from_json(line)
                found += 1
        except (zstandard.ZstdError, ValueError, KeyError, TypeError) as error:
            raise ValueError(f"{path} is damaged ({error}); remove it, the other steps can still be read") from error
    if found != wanted:
        words = "is cut short" if wanted is None else f"is damaged: {found} of {wanted} episodes can be read"
        raise ValueError(f"{path} {words}; remove it, the other steps can still be read")


def _end(number: int) -> bytes:
    return _END + number.to_bytes(8, "little")


def _number_at_the_end(file: BinaryIO) -> int | None:
    """Return the number of episodes at the file's end, None if it is missing. Rewinds the file to its start."""
    file.seek(-min(len(_end(0)), file.seek(0, io.SEEK_END)), io.SEEK_END)
    end = file.read()
    file.seek(0)
    return int.from_bytes(end[len(_END) :], "little") if end.startswith(_END) and len(end) == len(_end(0)) else None


def trajectory_files(run_folder: Path | str, phase: Phase | None = None) -> dict[int, Path]:
    """Return step -> file of one phase; with phase None a train file is preferred to an eval file of the same step."""
    found: dict[int, Path] = {}
    for path, (file_phase, step) in trajectory_steps(Path(run_folder)).items():
        if phase in (None, file_phase):
            found[step] = path
    return found
