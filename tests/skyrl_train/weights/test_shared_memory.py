import asyncio
import os
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from skyrl_train.engine.base import EngineDied
from skyrl_train.learner.learner import TorchLearner
from skyrl_train.weights.base import PushFailed
from skyrl_train.weights.shared_memory import SharedMemoryWeights, SharedWeights, proof_ids_of
from tests.skyrl_train.engine.conftest import ask, until_step
from tests.skyrl_train.engine.vllm.conftest import LoadingTorchEngine, learner_of, policy_of, weights_of
from tests.tiny_models import tiny_tokenizer

LONG: dict[str, Any] = {"min_tokens": 300, "max_tokens": 300}


@pytest.fixture
async def engine():
    engine = LoadingTorchEngine(policy_of(1))
    yield engine
    await engine.close()


def memory_open() -> int:
    """Bytes of weights that this process still holds in memory without a name."""
    links = [link for link in Path("/proc/self/fd").iterdir() if os.path.islink(link)]
    return sum(os.stat(link).st_size for link in links if "memfd:skyrl" in os.readlink(link))


async def test_the_engine_samples_from_the_learners_weights_and_the_proof_is_a_metric(engine):
    policy, weights = policy_of(2), weights_of()
    await weights.push(learner_of(policy, 7), engine)
    completion = await engine.generate(ask("a", seed=1))
    assert completion.policy_version == 7
    assert weights.metrics["weights/max_logprob_difference"] < 1e-5
    num_weights = sum(weight.numel() for weight in policy.module.parameters())
    assert weights.metrics["weights/megabytes"] == pytest.approx(4e-6 * num_weights, rel=0.05)
    assert memory_open() == 0


class SomeoneElse(TorchLearner):
    """Computes with other weights than it publishes."""

    def publish(self, path: Path) -> SharedWeights:
        return learner_of(policy_of(3), self.policy_version).publish(path)


class Breaks(TorchLearner):
    def publish(self, path: Path) -> SharedWeights:
        path.write_bytes(bytes(5000))
        raise OSError(28, "No space left on device")


async def test_an_engine_that_computes_something_else_is_closed(engine):
    learner = learner_of(policy_of(2), 4)
    learner.__class__ = SomeoneElse
    running = asyncio.create_task(engine.generate(ask("a", **LONG)))
    await until_step(engine, 2)
    with pytest.raises(PushFailed, match=r"version 4 did not reach .* differ from the learner's by [\d.]+ on average"):
        await weights_of().push(learner, engine)
    with pytest.raises(EngineDied):
        await running
    assert memory_open() == 0


async def test_a_learner_that_cannot_write_leaves_the_old_weights_and_a_paused_engine(engine):
    weights = weights_of()
    await weights.push(learner_of(policy_of(2), 1), engine)
    learner = learner_of(policy_of(3), 2)
    learner.__class__ = Breaks
    with pytest.raises(PushFailed, match=r"version 2 did not reach the engine.*No space left"):
        await weights.push(learner, engine)
    waiting = asyncio.create_task(engine.generate(ask("a")))
    await asyncio.sleep(0.1)
    assert not waiting.done()
    assert memory_open() == 0
    await weights.push(learner_of(policy_of(3), 3), engine)
    assert (await waiting).policy_version == 3


def silence(monkeypatch: pytest.MonkeyPatch) -> Callable[..., Awaitable[None]]:
    """Return a call that never answers. Once it is made, 1,000 seconds of the event loop have passed."""

    async def never(*_: Any) -> None:
        loop = asyncio.get_running_loop()
        usual = loop.time
        monkeypatch.setattr(loop, "time", lambda: usual() + 1000)
        await asyncio.Event().wait()

    return never


@pytest.mark.parametrize("silent", ["pause", "load_weights", "logprobs_of_tokens", "weights_changed", "resume"])
async def test_an_engine_that_falls_silent_is_named_within_the_deadline(engine, monkeypatch, silent):
    monkeypatch.setattr(engine, silent, silence(monkeypatch))
    weights = SharedMemoryWeights(proof_ids_of(tiny_tokenizer()), torch.float32, deadline_s=60.0)
    with pytest.raises(PushFailed, match="took longer than 60"):
        await weights.push(learner_of(policy_of(2), 1), engine)
    waiting = asyncio.create_task(engine.generate(ask("a")))
    await asyncio.sleep(0.1)
    if silent in ("load_weights", "logprobs_of_tokens"):  # it may hold anything
        with pytest.raises(EngineDied):
            await waiting
    waiting.cancel()
    assert memory_open() == 0
    assert weights.metrics == {}


async def test_an_engine_that_shares_its_gpu_sleeps_from_the_update_to_the_push(engine):
    weights = SharedMemoryWeights(proof_ids_of(tiny_tokenizer()), torch.float32, takes_turns=True)
    await weights.push(learner_of(policy_of(2), 1), engine)
    await weights.before_update(engine)
    waiting = asyncio.create_task(engine.generate(ask("a")))
    await asyncio.sleep(0.1)
    assert not waiting.done()
    await weights.push(learner_of(policy_of(3), 2), engine)
    assert (await waiting).policy_version == 2


async def test_an_engine_with_a_device_of_its_own_goes_on_during_an_update(engine):
    weights = weights_of()
    await weights.push(learner_of(policy_of(2), 1), engine)
    await weights.before_update(engine)
    assert (await engine.generate(ask("a"))).policy_version == 1


async def test_an_engine_that_does_not_fall_asleep_is_named_within_the_deadline(engine, monkeypatch):
    monkeypatch.setattr(engine, "sleep", silence(monkeypatch))
    ids = proof_ids_of(tiny_tokenizer())
    weights = SharedMemoryWeights(ids, torch.float32, deadline_s=60.0, takes_turns=True)
    with pytest.raises(PushFailed, match=r"did not give the learner the memory .* took longer than 60 seconds"):
        await weights.before_update(engine)


async def test_logprobs_that_are_no_numbers_prove_nothing(engine, monkeypatch):
    async def nothing(ids: list[int]) -> list[float]:
        return [float("nan")] * (len(ids) - 1)

    monkeypatch.setattr(engine, "logprobs_of_tokens", nothing)
    with pytest.raises(PushFailed, match="by nan on average"):
        await weights_of().push(learner_of(policy_of(2), 1), engine)


async def test_the_proof_fits_into_a_short_context(engine, monkeypatch):
    monkeypatch.setattr(engine, "max_model_len", 8)
    asked: list[int] = []
    answer = engine.logprobs_of_tokens

    async def listening(ids: list[int]) -> list[float]:
        asked.extend(ids)
        return await answer(ids)

    monkeypatch.setattr(engine, "logprobs_of_tokens", listening)
    await weights_of().push(learner_of(policy_of(2), 1), engine)
    assert len(asked) == 7  # vLLM samples one token behind it


def test_a_proof_needs_two_tokens():
    with pytest.raises(ValueError, match="1 tokens prove nothing"):
        SharedMemoryWeights([5], torch.float32)
