"""Weights for engines on the learner's own devices: each worker copies them out of buffers of the rank on its device.

    each learner rank: IpcSender  ── handles of two buffers ──▶  the workers on its device: received_by_ipc

A handle is what torch gives another process of a tensor: CUDA IPC on a GPU, shared memory on a CPU. The handles travel
in the announcement. "filled" and "taken" are counters in a store of the rank's process; a buffer is filled again once
all readers have taken what was in it. A reader that dies or falls silent is given up after the timeout.

vLLM has an engine for CUDA IPC, and the workers of vLLM read ours through the same interface (engine/vllm/worker.py).
Its own one is not used: the learner would have to import vLLM, it waits without a deadline, it does not notice a buffer
that was overwritten, and it cannot be tested without a GPU.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from multiprocessing.reduction import ForkingPickler
from typing import TYPE_CHECKING, NamedTuple

import torch
from loguru import logger
from torch import Tensor
from torch.multiprocessing import get_sharing_strategy, set_sharing_strategy
from torch.multiprocessing.reductions import rebuild_cuda_tensor, reduce_tensor

from skyrl_train.weights.buckets import fill, read, size_of
from skyrl_train.weights.groups import join_store, open_store

if TYPE_CHECKING:
    from torch.distributed import TCPStore

    from skyrl_train.weights.broadcast import Broadcast

HERE = "127.0.0.1"
NUM_BUFFERS = 2  # one is filled while the other is copied
LOOK_S = 0.002
WAKE_BYTES_PER_S = 1e9  # a sleeping engine takes the memory of its weights again before it reads the first bucket
DEVICE = 6  # place of the device's number among the arguments of `rebuild_cuda_tensor`


class Handles(NamedTuple):
    """The access to the buffers of one device. `readers`: for each reader a handle of every buffer.

    No two readers share a handle: torch counts for each how often it was opened and closed.
    """

    port: int  # of the store
    readers: tuple[tuple[bytes, ...], ...]


def key_of(device: torch.device) -> str:
    """Return a name of the device that all processes of the machine have for it: of a GPU its UUID."""
    return str(torch.cuda.get_device_properties(device).uuid) if device.type == "cuda" else str(device)


def handle_of(buffer: Tensor) -> bytes:
    """Return what `opened` makes the same memory of in another process. Memory of a CPU becomes shared memory."""
    strategy = get_sharing_strategy()
    set_sharing_strategy("file_system")  # the other one needs a common parent
    try:
        return bytes(ForkingPickler.dumps(reduce_tensor(buffer)))
    finally:
        set_sharing_strategy(strategy)


def opened(handle: bytes, device: torch.device) -> Tensor:
    """Return the tensor behind a handle. device: where it is, by this process's count of devices."""
    rebuild, arguments = ForkingPickler.loads(handle)
    if rebuild is rebuild_cuda_tensor:
        index = torch.cuda.current_device() if device.index is None else device.index
        arguments = (*arguments[:DEVICE], index, *arguments[DEVICE + 1 :])
    return rebuild(*arguments)


class IpcSender:
    """The sending end, in each rank of the learner. It holds buffers from `lend` to the end of `send`."""

    def __init__(self, device: torch.device, timeout_s: float) -> None:
        """device: of the rank. timeout_s: what a reader may take for a bucket."""
        self._device, self._timeout_s = device, timeout_s
        self._store = open_store(HERE, timeout_s)
        self._buffers: list[Tensor] = []
        self._readers: set[int] = set()  # those that have taken every bucket so far

    def lend(self, num_bytes: int, num_readers: int) -> dict[str, Handles]:
        """Make the buffers of the next push. Return their handles by the name of the device."""
        self._buffers = [torch.empty(num_bytes, dtype=torch.uint8, device=self._device) for _ in range(NUM_BUFFERS)]
        readers = tuple(tuple(map(handle_of, self._buffers)) for _ in range(num_readers))
        return {key_of(self._device): Handles(self._store.port, readers)}

    def is_of(self, broadcast: Broadcast) -> bool:
        """Return whether it sends in this push. On a CPU all ranks share the device, and the first one sends."""
        handles = broadcast.handles.get(key_of(self._device))
        return handles is not None and handles.port == self._store.port

    def send(self, named: Iterator[tuple[str, Tensor]], broadcast: Broadcast) -> list[str]:
        """Let the readers copy the weights, and return the engines of those that took all of them.

        It waits for no reader longer than the timeout. RuntimeError if none is left.
        """
        self._readers = set(range(len(broadcast.handles[key_of(self._device)].readers)))
        count = len(broadcast.buckets)
        try:
            for index, bucket in enumerate(broadcast.buckets):
                self._wait(broadcast, index - NUM_BUFFERS)
                fill(self._buffers[index % NUM_BUFFERS][: size_of(bucket)], bucket, named, broadcast.number(index))
                if self._device.type == "cuda":
                    torch.cuda.current_stream(self._device).synchronize()
                self._store.add(broadcast.key("filled"), 1)
            for index in range(count - NUM_BUFFERS, count):
                self._wait(broadcast, index)
        finally:
            self._buffers.clear()
            if self._device.type == "cuda":
                torch.cuda.ipc_collect()
        names = (self._store.get(broadcast.key("engine", reader)).decode() for reader in self._readers)
        return sorted(set(names))

    def _wait(self, broadcast: Broadcast, index: int) -> None:
        """Return when every reader has taken this bucket, or has been given up. There is none before the first."""
        if index < 0:
            return
        patience_s = self._timeout_s + (broadcast.num_bytes / WAKE_BYTES_PER_S if index == 0 else 0)
        deadline = time.monotonic() + patience_s
        waiting = self._readers
        while waiting := {reader for reader in waiting if _count(self._store, broadcast, "taken", reader) <= index}:
            if time.monotonic() > deadline:
                logger.warning(f"{len(waiting)} workers of engines get no more of the weights: they are silent")
                self._readers = self._readers - waiting
                break
            time.sleep(LOOK_S)
        if not self._readers:
            raise RuntimeError(f"no engine took the weights: bucket {index} was not copied in {patience_s:.1f} seconds")


def received_by_ipc(
    broadcast: Broadcast, engine: str, device: torch.device, patience_s: float
) -> Iterator[tuple[str, Tensor]]:
    """Return the tensors by name, in their order, copied out of the buffers on `device`. engine: the reader's name.

    patience_s: what a bucket may take. RuntimeError or OSError when none comes, ValueError if a bucket is not the one
    that is due: then this reader was given up, and its buffer holds another one.
    """
    handles = broadcast.handles.get(key_of(device))
    if handles is None:
        raise RuntimeError(f"no learner rank is on the device {key_of(device)}, only on {', '.join(broadcast.handles)}")
    store = join_store(HERE, handles.port, patience_s)
    reader = store.add(broadcast.key("readers"), 1) - 1
    if reader >= len(handles.readers):
        raise RuntimeError(f"more than {len(handles.readers)} workers read the buffers of {key_of(device)}")
    store.set(broadcast.key("engine", reader), engine)
    sources = [opened(handle, device) for handle in handles.readers[reader]]
    for index, bucket in enumerate(broadcast.buckets):
        deadline = time.monotonic() + patience_s
        while _count(store, broadcast, "filled") <= index:
            if time.monotonic() > deadline:
                raise TimeoutError(f"bucket {index} did not come in {patience_s:g} seconds")
            time.sleep(LOOK_S)
        buffer = torch.empty(size_of(bucket), dtype=torch.uint8, device=device)
        buffer.copy_(sources[index % NUM_BUFFERS][: len(buffer)])
        tensors = read(buffer, bucket, broadcast.number(index))  # it waits for the copy
        if index == len(broadcast.buckets) - 1:
            sources.clear()  # the sender frees them now
        store.add(broadcast.key("taken", reader), 1)
        yield from tensors


def _count(store: TCPStore, broadcast: Broadcast, *words: object) -> int:
    return store.add(broadcast.key(*words), 0)
