"""Weights in a file that processes of one machine map: written once by the learner, read by every engine."""

from __future__ import annotations

import math
import os
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor
from xxhash import xxh3_128

ALIGNMENT = 64  # bytes; a tensor that is mapped begins where vector loads like it


class SharedTensor(NamedTuple):
    """Where one tensor lies in the file. `dtype` is torch's name of it, such as "bfloat16"."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    first_byte: int

    @property
    def num_bytes(self) -> int:
        return math.prod(self.shape) * getattr(torch, self.dtype).itemsize


@dataclass(frozen=True, slots=True)
class SharedWeights:
    """All weights of one policy version in one file: small enough to be sent to every engine.

    `digest` is XXH3's 128 bits over the whole file. It finds damage and mix-ups.
    """

    path: Path
    version: int
    tensors: tuple[SharedTensor, ...]
    digest: str

    def __post_init__(self) -> None:
        if not self.tensors:
            raise ValueError(f"{self.path}: a file without weights")
        [(name, times)] = Counter(tensor.name for tensor in self.tensors).most_common(1)
        if times > 1:
            raise ValueError(f"{self.path}: the weight {name} comes {times} times")

    @property
    def num_bytes(self) -> int:
        """Size of the file: the tensors follow each other, and the last one ends it."""
        return self.tensors[-1].first_byte + self.tensors[-1].num_bytes


def write_shared(named: Iterable[tuple[str, Tensor]], path: Path, version: int) -> SharedWeights:
    """Write the tensors one after the other into the file `path`, and return what a reader needs.

    Each tensor may be freed once the next one is asked for. What an earlier process left under this name is replaced.
    An error leaves no file.
    """
    tensors: list[SharedTensor] = []
    digest, end = xxh3_128(), 0
    try:
        with open(path, "wb", buffering=0, opener=_for_this_user) as file:
            for name, tensor in named:
                padding = bytes(-end % ALIGNMENT)
                numbers = memoryview(_bytes_of(tensor).numpy())
                for piece in (padding, numbers):
                    _write_all(file.fileno(), piece)
                    digest.update(piece)
                dtype, shape = str(tensor.dtype).removeprefix("torch."), tuple(tensor.shape)
                tensors.append(SharedTensor(name, dtype, shape, end + len(padding)))
                end += len(padding) + len(numbers)
        return SharedWeights(path, version, tuple(tensors), digest.hexdigest())
    except BaseException:
        if not path.is_symlink():  # memory without a name, /proc/PID/fd/N, goes with the process that owns it
            path.unlink(missing_ok=True)
        raise


def read_shared(shared: SharedWeights) -> Iterator[tuple[str, Tensor]]:
    """Map the file and return its tensors by name, in the order in which they were written. Nothing is copied.

    The tensors stay valid after the file is removed. ValueError if the file is not what `shared` describes, before the
    first tensor is returned.
    """
    found = os.stat(shared.path).st_size
    if found != shared.num_bytes:
        raise ValueError(f"{shared.path} has {found:,} bytes, and {shared.num_bytes:,} were written")
    mapped = torch.from_file(str(shared.path), shared=False, size=found, dtype=torch.uint8)
    if xxh3_128(memoryview(mapped.numpy())).hexdigest() != shared.digest:
        raise ValueError(f"{shared.path} does not hold the weights of version {shared.version}: its digest differs")
    return ((tensor.name, _view(mapped, tensor)) for tensor in shared.tensors)


def _view(mapped: Tensor, tensor: SharedTensor) -> Tensor:
    numbers = mapped[tensor.first_byte : tensor.first_byte + tensor.num_bytes]
    return numbers.view(getattr(torch, tensor.dtype)).view(tensor.shape)


def _bytes_of(tensor: Tensor) -> Tensor:
    return tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8)


def _for_this_user(path: str, flags: int) -> int:
    return os.open(path, flags, mode=0o600)


def _write_all(descriptor: int, piece: bytes | memoryview) -> None:
    """Write every byte: one call of the system writes at most 2 GiB."""
    rest = memoryview(piece)
    while rest:
        rest = rest[os.write(descriptor, rest) :]
