"""Weights over NCCL from one GPU to another. This file has not been run yet: no machine with two GPUs was at hand.

tests/skyrl_train/weights/test_broadcast.py does the same over gloo between processes on a CPU.
"""

from __future__ import annotations

import signal
import time

import pytest
import torch

from skyrl_train.weights.broadcast import Sender
from tests.skyrl_train.weights.receiving import ReceivingProcess
from tests.skyrl_train.weights.test_broadcast import BUCKET_BYTES, announced, assert_received, push, weights

TIMEOUT_S = 10.0


@pytest.fixture
def sender(device: torch.device) -> Sender:
    if torch.cuda.device_count() < 2:
        pytest.skip(f"needs 2 GPUs, and {torch.cuda.device_count()} are here: NCCL joins no two processes on one")
    return Sender("127.0.0.1", device, timeout_s=TIMEOUT_S, bucket_bytes=BUCKET_BYTES)


@pytest.mark.timeout(300)
def test_an_engine_gets_every_bit_and_a_new_one_takes_the_place_of_one_that_died(sender: Sender) -> None:
    first = ReceivingProcess("first", device="cuda:1")
    for seed in (1, 2):
        assert push(sender, seed, first) == ["first"]
        assert_received(first, seed)
    first.end()
    second = ReceivingProcess("second", device="cuda:1")
    assert push(sender, 3, second) == ["second"]
    assert_received(second, 3)
    second.end()


@pytest.mark.timeout(300)
@pytest.mark.parametrize("by", [signal.SIGKILL, signal.SIGSTOP], ids=["dies", "silent"])
def test_an_engine_that_is_lost_between_buckets_ends_the_push_in_time(sender: Sender, by: int) -> None:
    """NCCL itself has no deadline."""
    lost, named = ReceivingProcess("lost", device="cuda:1"), weights(4) | {"last": torch.randn(6_000_000)}
    broadcast = announced(sender, named, version=4)
    lost.start(broadcast, 2, by)
    started = time.monotonic()
    with pytest.raises(RuntimeError, match="no engine took the weights"):
        sender.send(iter(named.items()), broadcast, num_engines=1)
    assert time.monotonic() - started < 3 * TIMEOUT_S
    lost.end()
