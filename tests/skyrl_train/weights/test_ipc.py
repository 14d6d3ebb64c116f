"""Weights that engines in processes of their own copy out of the learner's buffers: bits, lost and slow readers.

The buffers are shared memory. tests/gpu/test_ipc.py does the same with CUDA IPC.
"""

from __future__ import annotations

import itertools
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor

from skyrl_train.weights.broadcast import PATIENCE, Broadcast
from skyrl_train.weights.buckets import layout, size_of, spec_of
from skyrl_train.weights.ipc import IpcSender, handle_of, key_of
from tests.skyrl_train.weights.receiving import ReceivingProcess, receiving
from tests.skyrl_train.weights.test_broadcast import BUCKET_BYTES, LOST_S, PATIENT_S, assert_received, weights

CPU, NUMBERS = torch.device("cpu"), itertools.count()


def lent(sender: IpcSender, named: dict[str, Tensor], num_readers: int, timeout_s: float = PATIENT_S) -> Broadcast:
    """Return what the learner announces."""
    buckets = layout([spec_of(*item) for item in named.items()], BUCKET_BYTES)
    handles = sender.lend(max(map(size_of, buckets)), num_readers)
    return Broadcast("nowhere", 0, next(NUMBERS), 1, buckets, timeout_s, handles)


def push(sender: IpcSender, seed: int, *processes: ReceivingProcess) -> list[str]:
    named = weights(seed)
    broadcast = lent(sender, named, len(processes))
    for process in processes:
        process.start(broadcast)
    return sender.send(iter(named.items()), broadcast)


@pytest.fixture(scope="module")
def sender() -> IpcSender:
    return IpcSender(CPU, PATIENT_S)


@pytest.fixture(scope="module")
def healthy() -> Iterator[ReceivingProcess]:
    with receiving("healthy") as [process]:
        yield process


def test_two_workers_of_one_device_get_every_bit_again_and_again(sender, healthy):
    with receiving("other") as [other]:
        for seed in (1, 2, 3):
            assert push(sender, seed, healthy, other) == ["healthy", "other"]
            assert_received(healthy, seed)
            assert_received(other, seed)


def test_a_worker_copies_from_the_rank_on_its_own_device(sender, healthy):
    """As two workers of one engine that share its layers, each on the GPU of another rank."""
    elsewhere = IpcSender(torch.device("cpu:1"), PATIENT_S)
    here, there = weights(4), weights(5)
    broadcast = lent(sender, here, 1)
    broadcast = replace(broadcast, handles={**broadcast.handles, **lent(elsewhere, there, 1).handles})
    apart = ReceivingProcess("apart", device="cpu:1")
    for process in (healthy, apart):
        process.start(broadcast)
    assert sender.is_of(broadcast)
    assert elsewhere.is_of(broadcast)
    sending = threading.Thread(target=sender.send, args=(iter(here.items()), broadcast))
    sending.start()
    assert elsewhere.send(iter(there.items()), broadcast) == ["apart"]
    sending.join()
    assert_received(healthy, 4)
    assert_received(apart, 5)
    apart.end()


@pytest.mark.parametrize(
    ("taken", "by"),
    [(1, signal.SIGKILL), (1, signal.SIGSTOP), (-1, signal.SIGKILL)],
    ids=["dies", "is silent", "dies before the last bucket"],
)
def test_a_reader_that_is_lost_costs_the_others_its_timeout_and_nothing_else(healthy, taken, by):
    """taken: the buckets that it copies; -1: all but the last."""
    sender = IpcSender(CPU, LOST_S)
    named = weights(6) | {f"more.{i}": torch.full((1000,), float(i)) for i in range(6)}
    with receiving("lost") as [lost]:
        broadcast = lent(sender, named, 2, LOST_S)
        assert len(broadcast.buckets) > 8
        healthy.start(broadcast)
        lost.start(broadcast, sum(map(len, broadcast.buckets[:taken])), by)
        started = time.monotonic()
        assert sender.send(iter(named.items()), broadcast) == ["healthy"]
        assert time.monotonic() - started < 4 * LOST_S, "it cost more than a bucket"
        found = healthy.received()
        assert not isinstance(found, str), found
        assert all(torch.equal(found[name], tensor) for name, tensor in named.items())
        if by == signal.SIGSTOP:
            lost.resume()
            said = lost.received()
            assert isinstance(said, str), "it took the bucket that came later for its own"
            assert "did not arrive" in said
    assert push(sender, 7, healthy) == ["healthy"]
    assert_received(healthy, 7)


def test_a_buffer_is_filled_again_only_after_the_slowest_reader_has_copied_it(sender, healthy):
    named = weights(8)
    with receiving("slow") as [slow]:
        broadcast = lent(sender, named, 2)
        healthy.start(broadcast)
        slow.start(broadcast, 2, signal.SIGSTOP)
        going_on = threading.Thread(target=slow.resume, args=(0.5,))
        going_on.start()
        assert sender.send(iter(named.items()), broadcast) == ["healthy", "slow"]
        going_on.join()
        assert_received(slow, 8)
        assert_received(healthy, 8)


def test_a_sender_that_fills_nothing_keeps_no_reader_waiting_for_long(sender, healthy):
    broadcast = replace(lent(sender, weights(9), 1), timeout_s=2.0)
    healthy.start(broadcast)
    assert healthy.received() == f"TimeoutError: bucket 0 did not come in {PATIENCE * 2:g} seconds"


def test_without_any_reader_the_push_fails():
    impatient, named = IpcSender(CPU, 2.0), weights(10)
    broadcast = lent(impatient, named, 1)
    with pytest.raises(RuntimeError, match=r"no engine took the weights: bucket 0 was not copied in 2\.0 seconds"):
        impatient.send(iter(named.items()), broadcast)


def test_a_worker_on_a_device_without_a_rank_says_so(sender):
    apart = ReceivingProcess("apart", device="cpu:1")
    apart.start(lent(sender, weights(11), 1))
    assert apart.received() == "RuntimeError: no learner rank is on the device cpu:1, only on cpu"
    apart.end()


def test_one_reader_too_many_gets_nothing(sender, healthy):
    named = weights(12)
    broadcast = lent(sender, named, 1)
    healthy.start(broadcast)
    assert sender.send(iter(named.items()), broadcast) == ["healthy"]
    assert_received(healthy, 12)
    healthy.start(broadcast)
    assert healthy.received() == "RuntimeError: more than 1 workers read the buffers of cpu"


def test_of_ranks_on_one_device_only_the_announced_one_sends(sender):
    other = IpcSender(CPU, PATIENT_S)
    broadcast = lent(sender, weights(13), 1)
    assert sender.is_of(broadcast)
    assert not other.is_of(broadcast)
    assert not sender.is_of(replace(broadcast, handles={}))


def test_a_handle_is_the_same_memory_and_leaves_none_behind_when_both_ends_are_killed():
    """torch has a process that removes the memory when none is left of those that had it open."""
    sends = (
        "import sys, torch",
        "from skyrl_train.weights.ipc import handle_of",
        "buffer = torch.zeros(64, dtype=torch.uint8)",
        "print(handle_of(buffer).hex(), flush=True)",
        "sys.stdin.readline()",
        "buffer += 7",
        "print('added', flush=True)",
        "sys.stdin.readline()",
    )
    reads = (
        "import sys, torch",
        "from skyrl_train.weights.ipc import opened",
        "buffer = opened(bytes.fromhex(sys.stdin.readline()), torch.device('cpu'))",
        "print(buffer.sum().item(), flush=True)",
        "sys.stdin.readline()",
        "print(buffer.sum().item(), flush=True)",
        "sys.stdin.readline()",
    )
    with python(*sends) as sender, python(*reads) as reader:
        assert answer(reader, answer(sender)) == "0"
        [left] = [name for name in os.listdir("/dev/shm") if name.startswith(f"torch_{sender.pid}_")]
        assert answer(sender, "go on") == "added"
        assert answer(reader, "go on") == f"{64 * 7}"
        sender.kill()
        reader.kill()
    deadline = time.monotonic() + 60
    while Path("/dev/shm", left).exists() and time.monotonic() < deadline:
        time.sleep(0.05)
    assert not Path("/dev/shm", left).exists()


def python(*lines: str) -> subprocess.Popen[str]:
    command = [sys.executable, "-c", "\n".join(lines)]
    return subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)


def answer(process: subprocess.Popen[str], line: str | None = None) -> str:
    """Send a line, if there is one, and return the next line of the process."""
    assert process.stdin is not None
    assert process.stdout is not None
    if line is not None:
        process.stdin.write(line + "\n")
        process.stdin.flush()
    return process.stdout.readline().strip()


def test_devices_are_told_apart():
    assert key_of(CPU) == "cpu"
    assert key_of(torch.device("cpu:1")) == "cpu:1"
    assert handle_of(torch.zeros(4)) != handle_of(torch.zeros(4))
