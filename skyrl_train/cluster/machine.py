"""The other machines of a run: what each must have, and a copy of the newest weights in the memory of each."""

from __future__ import annotations

import asyncio
import fcntl
import os
import socket
import struct
import subprocess
import sys
import uuid
from collections import defaultdict
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import numpy as np

if TYPE_CHECKING:
    from skyrl_train.cluster.session import Node
    from skyrl_train.weights.shared_memory import SharedWeights

PIECE = 64 * 2**20  # bytes that travel through Ray's object store at once
SIOCGIFADDR = 0x8915  # of Linux: the address of a network interface
KEPT = 2  # copies: an engine may still load the one before, while a push brings the next


class Machine:
    """An actor on each machine but the driver's. Its memory files end with it, and so does what the run left there."""

    def __init__(self, mark: str) -> None:
        """mark: of the run's processes on this machine (reaper.py)."""
        from skyrl_train.cluster import reaper

        subprocess.Popen([sys.executable, "-I", reaper.__file__, mark, str(os.getpid())], start_new_session=True)
        self._files: dict[str, int] = {}

    def read(self, token: Path) -> str | None:
        """Return what the driver wrote into this file; None if it is not there."""
        try:
            return token.read_text(encoding="utf-8")
        except OSError:
            return None

    def has(self, folder: Path) -> bool:
        return folder.is_dir()

    def open(self, digest: str, num_bytes: int) -> Path:
        """Make room for a copy, and return its file."""
        while len(self._files) >= KEPT:
            os.close(self._files.pop(next(iter(self._files))))
        self._files[digest] = os.memfd_create("skyrl-weights")
        os.ftruncate(self._files[digest], num_bytes)
        return Path(f"/proc/{os.getpid()}/fd/{self._files[digest]}")

    def write(self, digest: str, first_byte: int, piece: np.ndarray) -> None:
        rest = memoryview(cast("bytes", piece))
        while rest:
            written = os.pwrite(self._files[digest], rest, first_byte)
            rest, first_byte = rest[written:], first_byte + written


class Copies:
    """The weights on other machines: one copy on each, which every engine there maps and checks by its digest."""

    def __init__(self, ray: Any, machines: dict[str, Any]) -> None:
        """machines: handles of Machine actors by the id of their node; the driver's node is not among them."""
        self._ray, self._machines = ray, machines
        self._locks: dict[str, asyncio.Lock] = defaultdict(asyncio.Lock)
        self._there: dict[str, SharedWeights] = {}

    async def on(self, node: str, shared: SharedWeights) -> SharedWeights:
        """Return the weights as engines of this node find them; copies them there first, once for all of them."""
        if node not in self._machines:
            return shared
        async with self._locks[node]:
            there = self._there.get(node)
            if there is None or (there.digest, there.version) != (shared.digest, shared.version):
                there = self._there[node] = await self._copied(self._machines[node], shared)
        return there

    async def _copied(self, machine: Any, shared: SharedWeights) -> SharedWeights:
        name = f"{shared.version} {shared.digest}"
        path = await machine.open.remote(name, shared.num_bytes)
        numbers = np.memmap(shared.path, np.uint8, "r")
        for first in range(0, shared.num_bytes, PIECE):
            piece = await asyncio.to_thread(self._ray.put, np.array(numbers[first : first + PIECE]))
            await machine.write.remote(name, first, piece)
        return replace(shared, path=path)


def refuse_unlike(ray: Any, machines: dict[Node, Any], shared_folder: Path, needed: Sequence[Path]) -> None:
    """Raise ValueError for a machine that does not see `shared_folder` as this one does, or lacks a needed folder.

    A file with a word of this run is written there and read on every machine.
    """
    word = uuid.uuid4().hex
    shared_folder.mkdir(parents=True, exist_ok=True)
    token = shared_folder / f".shared-{word}"
    token.write_text(word, encoding="utf-8")
    try:
        for node, machine in machines.items():
            if ray.get(machine.read.remote(token.absolute())) != word:
                raise ValueError(
                    f"trainer.ckpt_path={shared_folder} is not shared: {node.name} does not find there what this "
                    "machine has just written, and every rank writes its part of a checkpoint there; set "
                    "trainer.ckpt_path to a folder that all machines share"
                )
            for folder in needed:
                if folder.is_dir() and not ray.get(machine.has.remote(folder.absolute())):
                    raise ValueError(
                        f"{folder.absolute()} is missing on {node.name}; put it at the same path of every machine, or "
                        "into a folder that all machines share"
                    )
    finally:
        token.unlink(missing_ok=True)


def meet_through(address: str) -> None:
    """Let gloo and NCCL talk over the interface with this address of this machine, unless the user names another.

    Gloo would take what the machine's name resolves to, which is often 127.0.1.1.
    """
    for _, name in socket.if_nameindex():
        request = struct.pack("256s", name.encode())
        with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as asking, suppress(OSError):  # it has no address
            found = socket.inet_ntoa(fcntl.ioctl(asking.fileno(), SIOCGIFADDR, request)[20:24])
            if found == address:
                os.environ.setdefault("GLOO_SOCKET_IFNAME", name)
                os.environ.setdefault("NCCL_SOCKET_IFNAME", name)
