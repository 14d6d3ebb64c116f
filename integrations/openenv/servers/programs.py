"""The server's side of a coding session: it runs programs in a sandboxed worker and checks the worker's answers.

smolagents' interpreter is no sandbox: its time limit does not stop a running program, it has no limit on memory, and
programs can escape from it. So a program is assumed to control its worker, whose answers are not trusted.
"""

from __future__ import annotations

import time
from dataclasses import dataclass
from typing import Any

from skyrl_gym.walls.confinement import MEMORY_LIMIT_BYTES
from skyrl_gym.walls.memory import memory_of_programs
from skyrl_gym.walls.nursery import Nursery, Worker

WORKER_MODULE = "integrations.openenv.servers.program_worker"
MAX_OUTPUT_CHARS = 50_000  # of each of stdout and stderr
CPU_LIMIT_S = 5.0  # of one program
WALL_LIMIT_S = 10.0  # of one program, sleeping and waiting for a CPU included
PATIENCE_S = 2 * WALL_LIMIT_S  # the server's own limit: an escaped program can stop its worker's timers


@dataclass(frozen=True, slots=True)
class ProgramOutcome:
    """The result of a program. exit_code 1: it raised, or exceeded a limit."""

    stdout: str
    stderr: str
    exit_code: int


class ProgramSession:
    """Runs programs one after another in one worker, and in a new worker after the last one died."""

    def __init__(self, nursery: Nursery) -> None:
        self._nursery = nursery
        self._worker: Worker | None = None
        self._seed: int | None = None

    def run(self, code: str) -> ProgramOutcome:
        if self._worker is None:
            self._worker = self._nursery.worker(self._seed)
        start = time.monotonic()
        outcome = checked_outcome(self._worker.ask(code, PATIENCE_S))
        if outcome is not None:
            return outcome
        seconds = time.monotonic() - start
        self.close()
        if self._nursery.has_died(within_s=0.1):
            raise RuntimeError("the process that workers are forked from died, and they with it")
        return ProgramOutcome(
            stdout="",
            stderr=f"The program was stopped after {seconds:.1f} s: it may use {CPU_LIMIT_S:g} s of CPU time, "
            f"{WALL_LIMIT_S:g} s in all and {MEMORY_LIMIT_BYTES // 2**20} MB, and all sessions together "
            f"{memory_of_programs() // 2**20} MB, above which the largest is stopped. Its variables are gone.",
            exit_code=1,
        )

    def reset(self, seed: int | None) -> None:
        """Forget every variable: the next program runs in a new worker, with this seed."""
        self.close()
        self._seed = seed

    def close(self) -> None:
        worker, self._worker = self._worker, None
        if worker is not None:
            worker.close()


def checked_outcome(answer: Any) -> ProgramOutcome | None:
    """Return a worker's answer, checked; None if it has another form, which only an escaped program sends."""
    match answer:
        case {"stdout": str(stdout), "stderr": str(stderr), "exit_code": 0 | 1 as exit_code}:
            outcome = ProgramOutcome(_printable(stdout), _printable(stderr), int(exit_code))
            return outcome if max(len(stdout), len(stderr)) <= MAX_OUTPUT_CHARS + 100 else None
        case _:
            return None


def capped(text: str) -> str:
    """Return the text, cut to MAX_OUTPUT_CHARS characters with a note of its length."""
    text = _printable(text)
    return text if len(text) <= MAX_OUTPUT_CHARS else f"{text[:MAX_OUTPUT_CHARS]}\n... ({len(text)} characters)"


def _printable(text: str) -> str:
    """Return the text without lone surrogates, which a socket cannot send."""
    return text.encode(errors="replace").decode()
