"""Small process groups beside torch.distributed's own: made while a run goes on, and given up when a member is lost.

Members meet at a store, a server of keys and values in the process of member 0. NCCL moves the bytes between GPUs, gloo
between processes on a CPU.
"""

from __future__ import annotations

import os
import socket
import threading
import time
from collections.abc import Generator
from contextlib import contextmanager
from datetime import timedelta
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.distributed import PrefixStore, ProcessGroupGloo, TCPStore

if TYPE_CHECKING:
    from torch.distributed import Work

LOOK_S = 5e-4  # between two looks at a transfer


def open_store(address: str, timeout_s: float) -> TCPStore:
    """Serve a store at this address alone, on a port that the system chooses."""
    listening = socket.create_server((address, 0))
    port = listening.getsockname()[1]
    return TCPStore(
        address,
        port,
        is_master=True,
        wait_for_workers=False,
        timeout=timedelta(seconds=timeout_s),
        master_listen_fd=listening.detach(),
    )


def join_store(address: str, port: int, timeout_s: float) -> TCPStore:
    return TCPStore(address, port, wait_for_workers=False, timeout=timedelta(seconds=timeout_s))


class WeightsGroup:
    """One sender, member 0, and the workers of an engine. Lost with the first transfer that fails."""

    def __init__(
        self, name: str, address: str, port: int, rank: int, size: int, device: torch.device, timeout_s: float
    ) -> None:
        """Return when all members are there. RuntimeError or TimeoutError if they do not come.

        Each group asks the store through a connection of its own: one that waits lets no other question through.
        """
        self.name, self._timeout_s = name, timeout_s
        keys = PrefixStore(name, join_store(address, port, timeout_s))
        if device.type == "cuda":
            from torch.distributed import ProcessGroupNCCL

            with _without_watchdog():
                backend = ProcessGroupNCCL(keys, rank, size, ProcessGroupNCCL.Options())
        else:
            backend = ProcessGroupGloo(keys, rank, size, timedelta(seconds=timeout_s))
        self._backend: Any = backend  # torch's type stubs do not know that it broadcasts
        self._meet(torch.zeros(1, dtype=torch.uint8, device=device))

    def _meet(self, hello: Tensor) -> None:
        """Send one byte. NCCL connects its members now, and would wait for a lost one for ever."""
        failures: list[Exception] = []

        def send() -> None:
            try:
                self.finish(self.broadcast(hello))
            except (RuntimeError, OSError) as error:
                failures.append(error)

        meeting = threading.Thread(target=send, daemon=True)
        meeting.start()
        meeting.join(2 * self._timeout_s)
        if meeting.is_alive():
            self.abort()
            raise TimeoutError(f"a member of {self.name} did not come in {2 * self._timeout_s:g} seconds")
        if failures:
            raise failures[0]

    def broadcast(self, buffer: Tensor) -> Work:
        """Begin to send the buffer from member 0 to all others. It must not change until `finish` has returned."""
        return self._backend.broadcast(buffer, 0)

    def finish(self, work: Work) -> None:
        """Return when the transfer is over. RuntimeError if it failed or takes too long: NCCL itself would wait on."""
        deadline = time.monotonic() + self._timeout_s
        while not work.is_completed():
            if time.monotonic() > deadline:
                raise TimeoutError(f"a piece of the weights did not get through in {self._timeout_s:g} seconds")
            time.sleep(LOOK_S)
        work.wait()

    def abort(self) -> None:
        """End the group, and what is under way in it. Gloo's transfers end by themselves, at their timeout."""
        if not isinstance(self._backend, ProcessGroupGloo):
            self._backend.abort()


@contextmanager
def _without_watchdog() -> Generator[None]:
    """Let a failed transfer raise: NCCL's watchdog would end the whole process. It is read when a group is made."""
    name = "TORCH_NCCL_ASYNC_ERROR_HANDLING"
    before, os.environ[name] = os.environ.get(name), "0"
    try:
        yield
    finally:
        os.environ.pop(name)
        if before is not None:
            os.environ[name] = before
