"""Weights that an engine's process copies on the GPU of the learner, with CUDA IPC. This file has not been run yet.

tests/skyrl_train/weights/test_ipc.py does the same with shared memory on a CPU.
"""

from __future__ import annotations

import signal
from collections.abc import Iterator

import pytest
import torch

from skyrl_train.weights.ipc import IpcSender
from tests.skyrl_train.weights.receiving import ReceivingProcess
from tests.skyrl_train.weights.test_broadcast import assert_received, weights
from tests.skyrl_train.weights.test_ipc import lent, push

TIMEOUT_S = 20.0  # the process makes a CUDA context first


@pytest.fixture
def engine(device: torch.device) -> Iterator[ReceivingProcess]:
    process = ReceivingProcess("engine", device=str(device))
    yield process
    process.end()


@pytest.mark.timeout(300)
def test_an_engine_copies_every_bit_and_the_buffers_go_back_to_the_gpu(
    device: torch.device, engine: ReceivingProcess
) -> None:
    sender = IpcSender(device, TIMEOUT_S)
    before = torch.cuda.memory_allocated(device)
    for seed in (1, 2, 3):
        assert push(sender, seed, engine) == ["engine"]
        assert_received(engine, seed)
        assert torch.cuda.memory_allocated(device) == before


@pytest.mark.timeout(300)
def test_a_slow_engine_gets_every_bit_too(device: torch.device, engine: ReceivingProcess) -> None:
    """The buffers are filled again only when the engine has copied them."""
    sender = IpcSender(device, TIMEOUT_S)
    named = weights(4) | {f"large.{i}": torch.full((64 * 2**20,), float(i)) for i in range(4)}
    broadcast = lent(sender, named, 1)
    engine.start(broadcast)
    assert sender.send(iter(named.items()), broadcast) == ["engine"]
    found = engine.received()
    assert not isinstance(found, str), found
    assert all(torch.equal(found[name], tensor) for name, tensor in named.items())


@pytest.mark.timeout(300)
@pytest.mark.parametrize("by", [signal.SIGKILL, signal.SIGSTOP], ids=["dies", "is silent"])
def test_an_engine_that_is_lost_between_buckets_ends_the_push_in_time(
    device: torch.device, engine: ReceivingProcess, by: int
) -> None:
    sender, named = IpcSender(device, TIMEOUT_S), weights(5)
    broadcast = lent(sender, named, 1)
    engine.start(broadcast, 2, by)
    with pytest.raises(RuntimeError, match="no engine took the weights"):
        sender.send(iter(named.items()), broadcast)
