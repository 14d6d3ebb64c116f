"""The words about a process that died: its name, the reason, and the last lines of its output."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from skyrl_train.cluster.actors import Identity
from skyrl_train.cluster.start import import_ray
from skyrl_train.engine.base import EngineDied

NUM_LINES = 12
TAIL_BYTES = 100_000
ERROR = re.compile(r"(?:^|\s)((?:\w+\.)*\w+(?:Error|Exception): .+)$")
POINTS_ELSEWHERE = re.compile(r"initialization failed|[Ss]ee (the )?(root cause|stack trace)|log say why")
ESCAPES = re.compile(r"\x1b\[[0-9;]*m")


def obituary(name: str, identity: Identity | None, error: BaseException) -> str:
    """Return "learner rank 1 (process 77) died: ...", and what it wrote last."""
    who = name if identity is None else f"{name} (process {identity.pid})"
    return f"{who} died: {_reason(error)}{last_words(identity)}"


def last_words(identity: Identity | None) -> str:
    """Return what a process wrote last, as the end of a message; nothing if that cannot be read."""
    logs = [Path(identity.log)] if identity is not None and identity.log else []
    logs = [log.with_suffix(end) for log in logs for end in (".out", ".err")]  # Ray's two files of a worker
    ends = {log: lines for log in logs if (lines := lines_at_the_end(log))}
    said = [error for lines in ends.values() if (error := _error_in(lines))]
    parts = [f"\nIt said: {said[-1]}"] if said else []
    for log, lines in ends.items():
        parts += [f"\nThe last lines of {log}:", *(f"\n  {line}" for line in lines[-NUM_LINES:])]
    return "".join(parts)


def _error_in(lines: list[str]) -> str:
    """Return the last error that a log names, but those that only point to another one; "" if there is none."""
    found = [match[1] for line in lines if (match := ERROR.search(line))]
    return next((error for error in reversed(found) if not POINTS_ELSEWHERE.search(error)), "")


def lines_at_the_end(log: Path) -> list[str]:
    """Return the lines in the last TAIL_BYTES of a file, without colours and empty ones; none if it cannot be read."""
    try:
        with log.open("rb") as file:
            file.seek(max(0, file.seek(0, 2) - TAIL_BYTES))
            text = file.read().decode(errors="replace")
    except OSError:
        return []
    lines = [ESCAPES.sub("", line).rstrip() for line in text.splitlines()]
    return [line for line in lines if line and not line.startswith(":")]  # Ray marks a worker's job with :job_id:


def _reason(error: BaseException) -> str:
    """Return what Ray says of a death, in one sentence."""
    text = " ".join(str(error).split())
    if "connection error code 2" in text:  # Ray has seen no more than its socket being closed
        return "it was killed, by the system for want of memory or by somebody, or it crashed"
    found = re.search(r"Worker exit detail: (.*)", text)
    return (found[1] if found else text).partition(" Some common causes")[0][:400]


def cause_of(error: BaseException, name: str = "", identity: Identity | None = None) -> BaseException:
    """Return the error that an actor raised, as it was raised there. A death gets the actor's name and last words."""
    task_error: Any = import_ray().exceptions.RayTaskError
    cause = error.cause if isinstance(error, task_error) and error.cause is not None else error
    return EngineDied(f"{name}: {cause}{last_words(identity)}") if isinstance(cause, EngineDied) else cause
