"""An engine of the tests in a process of its own: a Receiver, and nothing else. It imports torch alone."""

from __future__ import annotations

import multiprocessing
import os
import signal
import time
from collections.abc import Generator
from contextlib import contextmanager
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from skyrl_train.weights.broadcast import Broadcast, Receiver

Received = dict[str, Tensor] | str


class ReceivingProcess:
    """`start` lets it receive; `received` returns the tensors, or the error in words."""

    def __init__(self, name: str, rank: int = 0, num_workers: int = 1, device: str = "cpu") -> None:
        context = multiprocessing.get_context("forkserver")
        context.set_forkserver_preload(["skyrl_train.weights.broadcast"])
        self._pipe, theirs = context.Pipe()
        self._process = context.Process(target=receive_again_and_again, args=(theirs, name, rank, num_workers, device))
        self._process.start()
        assert self._pipe.recv() == "ready"

    def start(self, broadcast: Broadcast, ends_after: int | None = None, by: int = signal.SIGKILL) -> None:
        """ends_after: tensors, after which the process sends itself a signal."""
        self._pipe.send((broadcast, ends_after, by))

    def received(self, timeout_s: float = 60.0) -> Received:
        if not self._pipe.poll(timeout_s):
            raise TimeoutError("no answer")
        found = self._pipe.recv()
        if isinstance(found, str):
            return found
        return {name: tensor_of(*fields) for name, fields in found.items()}

    def resume(self, after_s: float = 0.0) -> None:
        """Let it go on, so long after it has stopped itself. Waits until it has."""
        pid = self._process.pid
        assert pid is not None
        while " T " not in Path(f"/proc/{pid}/stat").read_text():
            time.sleep(0.01)
        time.sleep(after_s)
        os.kill(pid, signal.SIGCONT)

    def end(self) -> None:
        self._process.kill()
        self._process.join()


def tensor_of(data: bytes, dtype: torch.dtype, shape: tuple[int, ...]) -> Tensor:
    numbers = torch.frombuffer(bytearray(data), dtype=torch.uint8) if data else torch.empty(0, dtype=torch.uint8)
    return numbers.view(dtype).view(shape)


@contextmanager
def receiving(*names: str) -> Generator[list[ReceivingProcess]]:
    processes: list[ReceivingProcess] = []
    try:
        for name in names:
            processes.append(ReceivingProcess(name))
        yield processes
    finally:
        for process in processes:
            process.end()


def receive_again_and_again(pipe: Connection, name: str, rank: int, num_workers: int, device: str) -> None:
    torch.set_num_threads(1)
    if device.startswith("cuda"):
        torch.cuda.set_device(device)
    receiver = Receiver(name, torch.device(device), rank, num_workers)
    pipe.send("ready")
    while True:
        broadcast, ends_after, by = pipe.recv()
        try:
            pipe.send(received_by(receiver, broadcast, ends_after, by))
        except (RuntimeError, OSError, ValueError) as error:
            pipe.send(f"{type(error).__name__}: {error}")


def received_by(receiver: Receiver, broadcast: Broadcast, ends_after: int | None, by: int) -> Any:
    found = {}
    if ends_after == 0:
        os.kill(os.getpid(), by)
    for name, tensor in receiver.receive(broadcast):
        found[name] = tensor.reshape(-1).view(torch.uint8).cpu().numpy().tobytes(), tensor.dtype, tuple(tensor.shape)
        if len(found) == ends_after:
            os.kill(os.getpid(), by)
    return found
