from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from skyrl_train.weights.buckets import HEADER, fill, layout, read, size_of, spec_of

DTYPES = [torch.float32, torch.bfloat16, torch.float16, torch.int8, torch.int64, torch.bool]
shapes = st.lists(st.integers(0, 5), max_size=3).map(tuple)
tensors = st.lists(st.tuples(st.sampled_from(DTYPES), shapes), min_size=1, max_size=20)


def tensors_of(kinds: list[tuple[torch.dtype, tuple[int, ...]]]) -> dict[str, Tensor]:
    torch.manual_seed(0)
    return {f"layer.{i}": (torch.randn(shape) * 9).to(dtype) for i, (dtype, shape) in enumerate(kinds)}


@settings(max_examples=60, deadline=None)
@given(tensors, st.integers(HEADER, 600))
def test_every_tensor_has_one_place_of_its_own_and_comes_back_bit_for_bit(kinds, bucket_bytes):
    named = tensors_of(kinds)
    buckets = layout([spec_of(*item) for item in named.items()], bucket_bytes)
    assert [spec.name for bucket in buckets for spec in bucket] == list(named)
    buffer, waiting, found = torch.empty(max(map(size_of, buckets)), dtype=torch.uint8), iter(named.items()), {}
    for number, bucket in enumerate(buckets):
        assert size_of(bucket) <= bucket_bytes + HEADER or len(bucket) == 1
        end = HEADER
        for spec in bucket:
            assert spec.first_byte >= end
            assert spec.first_byte % 64 == 0
            end = spec.first_byte + spec.num_bytes
        piece = buffer[: size_of(bucket)]
        fill(piece, bucket, waiting, number)
        found |= {name: tensor.clone() for name, tensor in read(piece, bucket, number)}
    for name, tensor in named.items():
        assert (found[name].dtype, found[name].shape) == (tensor.dtype, tensor.shape)
        assert torch.equal(found[name], tensor)


def test_a_bucket_is_as_full_as_it_may_be():
    kilobyte = torch.zeros(1024, dtype=torch.int8)
    buckets = layout([spec_of(str(i), kilobyte) for i in range(7)], 3 * 1024 + HEADER)
    assert [len(bucket) for bucket in buckets] == [3, 3, 1]
    [alone, rest] = layout([spec_of("large", torch.zeros(9000)), spec_of("small", kilobyte)], 4096)
    assert size_of(alone) == 36_032 + HEADER
    assert len(rest) == 1


def filled(value: float, number: int) -> tuple[Tensor, tuple]:
    named = {"a": torch.full((3,), value), "b": torch.ones(2)}
    [bucket] = layout([spec_of(*item) for item in named.items()])
    buffer = torch.zeros(size_of(bucket), dtype=torch.uint8)
    fill(buffer, bucket, iter(named.items()), number)
    return buffer, bucket


def test_an_old_bucket_and_a_damaged_one_are_found_out():
    buffer, bucket = filled(1.5, number=7)
    with pytest.raises(ValueError, match="bucket 8, from a to b, did not arrive: bucket 7 came instead"):
        read(buffer, bucket, 8)
    buffer[HEADER + 5] ^= 1
    with pytest.raises(ValueError, match="bucket 7, from a to b, did not arrive: its sum differs"):
        read(buffer, bucket, 7)


@pytest.mark.parametrize("other", [torch.ones(4), torch.ones(3).bfloat16()])
def test_a_tensor_that_is_not_the_announced_one_is_refused(other):
    buffer, bucket = filled(1.0, number=0)
    with pytest.raises(ValueError, match=r"a is .* was announced"):
        fill(buffer, bucket, iter([("a", other), ("b", torch.ones(2))]), 1)
