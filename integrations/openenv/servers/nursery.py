"""Worker processes forked from a prepared one: every session gets a process of its own in about a millisecond.

    server ──control socket──▶ nursery (imports the module once) ──fork──▶ worker, one per session
       └────────────────────────── session socket: a JSON line each way ─────────┘

The module has `make_answer(argument)`. It is called once in each worker and returns `answer(question)`; argument,
question and answer are JSON values, and an answer is never None. What the module imports is imported before the first
fork. A worker dies when its session closes, and all of them with the nursery, which ends when the server does.

    nursery = Nursery("my_package.my_module")
    worker = nursery.worker({"seed": 7})
    answer = worker.ask({"action": 2}, timeout_s=10.0)  # None: it died of that
"""

from __future__ import annotations

import contextlib
import ctypes
import gc
import importlib
import json
import os
import select
import signal
import socket
import subprocess
import sys
import threading
import time
import traceback
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

Answer = Callable[[Any], Any]

PR_SET_PDEATHSIG = 1  # linux/prctl.h
MAX_ANSWER_BYTES = 4 * 1024 * 1024
CHECK_S = 1.0  # how long a worker may outlive its session
READY = b"r"  # what a nursery says when it has imported everything

libc = ctypes.CDLL(None, use_errno=True)


@dataclass(frozen=True, slots=True)
class Interpreter:
    """How a Python is started: the words before `-m`, and all of its environment variables."""

    command: tuple[str, ...]
    environment: Mapping[str, str]


def this_interpreter() -> Interpreter:
    """The Python that runs here, with its imports and none of its environment variables."""
    return Interpreter(
        (sys.executable, "-P"), {"LANG": "C.UTF-8", "PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
    )


class Nursery:
    """The prepared process that workers are forked from. One per server; may be used from many threads."""

    def __init__(self, module: str, interpreter: Interpreter | None = None) -> None:
        self._module = module
        self._interpreter = interpreter or this_interpreter()
        self._starting = threading.Lock()
        self._start()

    def worker(self, argument: Any = None) -> Worker:
        """A fresh worker, which begins with `make_answer(argument)`. Starts the nursery again if it has died."""
        with self._starting:
            if self.has_died():
                self._control.close()
                self._start()
            if not self._is_ready and not self._control.recv(1):
                raise RuntimeError(f"the nursery ended while it imported {self._module}; its stderr says why")
            self._is_ready = True
        ours, theirs = socket.socketpair()
        lifeline, watched = socket.socketpair()
        with theirs, watched:
            socket.send_fds(self._control, [b"w"], [theirs.fileno(), watched.fileno()])
        return Worker(ours, lifeline, argument)

    def has_died(self, within_s: float = 0.0) -> bool:
        """Its workers get their signal a moment before its own end can be seen: hence the wait."""
        try:
            self._process.wait(within_s)
        except subprocess.TimeoutExpired:
            return False
        return True

    def close(self) -> None:
        """End the nursery, and all workers with it."""
        self._control.close()
        self._process.wait()

    def _start(self) -> None:
        self._is_ready = False
        self._control, theirs = socket.socketpair()
        with theirs:
            self._process = subprocess.Popen(
                [*self._interpreter.command, "-m", __name__, self._module, str(theirs.fileno())],
                stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL,
                pass_fds=[theirs.fileno()],
                env=dict(self._interpreter.environment),
            )


class Worker:
    """One session's process. What it says is not trusted: it is bounded, and must be one line of JSON."""

    def __init__(self, connection: socket.socket, lifeline: socket.socket, argument: Any) -> None:
        self._connection = connection
        self._lifeline = lifeline
        self._connection.sendall(_line(argument))

    def ask(self, question: Any, timeout_s: float) -> Any:
        """The answer; None if the worker died, took longer or did not answer with JSON. Then it is gone."""
        try:
            return json.loads(self._reply(_line(question), time.monotonic() + timeout_s))
        except (OSError, ValueError, RecursionError):
            self.close()
            return None

    def close(self) -> None:
        """An honest worker ends at once; the nursery sees that the lifeline is cut, and kills any other."""
        self._connection.close()
        self._lifeline.close()

    def _reply(self, question: bytes, end: float) -> bytes:
        self._connection.settimeout(max(end - time.monotonic(), 0.001))
        self._connection.sendall(question)
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


def run_nursery(control: socket.socket, module: str) -> None:
    """Fork a worker for each session that comes in, kill those whose lifeline is cut, until the server is gone."""
    make_answer = importlib.import_module(module).make_answer
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the server's to answer
    control.sendall(READY)
    gc.freeze()  # a collection in a worker shall not copy the pages of all that was imported
    workers: dict[int, socket.socket] = {}  # lifelines by process id; a dead worker keeps its id until it is reaped
    while True:
        asked = select.select([control], [], [], CHECK_S if workers else None)[0]
        _kill_those_cut_off(workers)
        _reap(workers)
        if not asked:
            continue
        message, descriptors, _, _ = socket.recv_fds(control, 1, 2)
        if not message:
            break
        session, lifeline = (socket.socket(fileno=descriptor) for descriptor in descriptors)
        process_id = os.fork()
        if process_id == 0:
            _be_worker(session, make_answer, [control, lifeline, *workers.values()])
        session.close()
        workers[process_id] = lifeline
    for process_id in workers:
        os.kill(process_id, signal.SIGKILL)


def _kill_those_cut_off(workers: dict[int, socket.socket]) -> None:
    poller = select.poll()
    for lifeline in workers.values():
        poller.register(lifeline, 0)  # only that the other end closed
    cut = {descriptor for descriptor, _ in poller.poll(0)}
    for process_id, lifeline in workers.items():
        if lifeline.fileno() in cut:
            os.kill(process_id, signal.SIGKILL)


def _reap(workers: dict[int, socket.socket]) -> None:
    """Also what was orphaned, if we are the first process of a namespace."""
    with contextlib.suppress(ChildProcessError):
        while (process_id := os.waitpid(-1, os.WNOHANG)[0]) != 0:
            if process_id in workers:
                workers.pop(process_id).close()


def _be_worker(session: socket.socket, make_answer: Callable[[Any], Answer], not_ours: list[socket.socket]) -> None:
    """The whole life of a worker. Does not return."""
    try:
        for other in not_ours:
            other.close()
        die_with_parent()
        descriptor = session.detach()
        with os.fdopen(descriptor, "rb", closefd=False) as questions:
            answer = make_answer(json.loads(questions.readline()))
            for question in questions:
                _write_all(descriptor, _line(answer(json.loads(question))))
    except BrokenPipeError:
        pass
    finally:
        if sys.exc_info()[0] is not None:
            traceback.print_exc()
        os._exit(0)


def die_with_parent() -> None:
    """Linux kills us when our parent ends, however it ends. Forgotten when a process changes its user."""
    if sys.platform == "linux":
        parent = os.getppid()
        libc.prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
        if os.getppid() != parent:
            os._exit(1)


def _line(value: Any) -> bytes:
    return json.dumps(value).encode() + b"\n"


def _write_all(descriptor: int, data: bytes) -> None:
    """With `write` alone: a worker may have forbidden itself the system calls for sockets."""
    view = memoryview(data)
    while view:
        view = view[os.write(descriptor, view) :]


if __name__ == "__main__":
    run_nursery(socket.socket(fileno=int(sys.argv[2])), sys.argv[1])
