"""The driver's side of weights that are sent. A real learner and pool; broadcast.py's own tests have the processes."""

from __future__ import annotations

import asyncio
import gc
import time
from pathlib import Path
from typing import Any

import pytest
import torch

from skyrl_train.engine.base import EngineDied
from skyrl_train.engine.pool import EnginePool
from skyrl_train.engine.torch.loading import LoadingTorchEngine
from skyrl_train.learner.learner import TorchLearner
from skyrl_train.weights.base import PushFailed
from skyrl_train.weights.broadcast import Broadcast
from skyrl_train.weights.sent import BroadcastWeights, SentWeights
from skyrl_train.weights.shared_memory import SharedWeights, proof_ids_of, read_shared
from tests.skyrl_train.engine.conftest import ask
from tests.skyrl_train.engine.vllm.conftest import learner_of, policy_of
from tests.skyrl_train.weights.test_shared_memory import memory_open
from tests.tiny_models import tiny_tokenizer


class Sends(TorchLearner):
    """Says that it has sent: its engine takes the weights from it, in the same process."""

    def send_weights(self, broadcast: Broadcast, num_engines: int) -> list[str]:
        return ["engine"]


class Takes(LoadingTorchEngine):
    """Loads from a file what it would receive."""

    def __init__(self, learner: TorchLearner, folder: Path) -> None:
        super().__init__(policy_of(9), tiny_tokenizer(), max_num_seqs=8, max_num_batched_tokens=512)
        self._learner, self._file = learner, folder / f"{id(self)}"
        self.loaded: list[type] = []

    async def load_weights(self, weights: SharedWeights | Broadcast) -> None:
        self.loaded.append(type(weights))
        is_file = isinstance(weights, SharedWeights)
        await super().load_weights(weights if is_file else self._learner.publish(self._file))


class Parts:
    """A learner, and a pool of one engine."""

    def __init__(self, folder: Path) -> None:
        self.learner = learner_of(policy_of(2), 1)
        self.learner.__class__ = Sends
        self.folder = folder
        self.made = [Takes(self.learner, folder)]
        self.pool = EnginePool(self.made[:1], self._start)
        ids = proof_ids_of(tiny_tokenizer())
        self.weights = BroadcastWeights(ids, torch.float32, num_engines=lambda: self.pool.num_up, deadline_s=300.0)

    async def _start(self, index: int) -> Takes:
        self.made.append(Takes(self.learner, self.folder))
        return self.made[-1]


@pytest.fixture
async def parts(tmp_path):
    parts = Parts(tmp_path)
    yield parts
    await parts.pool.close()


async def test_an_engine_that_is_started_later_gets_the_weights_in_a_file_of_its_own(parts):
    await parts.weights.push(parts.learner, parts.pool)
    assert parts.weights.metrics["weights/max_logprob_difference"] < 1e-4
    assert parts.weights.metrics["weights/megabytes"] > 0.1
    before = await parts.pool.generate(ask("a", "before", seed=3))
    await parts.made[0].close()
    after = await parts.pool.generate(ask("a", "after", seed=3))
    assert after == before
    assert [engine.loaded for engine in parts.made] == [[Broadcast], [SharedWeights]]


async def test_where_the_learner_holds_newer_weights_it_waits_for_their_push(parts):
    await parts.weights.push(parts.learner, parts.pool)
    parts.learner.policy_version = 2  # an update has ended, and is not pushed yet
    with torch.no_grad():
        for parameter in parts.learner.policy.module.parameters():
            parameter.mul_(1.01)
    await parts.made[0].close()
    waiting = asyncio.create_task(parts.pool.generate(ask("a", seed=3)))
    while len(parts.made) == 1:  # noqa: ASYNC110 (the pool tells nobody)
        await asyncio.sleep(0.01)
    await asyncio.sleep(0.2)
    assert not waiting.done()
    assert parts.made[1].loaded == []
    push = asyncio.create_task(parts.weights.push(parts.learner, parts.pool))
    assert (await waiting).policy_version == 2
    await push
    assert [engine.loaded for engine in parts.made] == [[Broadcast], [SharedWeights]]


async def test_the_file_holds_what_was_announced_and_goes_with_the_weights(parts):
    gc.collect()  # weights of other tests
    before = memory_open()
    broadcast = parts.learner.announce_weights()
    sent = SentWeights(broadcast, parts.learner, asyncio.Lock())
    shared = await sent.at_hand()
    assert shared is not None
    assert shared is await sent.at_hand()
    named = dict(read_shared(shared))
    assert [(spec.name, spec.shape) for spec in broadcast.tensors] == [(n, tuple(t.shape)) for n, t in named.items()]
    assert memory_open() > before
    del sent, shared, named
    assert memory_open() == before


class Cannot(TorchLearner):
    def send_weights(self, broadcast: Broadcast, num_engines: int) -> list[str]:
        raise RuntimeError("no engine took the weights: Connection closed by peer")


async def test_a_push_that_fails_waits_for_no_engine_and_closes_what_may_hold_half(parts, monkeypatch):
    async def never(*_: Any) -> None:
        await asyncio.sleep(3600)

    parts.learner.__class__ = Cannot
    monkeypatch.setattr(parts.made[0], "load_weights", never)
    started = time.monotonic()
    with pytest.raises(PushFailed, match=r"version 1 did not reach the engine.*Connection closed by peer"):
        await parts.weights.push(parts.learner, parts.pool)
    assert time.monotonic() - started < 100, "it waited for the engine"
    with pytest.raises(EngineDied):
        await parts.pool.generate(ask("a"))
