"""Buckets of weights: many tensors in one flat buffer, so that few large pieces travel instead of many small ones.

number  sum | tensor  tensor ... tensor     the first 64 bytes say which bucket this is, and the sum of its words
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator

import torch
from torch import Tensor

from skyrl_train.weights.shared_memory import ALIGNMENT, SharedTensor, view_of

HEADER = ALIGNMENT  # bytes
BUCKET_BYTES = 64 * 2**20
Bucket = tuple[SharedTensor, ...]  # `first_byte` counts from the beginning of the bucket


def spec_of(name: str, tensor: Tensor) -> SharedTensor:
    """Return what a reader must know of a tensor; its place comes from `layout`."""
    return SharedTensor(name, str(tensor.dtype).removeprefix("torch."), tuple(tensor.shape), 0)


def layout(specs: Iterable[SharedTensor], bucket_bytes: int = BUCKET_BYTES) -> tuple[Bucket, ...]:
    """Give every tensor a place, in their order. Only a tensor that is larger than a bucket makes one larger."""
    buckets: list[list[SharedTensor]] = []
    end = HEADER
    for spec in specs:
        first = aligned(end)
        if not buckets or first + spec.num_bytes > bucket_bytes:
            buckets.append([])
            first = HEADER
        buckets[-1].append(spec._replace(first_byte=first))
        end = first + spec.num_bytes
    return tuple(map(tuple, buckets))


def size_of(bucket: Bucket) -> int:
    """Return the bytes of a bucket with its header, up to a whole word."""
    return aligned(bucket[-1].first_byte + bucket[-1].num_bytes)


def aligned(num_bytes: int) -> int:
    return num_bytes + -num_bytes % ALIGNMENT


def fill(buffer: Tensor, bucket: Bucket, named: Iterator[tuple[str, Tensor]], number: int) -> None:
    """Take the tensors of a bucket from `named`, write them into the buffer, and sign it with its number.

    ValueError if a tensor is not the one that was announced: the reader would take its bytes for others.
    """
    for spec in bucket:
        name, tensor = next(named)
        if spec_of(name, tensor) != spec._replace(first_byte=0):
            raise ValueError(f"{name} is {tensor.dtype} of {list(tensor.shape)}, and {spec} was announced")
        view_of(buffer, spec).copy_(tensor.detach())
    signature = torch.stack([torch.full_like(summed(buffer), number), summed(buffer)])
    buffer[: signature.nbytes].view(torch.int64).copy_(signature)


def read(buffer: Tensor, bucket: Bucket, number: int) -> list[tuple[str, Tensor]]:
    """Return the tensors of a bucket; they are views. ValueError if it is another bucket or was damaged."""
    found, total = buffer[:16].view(torch.int64).tolist()
    if (found, total) != (number, summed(buffer).item()):
        what = f"bucket {found} came instead" if found != number else "its sum differs"
        raise ValueError(f"bucket {number}, from {bucket[0].name} to {bucket[-1].name}, did not arrive: {what}")
    return [(spec.name, view_of(buffer, spec)) for spec in bucket]


def summed(buffer: Tensor) -> Tensor:
    """Return the sum of the words behind the header. It wraps around."""
    return buffer[HEADER:].view(torch.int64).sum()
