"""A push between a learner and an engine that share a tiny model, and a push that breaks half-way."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest
import torch

from skyrl_train.config import TrainerConfig
from skyrl_train.config.algorithm import AlgorithmConfig
from skyrl_train.engine.base import EngineDied
from skyrl_train.engine.torch import TorchEngine
from skyrl_train.learner.learner import TorchLearner
from skyrl_train.policy.model import Policy
from skyrl_train.weights.base import PushFailed
from skyrl_train.weights.in_process import InProcessWeights
from tests.skyrl_train.engine.conftest import ask, make_engine, until_step  # noqa: F401 (a fixture)
from tests.tiny_models import tiny_policy, tiny_tokenizer

AT_MOST_S = 200.0  # a test that waits longer hangs
LONG: dict[str, Any] = {"min_tokens": 60, "max_tokens": 60}


def learner_of(policy: Policy, version: int) -> TorchLearner:
    learner = TorchLearner(policy, TrainerConfig(algorithm=AlgorithmConfig(use_kl_loss=False)), num_training_steps=9)
    learner.policy_version = version
    return learner


class LosesConnection(TorchEngine):
    """Does not answer the first time that it is told of new weights, as an engine in another process may not."""

    has_answered = False

    async def weights_changed(self, policy_version: int) -> None:
        if not self.has_answered:
            self.has_answered = True
            raise ConnectionResetError("the engine's process hung up")
        await super().weights_changed(policy_version)


async def test_the_next_token_comes_from_the_pushed_weights(make_engine):  # noqa: F811
    policy = tiny_policy()
    engine, learner = make_engine(policy), learner_of(policy, 3)
    greedy = ask("a", temperature=0.0, **LONG)
    before = await engine.generate(greedy)
    with torch.no_grad():
        policy.module.get_output_embeddings().weight.neg_()
    await InProcessWeights().push(learner, engine)
    after = await engine.generate(greedy)
    assert (before.policy_version, after.policy_version) == (0, 3)
    assert before.response_ids[0] != after.response_ids[0]


async def test_requests_in_flight_outlive_a_push(make_engine):  # noqa: F811
    policy = tiny_policy()
    engine = make_engine(policy)
    running = asyncio.create_task(engine.generate(ask("a", **LONG)))
    await until_step(engine, 3)
    await InProcessWeights().push(learner_of(policy, 1), engine)
    async with asyncio.timeout(AT_MOST_S):
        assert len((await running).response_ids) == 60


async def test_an_engine_that_does_not_answer_stays_paused_until_a_push_succeeds():
    policy = tiny_policy()
    engine = LosesConnection(policy, tiny_tokenizer(), max_num_seqs=4, max_num_batched_tokens=64)
    learner, weights = learner_of(policy, 4), InProcessWeights()
    running = asyncio.create_task(engine.generate(ask("a", **LONG)))
    await until_step(engine, 3)
    with pytest.raises(PushFailed, match=r"policy version 4 did not reach the engine.*hung up"):
        await weights.push(learner, engine)
    steps = engine.stats().steps
    waiting = asyncio.create_task(engine.generate(ask("b", "b", max_tokens=2, min_tokens=2)))
    await asyncio.sleep(0.1)
    assert engine.stats().steps == steps < 60  # nothing is sampled from weights that it was not told of
    await weights.push(learner, engine)
    async with asyncio.timeout(AT_MOST_S):
        assert len((await running).response_ids) == 60
        assert (await waiting).policy_version == 4
    await engine.close()


async def test_an_engine_that_breaks_in_a_push_is_dead_and_nobody_waits_for_it(make_engine, monkeypatch):  # noqa: F811
    policy = tiny_policy()
    engine = make_engine(policy)
    running = asyncio.create_task(engine.generate(ask("a", **LONG)))
    await until_step(engine, 3)

    def breaks(policy_version: int) -> None:
        raise MemoryError("no memory for the packed weights")

    monkeypatch.setattr(engine._scheduler, "weights_changed", breaks)
    async with asyncio.timeout(AT_MOST_S):
        with pytest.raises(PushFailed, match="the engine died of MemoryError: no memory for the packed weights"):
            await InProcessWeights().push(learner_of(policy, 1), engine)
        with pytest.raises(EngineDied, match="no memory"):
            await running
        with pytest.raises(EngineDied, match="no memory"):
            await engine.generate(ask("b"))
