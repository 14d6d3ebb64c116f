"""Weights that one process sends and the engines receive bucket by bucket: over NCCL between GPUs, gloo between CPUs.

    learner rank 0: Sender     ── a group for each engine ──▶  each worker of the engine: Receiver

Every engine has a group of its own (groups.py), so one that dies or falls silent takes no other with it. The groups
stay from push to push; an engine that is new gets a new one.
"""

from __future__ import annotations

import json
import time
import uuid
from collections.abc import Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field

import torch
from loguru import logger
from torch import Tensor

from skyrl_train.weights.buckets import BUCKET_BYTES, Bucket, fill, layout, read, size_of
from skyrl_train.weights.groups import WeightsGroup, join_store, open_store
from skyrl_train.weights.ipc import Handles, received_by_ipc
from skyrl_train.weights.shared_memory import SharedTensor

TIMEOUT_S = 4.0  # what one engine may keep the others waiting for, at the meeting and at each bucket
PATIENCE = 3  # times as long a worker waits: another engine may be the one that is silent
LOOK_S = 0.002
NO_GROUP = ""
MAX_BUCKETS = 1 << 20


@dataclass(frozen=True, slots=True)
class Broadcast:
    """The announcement of all weights of one policy version: what comes in which bucket, and where to meet.

    handles: by the name of a device, buffers there that its engines copy (ipc.py). Without any, the buckets are sent.
    """

    address: str
    port: int
    push: int  # counted by the sender
    version: int
    buckets: tuple[Bucket, ...]
    timeout_s: float
    handles: Mapping[str, Handles] = field(default_factory=dict)

    @property
    def tensors(self) -> tuple[SharedTensor, ...]:
        return tuple(tensor for bucket in self.buckets for tensor in bucket)

    @property
    def num_bytes(self) -> int:
        return sum(map(size_of, self.buckets))

    def number(self, index: int) -> int:
        """Return the number of a bucket. No other bucket of this sender has it, so an old one is found out."""
        return self.push * MAX_BUCKETS + index

    def key(self, *words: object) -> str:
        """Return a key of the store that belongs to this push."""
        return " ".join(map(str, ("push", self.push, *words)))


class Sender:
    """The sending end, in the process of the learner's first rank. It holds a group for each engine it has met."""

    def __init__(
        self,
        address: str,
        device: torch.device,
        *,
        timeout_s: float = TIMEOUT_S,
        bucket_bytes: int = BUCKET_BYTES,
    ) -> None:
        """address: of this machine, as the engines reach it. device: where the weights are."""
        self._address, self._device = address, device
        self._timeout_s, self._bucket_bytes = timeout_s, bucket_bytes
        self._store = open_store(address, timeout_s)
        self._groups: dict[str, WeightsGroup] = {}
        self._num_pushes, self._name = 0, uuid.uuid4().hex
        self._loss = "none came to the meeting"

    def announce(self, specs: Iterable[SharedTensor], version: int) -> Broadcast:
        """Return what engines must know to receive the next weights."""
        self._num_pushes += 1
        buckets = layout(specs, self._bucket_bytes)
        return Broadcast(self._address, self._store.port, self._num_pushes, version, buckets, self._timeout_s)

    def send(self, named: Iterator[tuple[str, Tensor]], broadcast: Broadcast, num_engines: int) -> list[str]:
        """Send the weights to the engines that come to the meeting, and return those that took all of them.

        It waits for `num_engines`, but for no engine longer than the timeout: then that one's group is given up, and
        the engine finds out by itself. RuntimeError if none is left.
        """
        try:
            self._send(named, broadcast, num_engines)
        except BaseException:
            for engine in list(self._groups):
                self._lose(engine, "the sender failed")
            raise
        if not self._groups:
            raise RuntimeError(f"no engine took the weights: {self._loss}")
        return sorted(self._groups)

    def _send(self, named: Iterator[tuple[str, Tensor]], broadcast: Broadcast, num_engines: int) -> None:
        self._meet(broadcast, num_engines)
        largest = max(map(size_of, broadcast.buckets))
        buffers = [torch.empty(largest, dtype=torch.uint8, device=self._device) for _ in range(2)]
        under_way: dict[str, torch.distributed.Work] = {}
        for index, bucket in enumerate(broadcast.buckets):
            buffer = buffers[index % 2][: size_of(bucket)]
            fill(buffer, bucket, named, broadcast.number(index))  # while the one before is on its way
            self._finish(under_way)
            under_way = self._begun(buffer)
        self._finish(under_way)

    def _meet(self, broadcast: Broadcast, num_engines: int) -> None:
        deadline = time.monotonic() + self._timeout_s
        joined = broadcast.key("joined")
        while (count := self._store.add(joined, 0)) < num_engines and time.monotonic() < deadline:
            time.sleep(LOOK_S)
        come = [json.loads(self._store.get(broadcast.key("engine", index))) for index in range(count)]
        for engine in self._groups.keys() - {engine for engine, _, _ in come}:
            self._lose(engine, "it did not come to the meeting")
        if come:
            with ThreadPoolExecutor(len(come)) as meetings:
                list(meetings.map(lambda who: self._join(broadcast, *who), come))

    def _join(self, broadcast: Broadcast, engine: str, num_workers: int, held: str) -> None:
        """Go on with the group that both ends hold, or make another."""
        group = self._groups.get(engine)
        is_held = group is not None and group.name == held
        name = held if is_held else f"{broadcast.key(engine)} {self._name}"
        self._store.set(broadcast.key("group", engine), name)
        if is_held:
            return
        if group is not None:
            group.abort()  # the other end has given it up
        try:
            self._groups[engine] = WeightsGroup(
                name, self._address, self._store.port, 0, num_workers + 1, self._device, self._timeout_s
            )
        except (RuntimeError, OSError) as error:
            self._lose(engine, str(error))

    def _begun(self, buffer: Tensor) -> dict[str, torch.distributed.Work]:
        under_way = {}
        for engine, group in list(self._groups.items()):
            try:
                under_way[engine] = group.broadcast(buffer)
            except RuntimeError as error:
                self._lose(engine, str(error))
        return under_way

    def _finish(self, under_way: dict[str, torch.distributed.Work]) -> None:
        for engine, work in under_way.items():
            try:
                self._groups[engine].finish(work)
            except (RuntimeError, OSError) as error:
                self._lose(engine, str(error))

    def _lose(self, engine: str, why: str) -> None:
        self._loss = why
        logger.warning(f"an engine gets no more of the weights: {why.splitlines()[0]}")
        group = self._groups.pop(engine, None)
        if group is not None:
            group.abort()


class Receiver:
    """The receiving end, in each worker of an engine."""

    def __init__(self, engine: str, device: torch.device, rank: int = 0, num_workers: int = 1) -> None:
        """engine: a name that no other engine of the run has. rank: of this worker among those of the engine."""
        self._engine, self._device, self._rank, self._num_workers = engine, device, rank, num_workers
        self._group: WeightsGroup | None = None

    def receive(self, broadcast: Broadcast) -> Iterator[tuple[str, Tensor]]:
        """Return the tensors by name, in the order in which they are sent. Each bucket is memory of its own.

        RuntimeError or OSError when nothing comes for too long, ValueError if a bucket is not the one that is due. Then
        the sender has given this engine up.
        """
        if broadcast.handles:
            yield from received_by_ipc(broadcast, self._engine, self._device, PATIENCE * broadcast.timeout_s)
            return
        try:
            group = self._met(broadcast)
            for index, bucket in enumerate(broadcast.buckets):
                buffer = torch.empty(size_of(bucket), dtype=torch.uint8, device=self._device)
                group.finish(group.broadcast(buffer))
                yield from read(buffer, bucket, broadcast.number(index))
        except BaseException:
            self.close()
            raise

    def close(self) -> None:
        if self._group is not None:
            self._group.abort()
            self._group = None

    def _met(self, broadcast: Broadcast) -> WeightsGroup:
        patience_s = PATIENCE * broadcast.timeout_s
        held = NO_GROUP if self._group is None else self._group.name
        store = join_store(broadcast.address, broadcast.port, patience_s)
        if self._rank == 0:
            index = store.add(broadcast.key("joined"), 1) - 1
            store.set(broadcast.key("engine", index), json.dumps([self._engine, self._num_workers, held]))
        name = store.get(broadcast.key("group", self._engine)).decode()
        if self._group is None or name != held:
            self.close()
            where = broadcast.address, broadcast.port
            self._group = WeightsGroup(name, *where, self._rank + 1, self._num_workers + 1, self._device, patience_s)
        return self._group
