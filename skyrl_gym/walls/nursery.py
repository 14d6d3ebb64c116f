"""Prefork server: each session gets a worker process in about a millisecond, forked from one that has imported all.

    server ──control socket──▶ nursery (imports the module once) ──fork──▶ worker, one per session
       └────────────────────────── session socket: a JSON line each way ─────────┘

The module has `make_answer(argument)`. It is called once in each worker and returns `answer(request)`; argument,
request and answer are JSON values, and an answer is never None. What the module imports is imported before the first
fork. A worker dies when its session closes, and all of them with the nursery, which ends when the server does.

    nursery = Nursery("my_package.my_module")
    worker = nursery.worker({"seed": 7})
    answer = worker.ask({"action": 2}, timeout_s=10.0)  # None: the worker died

A worker may also be given its stdin, stdout and stderr, and its exit code can be waited for.
"""

from __future__ import annotations

import contextlib
import json
import os
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from skyrl_gym.walls.memory import FIRST_TO_GO, Cgroup, MemoryWatch, bound

KILL_PATIENCE_S = 5.0
MAX_ANSWER_BYTES = 4 * 1024 * 1024
PROCESS = "skyrl_gym.walls.forking"
READY = b"r"  # sent once everything is imported


@dataclass(frozen=True, slots=True)
class Interpreter:
    """The command that starts a Python, up to `-m`, and all of its environment variables."""

    command: tuple[str, ...]
    environment: Mapping[str, str]


def this_interpreter() -> Interpreter:
    """Return the running Python, with its import path and without its environment variables."""
    return Interpreter(
        (sys.executable, "-P"), {"LANG": "C.UTF-8", "PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
    )


class Nursery:
    """Handle of the process that workers are forked from. One per server; may be used from many threads."""

    def __init__(self, module: str, interpreter: Interpreter | None = None, memory_bytes: int | None = None) -> None:
        """Start the process. memory_bytes: limit for all workers together; beyond it the largest is killed."""
        self._module = module
        self._memory_bytes = memory_bytes
        self._bound: Cgroup | MemoryWatch | None = None
        self._interpreter = interpreter or this_interpreter()
        self._starting = threading.Lock()
        self._start()

    def worker(self, argument: Any = None, files: Sequence[int] = ()) -> Worker:
        """Return a new worker, which first calls `make_answer(argument)`. Restarts the nursery if it has died.

        files: descriptors for its stdin, stdout and stderr; none means /dev/null.
        """
        with self._starting:
            if self.has_died():
                self._control.close()
                self._start()
            if not self._is_ready:
                self._wait_until_ready()
        ours, theirs = socket.socketpair()
        lifeline, watched = socket.socketpair()
        with theirs, watched:
            socket.send_fds(self._control, [b"w"], [theirs.fileno(), watched.fileno(), *files])
        return Worker(ours, lifeline, argument)

    def has_died(self, within_s: float = 0.0) -> bool:
        """Return whether the nursery ended within that time.

        Its workers are killed a moment before its own end can be observed; a caller that lost one waits for that.
        """
        try:
            self._process.wait(within_s)
        except subprocess.TimeoutExpired:
            return False
        return True

    def close(self) -> None:
        """End the nursery, and all workers with it."""
        self._control.close()
        self._process.wait()
        self._unbind()

    def _wait_until_ready(self) -> None:
        if not self._control.recv(1):
            raise RuntimeError(f"the nursery ended while it imported {self._module}; its stderr says why")
        if self._memory_bytes is not None and sys.platform == "linux":
            self._bound = bound(self._process.pid, self._memory_bytes)
        self._is_ready = True

    def _unbind(self) -> None:
        if self._bound is not None:
            self._bound.close()
            self._bound = None

    def _start(self) -> None:
        self._unbind()
        self._is_ready = False
        first_to_go = FIRST_TO_GO if sys.platform == "linux" else ()
        self._control, theirs = socket.socketpair()
        with theirs:
            self._process = subprocess.Popen(
                [*first_to_go, *self._interpreter.command, "-m", PROCESS, self._module, str(theirs.fileno())],
                stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL,
                pass_fds=[theirs.fileno()],
                env=dict(self._interpreter.environment),
            )


class Worker:
    """Handle of one session's process. Its answers are not trusted: each must be one line of JSON of limited size."""

    def __init__(self, connection: socket.socket, lifeline: socket.socket, argument: Any) -> None:
        self._connection = connection
        self._lifeline = lifeline
        self._connection.sendall(line(argument))

    def ask(self, request: Any, timeout_s: float) -> Any:
        """Send a request and return the answer; None if the worker died, took longer or did not answer with JSON.

        After None the worker is closed.
        """
        try:
            return json.loads(self._reply(line(request), time.monotonic() + timeout_s))
        except (OSError, ValueError, RecursionError):
            self.close()
            return None

    def exit_code(self, timeout_s: float) -> int | None:
        """Wait until the worker ends. Returns its exit code, or minus the signal that killed it; None at the time-out.

        ConnectionResetError if the nursery died, and the worker with it.
        """
        self._lifeline.settimeout(max(timeout_s, 0.001))
        try:
            sent = self._lifeline.recv(100)
        except TimeoutError:
            return None
        if not sent:
            raise ConnectionResetError("the nursery died")
        return int(sent)

    def kill(self) -> None:
        """Kill the worker, whatever it does, and wait until it has ended."""
        with contextlib.suppress(OSError):  # it has ended already, or its nursery has
            self._lifeline.shutdown(socket.SHUT_WR)
            self.exit_code(KILL_PATIENCE_S)
        self.close()

    def close(self) -> None:
        """Close the session, at which a well-behaved worker ends; the nursery kills one that does not.

        The closed lifeline tells the nursery.
        """
        self._connection.close()
        self._lifeline.close()

    def _reply(self, request: bytes, end: float) -> bytes:
        self._connection.settimeout(max(end - time.monotonic(), 0.001))
        self._connection.sendall(request)
        reply = bytearray()
        while not reply.endswith(b"\n"):
            if len(reply) > MAX_ANSWER_BYTES:
                raise ValueError(f"an answer of more than {MAX_ANSWER_BYTES} bytes")
            self._connection.settimeout(max(end - time.monotonic(), 0.001))
            received = self._connection.recv(1 << 18)
            if not received:
                raise ConnectionResetError("the worker died")
            reply += received
        return bytes(reply)


def line(value: Any) -> bytes:
    return json.dumps(value).encode() + b"\n"
