"""Attention of segments: one ragged call a layer, as a GPU computes it, and padded buckets, in float32 on the CPU."""

from __future__ import annotations

from collections.abc import Callable
from itertools import accumulate, pairwise

import pytest
import torch
from torch import Tensor
from torch.testing import assert_close
from torch.utils._python_dispatch import TorchDispatchMode

from skyrl_train.ops import REFERENCE, cuda, ops_for
from skyrl_train.ops.base import PackedSegments, SegmentAttention
from skyrl_train.ops.bucketed_attention import bucketed_attention
from skyrl_train.ops.cuda import CudaAttention
from skyrl_train.ops.ragged import Ragged, RepeatedRows, gathered_keys, ragged_attention

# segment lengths, and the segment that each one continues
TREES: dict[str, tuple[list[int], list[int]]] = {
    "samples of their own": ([5, 1, 17], [-1, -1, -1]),
    "a group": ([40, 3, 9, 1, 20], [-1, 0, 0, 0, 0]),
    "a chain": ([20, 7, 16, 4, 5], [-1, 0, 1, 2, 2]),
    "two groups and a sample": ([18, 2, 2, 6, 30, 1, 8], [-1, 0, 0, -1, -1, 4, 4]),
}


def attended(
    make: Callable[[PackedSegments, torch.device], SegmentAttention],
    tree: tuple[list[int], list[int]],
    heads: tuple[int, int],
    window: int | None,
) -> list[Tensor]:
    """Outputs, and the gradients of queries, keys and values."""
    lengths, parents = tree
    generator = torch.Generator().manual_seed(1)
    query, key, value = (torch.randn(sum(lengths), n, 8, generator=generator) for n in (heads[0], heads[1], heads[1]))
    leaves = [tensor.requires_grad_() for tensor in (query, key, value)]
    attend = make(PackedSegments([0, *accumulate(lengths)], parents), torch.device("cpu"))
    out = attend(*leaves, scale=0.3, window=window)
    return [out, *torch.autograd.grad(out, leaves, torch.randn(out.shape, generator=generator))]


@pytest.fixture
def one_call(monkeypatch: pytest.MonkeyPatch) -> list[Ragged]:
    """The calls of the flash kernel, for which the plain computation stands in."""
    calls: list[Ragged] = []

    def flash_attention(query: Tensor, key: Tensor, value: Tensor, ragged: Ragged, **options) -> Tensor:
        calls.append(ragged)
        return ragged_attention(query, key, value, ragged, **options)

    monkeypatch.setattr(cuda, "has_flash", lambda *_: True)
    monkeypatch.setattr(cuda, "flash_attention", flash_attention)
    return calls


@pytest.mark.parametrize("window", [None, 1, 6])
@pytest.mark.parametrize("heads", [(4, 4), (6, 2)], ids=str)
@pytest.mark.parametrize("tree", TREES.values(), ids=TREES)
def test_all_implementations_compute_what_the_reference_does(
    tree: tuple[list[int], list[int]], heads: tuple[int, int], window: int | None, one_call: list[Ragged]
) -> None:
    expected = attended(REFERENCE.segment_attention, tree, heads, window)
    assert not one_call
    for make in (CudaAttention, bucketed_attention, ops_for(torch.device("cpu"), torch.float32).segment_attention):
        out, *gradients = attended(make, tree, heads, window)
        assert_close(out, expected[0], atol=1e-6, rtol=1e-6)
        for found, exact in zip(gradients, expected[1:], strict=True):
            assert_close(found, exact, atol=1e-5, rtol=1e-5)
    assert len(one_call) == 1


def test_keys_of_what_a_segment_continues_come_before_its_own() -> None:
    #  segments  0 1 2 | 3 4 | 5 | 6 7        the second and third continue the first, the last continues the third
    rows, ragged = gathered_keys(PackedSegments([0, 3, 5, 6, 8], [-1, 0, 0, 2]), torch.device("cpu"))
    assert rows is not None
    parts = [rows[a:b].tolist() for a, b in pairwise(ragged.key_offsets.tolist())]
    assert parts == [[0, 1, 2], [0, 1, 2, 3, 4], [0, 1, 2, 5], [0, 1, 2, 5, 6, 7]]
    assert ragged.query_offsets.tolist() == [0, 3, 5, 6, 8]
    assert (ragged.max_queries, ragged.max_keys) == (3, 6)
    assert gathered_keys(PackedSegments([0, 3, 5], [-1, -1]), torch.device("cpu"))[0] is None  # nothing to gather


def test_gradients_of_a_row_that_is_repeated_are_summed_in_float32() -> None:
    rows = torch.zeros(1000, dtype=torch.long)
    tensor = torch.zeros(2, 1, dtype=torch.bfloat16, requires_grad=True)
    [gradient] = torch.autograd.grad(RepeatedRows.apply(tensor, rows).float().sum(), tensor)
    assert gradient.tolist() == [[1000.0], [0.0]]  # one by one in bfloat16 they would come to 256


class LargestTensor(TorchDispatchMode):
    """The most numbers that an operation returned, on the meta device, where large ones cost nothing."""

    def __init__(self) -> None:
        super().__init__()
        self.numbers = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for tensor in out if isinstance(out, tuple | list) else [out]:
            if isinstance(tensor, Tensor):
                self.numbers = max(self.numbers, tensor.numel())
        return out


def test_no_tensor_has_the_size_of_a_mask(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cuda, "has_flash", lambda *_: True)
    monkeypatch.setattr(cuda, "flash_attention", lambda query, *_, **__: query + 0)
    lengths, parents = [512, 8192, 8192, 8192, 8192], [-1, 0, 0, 0, 0]
    query, key, value = (torch.empty(sum(lengths), n, 64, device="meta", dtype=torch.bfloat16) for n in (14, 2, 2))
    attend = CudaAttention(PackedSegments([0, *accumulate(lengths)], parents), torch.device("meta"))
    with LargestTensor() as largest:
        attend(query, key, value, scale=0.125, window=None)
    assert largest.numbers <= query.numel() < 8192 * (512 + 8192)


@pytest.mark.parametrize("window", [None, 5])
def test_keys_that_lie_in_pages_are_those_that_lie_end_to_end(window: int | None) -> None:
    counts, lengths, size = [1, 7, 3], [9, 7, 20], 4
    generator = torch.Generator().manual_seed(1)
    query = torch.randn(sum(counts), 4, 8, generator=generator)
    key, value = (torch.randn(sum(lengths), 2, 8, generator=generator) for _ in range(2))
    cpu = torch.device("cpu")
    pages = torch.randperm(15, generator=generator).view(3, 5).int()
    stores = [torch.full((15, size, 2, 8), torch.nan) for _ in range(2)]
    for store, rows in zip(stores, (key, value), strict=True):
        for own, sequence in zip(pages, rows.split(lengths), strict=True):
            for page, part in zip(own.tolist(), sequence.split(size), strict=False):
                store[page, : len(part)] = part
    expected = ragged_attention(query, key, value, Ragged.of(counts, lengths, cpu), scale=0.3, window=window)
    ragged = Ragged.of(counts, lengths, cpu, pages)
    for attend in (ragged_attention, cuda.paged_attention):
        assert torch.equal(attend(query, *stores, ragged, scale=0.3, window=window), expected)
    num_keys, last = torch.tensor(lengths), torch.tensor(counts).cumsum(0) - 1
    found = cuda.decode_attention(query[last], *stores, num_keys, pages, scale=0.3, window=window)
    assert_close(found, expected[last], atol=1e-6, rtol=1e-6)
