from __future__ import annotations

import gc

import pytest
import torch

from skyrl_train.ops.cpu import huge_pages


@pytest.mark.parametrize("rows", [1, huge_pages.SMALLEST // 8 // 4 + 1], ids=["small", "large"])
def test_zeros_that_can_be_written_and_outlive_their_maker(rows):
    first = huge_pages.zeros((rows, 4), torch.float32)
    assert first.shape == (rows, 4)
    assert first.data_ptr() % 64 == 0
    view = first[:, 1]
    del first
    gc.collect()
    assert not view.any()
    view.fill_(3)
    assert view.sum() == 3 * rows


def test_memory_is_given_back():
    def resident() -> int:
        with open("/proc/self/statm") as statm:
            return int(statm.read().split()[1])

    before = resident()
    for _ in range(20):
        huge_pages.zeros((huge_pages.SMALLEST,), torch.float32).fill_(1)
    assert resident() - before < 4 * huge_pages.SMALLEST / 4096 * 2


def test_tensors_of_a_room_lie_side_by_side_and_share_nothing():
    room = huge_pages.Buffers()
    small, large = room.zeros((3, 5), torch.bfloat16), room.zeros((room.CHUNK // 2 + 1,), torch.int16)
    last = room.zeros((2,), torch.float32)
    for tensor in (small, large, last):
        assert tensor.data_ptr() % 64 == 0
        assert not tensor.any()
        tensor.fill_(1)
    assert [int(tensor.sum()) for tensor in (small, large, last)] == [15, room.CHUNK // 2 + 1, 2]
