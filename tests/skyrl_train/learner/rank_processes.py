"""Processes that are ranks of one gloo group, for tests: started once, they run one function after the other."""

from __future__ import annotations

import multiprocessing
import pickle
import traceback
from collections.abc import Callable
from datetime import timedelta
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

CONTEXT = multiprocessing.get_context("forkserver")  # see conftest.py: torch is imported once
PATIENCE_S = 120.0
ERRORS = (ArithmeticError, AssertionError, AttributeError, LookupError, OSError, RuntimeError, TypeError, ValueError)


class RankProcesses:
    """`size` processes. `call` runs a function on all of them at once, as every rank of a learner is called."""

    def __init__(self, size: int, folder: Path) -> None:
        self.size = size
        self._connections, self._processes = [], []
        for rank in range(size):
            ours, theirs = CONTEXT.Pipe()
            process = CONTEXT.Process(target=_serve, args=(rank, size, folder / "store", theirs), daemon=True)
            process.start()
            theirs.close()
            self._connections.append(ours)
            self._processes.append(process)

    def call(self, function: Callable[..., Any], *args: Any) -> list[Any]:
        """Return what the function returns on each rank. AssertionError, with the tracebacks, if it failed on one."""
        for connection in self._connections:
            connection.send((function, args))
        answers = [self._answer(rank, connection) for rank, connection in enumerate(self._connections)]
        errors = [f"rank {rank}: {value}" for rank, (is_error, value) in enumerate(answers) if is_error]
        assert not errors, "\n".join(errors)
        return [value for _, value in answers]

    def close(self) -> None:
        for process in self._processes:
            process.kill()
            process.join()

    def _answer(self, rank: int, connection: Connection) -> tuple[bool, Any]:
        if not connection.poll(PATIENCE_S):
            return True, f"rank {rank} is silent after {PATIENCE_S:.0f} s"
        return pickle.loads(connection.recv_bytes())


def _serve(rank: int, size: int, store: Path, connection: Connection) -> None:
    """Main function of a process: run what comes, until the other end is closed."""
    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo", init_method=f"file://{store}", rank=rank, world_size=size, timeout=timedelta(seconds=60)
    )
    while True:
        try:
            function, args = connection.recv()
        except EOFError:
            return
        try:
            answer = (False, function(*args))
        except ERRORS:
            answer = (True, traceback.format_exc())
        connection.send_bytes(pickle.dumps(answer))
