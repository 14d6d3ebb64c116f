"""Run a program that a model wrote in a separate process, with limits, in the strongest sandbox of this machine.

The process is forked from a prepared one (walls/nursery.py) and sees no file, process, network or variable of ours
(walls/wall.py); without bubblewrap it can open no file at all. It may start threads and no process. On a machine
without any wall programs are refused, unless OPENENV_ACCEPT_UNSAFE=1 accepts the risk.
"""

from __future__ import annotations

import math
import os
import tempfile
import threading
from dataclasses import dataclass
from typing import BinaryIO

from skyrl_gym.core import EnvFailure
from skyrl_gym.walls.memory import memory_of_programs
from skyrl_gym.walls.nursery import Interpreter, Nursery
from skyrl_gym.walls.python_worker import PREPARE
from skyrl_gym.walls.wall import Wall, accepted_wall

MAX_OUTPUT = 16_000  # characters that are read of each of stdout and stderr
_WORKER = "skyrl_gym.walls.python_worker"
_SAME_EVERYWHERE = {"PYTHONHASHSEED": "0", "OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1"}


@dataclass(frozen=True, slots=True)
class ProgramResult:
    stdout: str
    stderr: str
    exit_code: int | None  # None: it ran out of time; negative: killed by that signal

    @property
    def timed_out(self) -> bool:
        return self.exit_code is None


def run_python(code: str, *, stdin: str = "", timeout_s: float, max_output: int = MAX_OUTPUT) -> ProgramResult:
    """Run `code` as `__main__`, with access to Python and the installed packages and to nothing else of this machine.

    Limits: time (wall and CPU), 512 MiB of memory (and an eighth of the machine's for all programs together), 64 MiB of
    each of stdout and stderr, no other process. It is killed when the time is up. EnvFailure: no process can be
    started. NoWall: this machine has no sandbox.
    """
    with tempfile.TemporaryFile() as given, tempfile.TemporaryFile() as output, tempfile.TemporaryFile() as errors:
        given.write(stdin.encode("utf-8", "replace"))
        given.seek(0)
        exit_code = _exit_code(code, (given, output, errors), timeout_s)
        return ProgramResult(_start_of(output, max_output), _start_of(errors, max_output), exit_code)


def require_wall() -> None:
    """Raise NoWall, with what to do, if this machine cannot sandbox programs. Call it before anything expensive."""
    _PROGRAMS.wall()


class _Programs:
    """The process that programs are forked from, one per process of ours, started at the first program."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._wall: Wall | None = None
        self._nursery: Nursery | None = None

    def wall(self) -> Wall:
        with self._lock:
            if self._wall is None:
                self._wall = accepted_wall()
            return self._wall

    def nursery(self) -> Nursery:
        wall = self.wall()
        with self._lock:
            if self._nursery is None:
                prepare = {} if may_read(wall) else {PREPARE: "1"}
                environment = {**wall.interpreter.environment, **_SAME_EVERYWHERE, **prepare}
                interpreter = Interpreter(wall.interpreter.command, environment)
                self._nursery = Nursery(_WORKER, interpreter, memory_of_programs())
            return self._nursery


def may_read(wall: Wall) -> bool:
    """Return whether a program may open files for reading.

    True behind bubblewrap, where no file of ours is visible, and without a wall, where nothing can forbid it.
    """
    return wall.name in ("bubblewrap", "none")


_PROGRAMS = _Programs()
os.register_at_fork(after_in_child=_PROGRAMS.__init__)  # a forked child must not use the parent's nursery


def _exit_code(code: str, files: tuple[BinaryIO, ...], timeout_s: float) -> int | None:
    wall = _PROGRAMS.wall()
    program = {
        "code": code.encode("utf-8", "replace").decode(),
        "cpu_s": math.ceil(timeout_s) + 1,
        "reading": may_read(wall),
    }
    try:
        nursery = _PROGRAMS.nursery()
        worker = nursery.worker(program, [file.fileno() for file in files])
    except (OSError, RuntimeError) as refused:
        raise EnvFailure(f"cannot start a Python process for the model's program: {refused}") from refused
    try:
        return worker.exit_code(timeout_s)
    except ConnectionError as lost:
        raise EnvFailure(f"the process that the model's programs are forked from ended: {lost}") from lost
    finally:
        worker.kill()


def _start_of(file: BinaryIO, max_characters: int) -> str:
    """Return the first characters of what the process wrote, with a note if there are more."""
    size = os.fstat(file.fileno()).st_size
    # A character has at most 4 bytes. pread, for a process that is being killed shares the position.
    text = os.pread(file.fileno(), 4 * max_characters, 0).decode("utf-8", "replace")
    if len(text) <= max_characters and size <= 4 * max_characters:
        return text
    return f"{text[:max_characters]}\n… (output cut after {max_characters} characters)"
