"""Run a program that a model wrote, in a process of its own with limits.

The limits stop accidents: endless loops, memory, full disks, fork bombs, floods of output. They are no sandbox. The
program runs as our user: it can read our files, reach the network and, as root, start processes that outlive it. For
policies that look for the way out, run the whole trainer in a container without network.
"""

from __future__ import annotations

import contextlib
import math
import os
import signal
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

from skyrl_gym.core import EnvFailure
from skyrl_gym.temporary_folders import PROGRAM, temporary_folder

MAX_OUTPUT = 16_000  # characters that are read of each of stdout and stderr
_MEMORY_BYTES = 1 << 30
_FILE_BYTES = 64 << 20  # per file; stdout and stderr are files

# Runs in the new process: limits first, then the program, as __main__. (A preexec_fn would run between fork and exec,
# which may deadlock when other threads exist; here they do.)
_START = """
import resource, sys
for name, limit in zip(sys.argv[1::2], map(int, sys.argv[2::2])):
    try:
        resource.setrlimit(getattr(resource, name), (limit, limit))
    except (AttributeError, ValueError, OSError):
        pass  # this system does not have the limit
del name, limit
with open("program.py", "rb") as file:
    program = file.read()
sys.argv = ["program.py"]
exec(compile(program, "program.py", "exec"), {"__name__": "__main__"})
"""


@dataclass(frozen=True, slots=True)
class ProgramResult:
    stdout: str
    stderr: str
    exit_code: int | None  # None: it ran out of time; negative: killed by that signal

    @property
    def timed_out(self) -> bool:
        return self.exit_code is None


def run_python(code: str, *, stdin: str = "", timeout_s: float, max_output: int = MAX_OUTPUT) -> ProgramResult:
    """Run `code` with this interpreter, isolated (-I), in an empty folder, with an empty environment.

    Limits: time (wall and CPU), 1 GiB of memory, 64 MiB per file, some processes and threads (not enforced for root).
    Its process group is killed when it ends or the time is up. EnvFailure when no process can be started.
    """
    limits = {
        "RLIMIT_CPU": math.ceil(timeout_s) + 1,
        "RLIMIT_AS": _MEMORY_BYTES,
        "RLIMIT_FSIZE": _FILE_BYTES,
        "RLIMIT_CORE": 0,
        **_process_limit(),
    }
    command = [sys.executable, "-I", "-c", _START, *(str(part) for limit in limits.items() for part in limit)]
    with (
        temporary_folder(PROGRAM) as folder,
        tempfile.TemporaryFile() as output,
        tempfile.TemporaryFile() as errors,
        tempfile.TemporaryFile() as given,
    ):
        (folder / "program.py").write_bytes(code.encode("utf-8", "replace"))
        given.write(stdin.encode("utf-8", "replace"))
        given.seek(0)
        exit_code = _exit_code(command, folder, given, output, errors, timeout_s)
        return ProgramResult(_start_of(output, max_output), _start_of(errors, max_output), exit_code)


def _process_limit() -> dict[str, int]:
    """Room for 64 more processes and threads: the limit counts all of our user's, and there are at most num_running."""
    try:
        num_running = int(Path("/proc/loadavg").read_text().split()[3].split("/")[1])
    except OSError:
        return {}
    return {"RLIMIT_NPROC": num_running + 64}


def _exit_code(
    command: list[str], folder: Path, given: BinaryIO, output: BinaryIO, errors: BinaryIO, timeout_s: float
) -> int | None:
    single_threaded = {"OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1"}  # many programs run at once
    try:
        process = subprocess.Popen(
            command,
            cwd=folder,
            env=single_threaded,
            stdin=given,
            stdout=output,
            stderr=errors,
            start_new_session=True,  # a process group of its own
        )
    except OSError as refused:
        raise EnvFailure(f"cannot start a Python process for the model's program: {refused}") from refused
    try:
        return process.wait(timeout_s)
    except subprocess.TimeoutExpired:
        return None
    finally:
        with contextlib.suppress(ProcessLookupError, PermissionError):  # macOS: EPERM for a group of zombies
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()


def _start_of(file: BinaryIO, max_characters: int) -> str:
    """The first characters of what the process wrote, with a note where there is more."""
    file.seek(0, os.SEEK_END)
    size = file.tell()
    file.seek(0)
    text = file.read(4 * max_characters).decode("utf-8", "replace")  # a character has at most 4 bytes
    if len(text) <= max_characters and size <= 4 * max_characters:
        return text
    return f"{text[:max_characters]}\n… (output cut after {max_characters} characters)"
