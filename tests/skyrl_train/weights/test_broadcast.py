"""Weights over gloo to engines in processes of their own: bits, lost engines, new ones. tests/gpu does it over NCCL."""

from __future__ import annotations

import signal
import time
from collections.abc import Iterator
from contextlib import suppress

import pytest
import torch
from torch import Tensor

from skyrl_train.weights import broadcast as module
from skyrl_train.weights.broadcast import Broadcast, Sender
from skyrl_train.weights.buckets import Bucket, spec_of
from tests.skyrl_train.weights.receiving import ReceivingProcess, receiving

CPU = torch.device("cpu")
PATIENT_S, LOST_S = 60.0, 8.0  # the timeout where every engine answers, and where one does not: the others must
BUCKET_BYTES = 4096


def weights(seed: int) -> dict[str, Tensor]:
    torch.manual_seed(seed)
    return {
        "embedding": torch.randn(40, 33),  # larger than a bucket
        "norm": torch.randn(33).bfloat16(),
        "scale": torch.tensor(float(seed)),
        **{f"layers.{i}.weight": torch.randn(17, 33).bfloat16() for i in range(9)},
        "nothing": torch.empty(0),
    }


@pytest.fixture(scope="module")
def sender() -> Sender:
    return Sender("127.0.0.1", CPU, timeout_s=PATIENT_S, bucket_bytes=BUCKET_BYTES)


@pytest.fixture(scope="module")
def healthy() -> Iterator[ReceivingProcess]:
    with receiving("healthy") as [process]:
        yield process


def announced(sender: Sender, named: dict[str, Tensor], version: int) -> Broadcast:
    return sender.announce([spec_of(*item) for item in named.items()], version)


def push(sender: Sender, seed: int, *processes: ReceivingProcess) -> list[str]:
    named = weights(seed)
    broadcast = announced(sender, named, version=seed)
    for process in processes:
        process.start(broadcast)
    return sender.send(iter(named.items()), broadcast, len(processes))


def assert_received(process: ReceivingProcess, seed: int) -> None:
    found = process.received()
    assert not isinstance(found, str), found
    named = weights(seed)
    assert list(found) == list(named)
    for name, tensor in named.items():
        assert found[name].dtype == tensor.dtype
        assert torch.equal(found[name], tensor), name


def test_two_engines_get_every_bit_and_keep_their_groups_until_one_is_replaced(sender, healthy):
    with receiving("lost") as [lost]:
        for seed in (1, 2):
            assert push(sender, seed, healthy, lost) == ["healthy", "lost"]
            assert_received(healthy, seed)
            assert_received(lost, seed)
            names = {engine: group.name for engine, group in sender._groups.items()}
            assert {name.split()[1] for name in names.values()} == {"1"}, "made in the first push, and kept"
        lost.end()
        with receiving("new") as [new]:
            assert push(sender, 3, healthy, new) == ["healthy", "new"]
            assert_received(healthy, 3)
            assert_received(new, 3)
    assert sender._groups["healthy"].name == names["healthy"]


def test_the_workers_of_an_engine_that_share_its_layers_all_get_the_weights(sender):
    workers = [ReceivingProcess("split", rank, num_workers=2) for rank in range(2)]
    named = weights(5)
    broadcast = announced(sender, named, version=5)
    for worker in workers:
        worker.start(broadcast)
    assert sender.send(iter(named.items()), broadcast, num_engines=1) == ["split"]
    for worker in workers:
        assert_received(worker, 5)
        worker.end()


@pytest.mark.parametrize(
    ("ends_after", "by"),
    [(2, signal.SIGKILL), (0, signal.SIGSTOP), (2, signal.SIGSTOP)],
    ids=["dies between buckets", "silent before", "silent between buckets"],
)
def test_an_engine_that_is_lost_costs_the_others_its_timeout_and_nothing_else(healthy, ends_after, by):
    sender = Sender("127.0.0.1", CPU, timeout_s=LOST_S, bucket_bytes=BUCKET_BYTES)
    more = {f"more.{i}": torch.full((1000,), float(i)) for i in range(6)}
    named = weights(6) | more | {"last": torch.randn(6_000_000)}  # more than the sockets take in advance
    with receiving(f"lost {ends_after} {by}") as [lost]:
        broadcast = announced(sender, named, version=6)
        assert len(broadcast.buckets) > 10
        healthy.start(broadcast)
        lost.start(broadcast, ends_after, by)
        started = time.monotonic()
        assert sender.send(iter(named.items()), broadcast, num_engines=2) == ["healthy"]
        assert time.monotonic() - started < 5 * LOST_S, "it cost more than a meeting and a bucket"
        found = healthy.received()
        assert not isinstance(found, str), found
        assert torch.equal(found["last"], named["last"])
        if by == signal.SIGKILL:
            with pytest.raises(EOFError):
                lost.received()
    assert push(sender, 7, healthy) == ["healthy"]
    assert_received(healthy, 7)


def test_without_any_engine_the_push_fails():
    sender, named = Sender("127.0.0.1", CPU, timeout_s=2.0), weights(8)
    with pytest.raises(RuntimeError, match="no engine took the weights: "):
        sender.send(iter(named.items()), announced(sender, named, version=8), num_engines=1)


def test_a_stale_bucket_never_becomes_weights(sender, healthy, monkeypatch):
    """As if the buffer went out before it was filled."""
    fill, count = module.fill, 0

    def lazy(buffer: Tensor, bucket: Bucket, named: Iterator, number: int) -> None:
        nonlocal count
        count += 1
        if count == 4:
            for _ in bucket:
                next(named)
        else:
            fill(buffer, bucket, named, number)

    monkeypatch.setattr(module, "fill", lazy)
    with suppress(RuntimeError):  # what the sockets take in advance decides whether the sender sees it, too
        push(sender, 9, healthy)
    said = healthy.received()
    assert isinstance(said, str)
    assert "did not arrive" in said
    monkeypatch.undo()
    assert push(sender, 10, healthy) == ["healthy"]
    assert_received(healthy, 10)
