"""The process that workers are forked from: `python -m skyrl_gym.walls.forking MODULE DESCRIPTOR`.

It imports the module once, then forks a worker for each message on the control socket (see nursery.py).
"""

from __future__ import annotations

import contextlib
import gc
import importlib
import json
import os
import select
import signal
import socket
import sys
import traceback
from collections.abc import Callable
from typing import Any

from skyrl_gym.walls.confinement import die_with_parent
from skyrl_gym.walls.nursery import READY, line

Answer = Callable[[Any], Any]


def run_nursery(control: socket.socket, module: str) -> None:
    """Fork a worker for each session and kill workers whose lifeline closed, until the server closes `control`."""
    make_answer = importlib.import_module(module).make_answer
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the server reacts to Ctrl-C, and ends this process
    woken, waking = _wakes_when_a_child_ends()
    control.sendall(READY)
    gc.freeze()  # keeps a garbage collection in a worker from copying the pages of all imports
    workers: dict[int, socket.socket] = {}  # lifelines by process id; a dead worker keeps its id until it is reaped
    poller = select.poll()
    poller.register(control, select.POLLIN)
    poller.register(woken, select.POLLIN)
    while True:
        events = dict(poller.poll())
        if woken in events:
            os.read(woken, 4096)
        for process_id, lifeline in workers.items():
            if lifeline.fileno() in events:  # the other end closed
                poller.unregister(lifeline)
                _kill(process_id)
        _reap(workers, poller)
        if control.fileno() not in events:
            continue
        message, descriptors, _, _ = socket.recv_fds(control, 1, 5)
        if not message:
            break
        session, lifeline = (socket.socket(fileno=descriptor) for descriptor in descriptors[:2])
        files = descriptors[2:]
        process_id = os.fork()
        if process_id == 0:
            others = [open_socket.fileno() for open_socket in (control, lifeline, *workers.values())]
            _be_worker(session, files, make_answer, [woken, waking, *others])
        with contextlib.suppress(OSError):  # the worker also does this; either may be first
            os.setpgid(process_id, process_id)
        session.close()
        for descriptor in files:
            os.close(descriptor)
        workers[process_id] = lifeline
        poller.register(lifeline, select.POLLIN)  # no data is ever sent: readable means that the other end closed
    for process_id in workers:
        _kill(process_id)


def _wakes_when_a_child_ends() -> tuple[int, int]:
    """Return both ends of a pipe: something can be read from the first when a child has ended."""
    woken, waking = os.pipe()
    os.set_blocking(waking, False)
    signal.signal(signal.SIGCHLD, lambda *_: None)
    signal.set_wakeup_fd(waking, warn_on_full_buffer=False)
    return woken, waking


def _kill(process_id: int) -> None:
    """Kill a worker and every process in its group."""
    with contextlib.suppress(ProcessLookupError, PermissionError):  # macOS: EPERM for a group of zombies
        os.killpg(process_id, signal.SIGKILL)
    with contextlib.suppress(ProcessLookupError):
        os.kill(process_id, signal.SIGKILL)


def _reap(workers: dict[int, socket.socket], poller: select.poll) -> None:
    """Send each ended worker's exit code to its owner. As process 1 of a namespace this also reaps orphans."""
    with contextlib.suppress(ChildProcessError):
        while (ended := os.waitpid(-1, os.WNOHANG))[0] != 0:
            process_id, status = ended
            if process_id not in workers:
                continue
            lifeline = workers.pop(process_id)
            with contextlib.suppress(KeyError):  # unregistered when its lifeline closed
                poller.unregister(lifeline)
            with contextlib.suppress(ProcessLookupError, PermissionError):
                os.killpg(process_id, signal.SIGKILL)
            with contextlib.suppress(OSError):
                lifeline.send(str(os.waitstatus_to_exitcode(status)).encode())
            lifeline.close()


def _be_worker(
    session: socket.socket, files: list[int], make_answer: Callable[[Any], Answer], not_ours: list[int]
) -> None:
    """Answer requests on `session` until it closes, then exit. Does not return.

    files become stdin, stdout and stderr; not_ours: the parent's descriptors, which the worker closes.
    """
    exit_code = 1
    try:
        os.setpgid(0, 0)
        signal.set_wakeup_fd(-1)
        signal.signal(signal.SIGCHLD, signal.SIG_DFL)
        for other in not_ours:
            os.close(other)
        for standard, descriptor in enumerate(files):
            os.dup2(descriptor, standard)
            os.close(descriptor)
        die_with_parent()
        descriptor = session.detach()
        with os.fdopen(descriptor, "rb", closefd=False) as requests:
            answer = make_answer(json.loads(requests.readline()))
            for request in requests:
                _write_all(descriptor, line(answer(json.loads(request))))
        exit_code = 0
    except BrokenPipeError:
        exit_code = 0
    finally:
        if sys.exc_info()[0] is not None:
            traceback.print_exc()
        os._exit(exit_code)


def _write_all(descriptor: int, data: bytes) -> None:
    """Write all of `data` with the system call `write`: a confined worker may not use the calls for sockets."""
    view = memoryview(data)
    while view:
        view = view[os.write(descriptor, view) :]


if __name__ == "__main__":
    for shell_variable in ("PWD", "OLDPWD", "SHLVL", "_"):  # set by the shell of memory.FIRST_TO_GO
        os.environ.pop(shell_variable, None)
    run_nursery(socket.socket(fileno=int(sys.argv[2])), sys.argv[1])
