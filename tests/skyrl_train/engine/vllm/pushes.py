"""Weights on their way into vLLM: whole and proven, or the engine is dead. `test_vllm.py` runs this in a process apart.

The last tests end the engines, so their order counts.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import psutil
import pytest
import pytest_asyncio
import torch

from skyrl_train.engine.base import EngineDied
from skyrl_train.engine.pool import EnginePool
from skyrl_train.learner.learner import TorchLearner
from skyrl_train.policy.lora import merged_weights
from skyrl_train.weights.base import PushFailed
from skyrl_train.weights.sent import BroadcastWeights
from skyrl_train.weights.shared_memory import SharedMemoryWeights, SharedWeights, proof_ids_of, write_shared
from tests.skyrl_train.engine.conftest import answers, ask
from tests.skyrl_train.engine.test_torch_engine import PROMPT, assert_learner_agrees
from tests.skyrl_train.engine.vllm.conftest import learner_of, policy_of, started, weights_of
from tests.tiny_models import tiny_tokenizer

pytestmark = pytest.mark.asyncio(loop_scope="session")
LONG: dict[str, Any] = {"min_tokens": 300, "max_tokens": 300}


@pytest_asyncio.fixture(scope="session", loop_scope="session")
async def untied(tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[Any]:
    """An engine whose two workers share each layer."""
    folder = tmp_path_factory.mktemp("untied")
    engine = await started(folder, tie_word_embeddings=False, tensor_parallel_size=2)
    yield engine
    await engine.close()


def head_of(policy: Any) -> torch.Tensor:
    return policy.module.get_output_embeddings().weight


async def test_the_head_is_the_pushed_one_also_where_the_embedding_is_the_head(vllm_engine):
    """vLLM itself keeps a tied head's packed copy: logprobs are then off by several nats, and nothing is said."""
    for version in (1, 2, 3):
        weights = weights_of()
        await weights.push(learner_of(policy_of(version, tie_word_embeddings=True), version), vllm_engine)
        assert weights.metrics["weights/max_logprob_difference"] < 1e-4
        assert weights.metrics["weights/push_seconds"] > 0


async def assert_sent_weights_arrive(engine: Any, seed: int, *, tied: bool, num_readers: int = 0) -> None:
    """Send twice: the second push goes on with the group of the first. num_readers: if they are copied, by how many."""
    learner = learner_of(policy_of(seed, tie_word_embeddings=tied), seed)
    pool, ids = EnginePool([engine], no_other), proof_ids_of(tiny_tokenizer())
    weights = BroadcastWeights(ids, torch.float32, num_engines=lambda: pool.num_up, num_readers=num_readers)
    for _ in range(2):
        await weights.push(learner, pool)
        assert weights.metrics["weights/max_logprob_difference"] < 1e-4
    completion = await pool.generate(ask("a", max_tokens=3))
    assert completion.policy_version == seed


async def no_other(index: int) -> Any:
    raise AssertionError("an engine was lost")


async def test_weights_that_are_sent_over_gloo_arrive_as_those_in_a_file_do(vllm_engine):
    """As they would over NCCL between GPUs. The tied head is the sent one, too."""
    for seed in (11, 12):
        await assert_sent_weights_arrive(vllm_engine, seed, tied=True)


async def test_weights_that_are_copied_through_handles_arrive_too(vllm_engine):
    """As they would with CUDA IPC."""
    for seed in (14, 15):
        await assert_sent_weights_arrive(vllm_engine, seed, tied=True, num_readers=1)


async def test_a_push_among_many_replies_loses_none_and_each_says_its_oldest_version(vllm_engine):
    policy = policy_of(7, tie_word_embeddings=True)
    await weights_of().push(learner_of(policy, 4), vllm_engine)
    replies = [
        asyncio.create_task(vllm_engine.generate(ask("a", f"{i}", seed=i, min_tokens=n, max_tokens=n)))
        for i, n in enumerate([300] * 8 + [20] * 8)  # eight at once: the short ones begin after the long ones
    ]
    while num_begun(vllm_engine) < 8:  # noqa: ASYNC110 (vLLM tells nobody)
        await asyncio.sleep(0.01)
    await vllm_engine.pause()
    assert not any(reply.done() for reply in replies)
    await weights_of().push(learner_of(policy_of(8, tie_word_embeddings=True), 5), vllm_engine)
    completions = await asyncio.gather(*replies)
    assert [len(completion.response_ids) for completion in completions] == [300] * 8 + [20] * 8
    assert [completion.policy_version for completion in completions] == [4] * 8 + [5] * 8


def num_begun(engine: Any) -> int:
    """Return how many of the requests in flight have a token."""
    states = [state.detokenizer for state in engine._llm.output_processor.request_states.values()]
    return sum(state is not None and state.num_output_tokens() > 0 for state in states)


async def test_an_engine_that_slept_wakes_its_weights_takes_the_push_and_then_wakes_its_cache(vllm_engine, monkeypatch):
    """vLLM's build for CPUs goes through the states of a GPU's and keeps its memory."""
    calls: list[str] = []

    def noting(name: str) -> Any:
        call = getattr(vllm_engine._llm, name)

        async def noted(*args: Any, **settings: Any) -> Any:
            calls.append(" ".join([name, *args[0]] if name == "wake_up" else [name]))
            return await call(*args, **settings)

        return noted

    weights = SharedMemoryWeights(proof_ids_of(tiny_tokenizer()), torch.float32, takes_turns=True)
    await weights.push(learner_of(policy_of(5, tie_word_embeddings=True), 1), vllm_engine)
    for name in ("sleep", "wake_up", "start_weight_update", "update_weights", "finish_weight_update"):
        monkeypatch.setattr(vllm_engine._llm, name, noting(name))
    learner = learner_of(policy_of(6, tie_word_embeddings=True), 2)
    for _ in range(20):  # on a busy machine the sleep may come too late for the request
        calls.clear()
        running = asyncio.create_task(vllm_engine.generate(ask("a", **LONG)))
        await asyncio.sleep(0.1)
        await weights.before_update(vllm_engine)
        assert await vllm_engine._llm.is_sleeping()
        was_asleep = not running.done()
        await weights.push(learner, vllm_engine)
        if was_asleep:
            break
    assert was_asleep
    assert not await vllm_engine._llm.is_sleeping()
    assert calls == [
        "sleep", "wake_up weights", "start_weight_update", "update_weights", "finish_weight_update", "wake_up kv_cache",
    ]  # fmt: skip
    assert weights.metrics["weights/max_logprob_difference"] < 1e-4
    assert len((await running).response_ids) == 300


async def test_the_next_turn_finds_its_history_in_the_cache_until_the_weights_change(vllm_engine):
    learner = learner_of(policy_of(3, tie_word_embeddings=True), 6)
    await weights_of().push(learner, vllm_engine)
    first = ask(PROMPT * 2, "episode", min_tokens=20, max_tokens=20)
    reply = await vllm_engine.generate(first)
    before = vllm_engine.tokens_reused
    second = ask([*first.prompt_ids, *reply.response_ids, *range(40)], "episode", min_tokens=1, max_tokens=1)
    await vllm_engine.generate(second)
    assert vllm_engine.tokens_reused - before == 96  # of 106 known tokens: whole blocks of 32
    before = vllm_engine.tokens_reused
    await weights_of().push(learner, vllm_engine)
    await vllm_engine.generate(second)
    assert vllm_engine.tokens_reused == before


async def test_an_engine_that_kept_vllms_own_logprobs_is_found_out_by_its_first_proof(vllm_engine):
    """As a later vLLM might keep them, whose sampler computes in another way: at temperature 1 nothing shows."""
    from skyrl_train.engine.vllm.engine import VllmEngine

    ids = tiny_tokenizer().encode(PROMPT)
    await vllm_engine._llm.collective_rpc("return_vllms_logprobs")
    another = VllmEngine(vllm_engine._llm, tiny_tokenizer())
    another._version = 1
    with pytest.raises(EngineDied, match=r"logprobs at temperature 0\.6 that are .* nats from softmax"):
        await another.logprobs_of_tokens(ids)
    await vllm_engine._llm.collective_rpc("return_learners_logprobs")
    again = VllmEngine(vllm_engine._llm, tiny_tokenizer())
    again._version = 1
    assert await again.logprobs_of_tokens(ids) == await vllm_engine.logprobs_of_tokens(ids)


async def test_an_engine_that_ends_while_it_is_started_is_dead(tmp_path):
    """vLLM's own error says that something ended, as an error of any kind. Its process has said why in the log."""
    with pytest.raises(EngineDied, match="a process of vLLM ended while it was started"):
        await started(tmp_path, tie_word_embeddings=True, kv_cache_bytes=1000)


async def test_an_engine_without_weights_samples_nothing(untied):
    with pytest.raises(RuntimeError, match="no weights yet"):
        await untied.generate(ask("a"))


async def test_a_head_of_its_own(untied):
    policy, weights = policy_of(2, tie_word_embeddings=False), weights_of()
    await weights.push(learner_of(policy, 1), untied)
    assert weights.metrics["weights/max_logprob_difference"] < 1e-4
    requests = [ask(PROMPT, f"{i}", seed=i, temperature=0.5 + i / 4, max_tokens=30) for i in range(6)]
    requests.append(ask(PROMPT, "greedy", temperature=0, max_tokens=30))
    for request, completion in zip(requests, await answers(untied, requests), strict=True):
        assert_learner_agrees(policy, request, completion)


async def test_both_workers_of_an_engine_receive_what_is_sent(untied):
    await assert_sent_weights_arrive(untied, 13, tied=False)


class Partial(TorchLearner):
    """Publishes only the first half of its weights, as a rank with a bug might."""

    def publish(self, path: Path) -> SharedWeights:
        named = list(merged_weights(self.policy.module))
        return write_shared(named[: len(named) // 2], path, self.policy_version)


async def test_half_a_list_of_weights_is_never_sampled_from(untied):
    """vLLM alone takes it without an error and computes with a mixture."""
    learner = learner_of(policy_of(5, tie_word_embeddings=False), 2)
    learner.__class__ = Partial
    running = asyncio.create_task(untied.generate(ask("a", temperature=0.7, max_tokens=400)))
    with pytest.raises(PushFailed, match=r"version 2 were not loaded: .*version 2 lacks \d+ weights"):
        await weights_of().push(learner, untied)
    await asyncio.gather(running, return_exceptions=True)
    with pytest.raises(EngineDied, match="not loaded"):
        await untied.generate(ask("b"))


def scheduler_of_vllm() -> psutil.Process:
    """Return vLLM's process EngineCore, of the engine that is still up."""
    alive = [child for child in psutil.Process().children(recursive=True) if child.status() != psutil.STATUS_ZOMBIE]
    [found] = [child for child in alive if "EngineCore" in " ".join(child.cmdline())]
    return found


async def test_an_engine_that_is_silent_for_a_while_takes_the_next_push(vllm_engine):
    impatient = SharedMemoryWeights(proof_ids_of(tiny_tokenizer()), torch.float32, deadline_s=1.0)
    learner = learner_of(policy_of(6, tie_word_embeddings=True), 8)
    scheduler_of_vllm().suspend()  # first: it finishes nothing meanwhile
    running = asyncio.create_task(vllm_engine.generate(ask("a", **LONG)))
    await asyncio.sleep(0.1)
    started_at = time.monotonic()
    with pytest.raises(PushFailed, match="pausing the engine took longer than 1 seconds"):
        await impatient.push(learner, vllm_engine)
    assert time.monotonic() - started_at < 100
    scheduler_of_vllm().resume()
    await asyncio.sleep(0.3)
    assert not running.done()  # it stays paused
    await weights_of().push(learner, vllm_engine)
    assert len((await running).response_ids) == 300


async def test_the_death_of_vllms_processes_reaches_everyone_who_waits(vllm_engine):
    scheduler_of_vllm().suspend()  # it finishes none of them first
    running = [asyncio.create_task(vllm_engine.generate(ask("a", f"{i}", **LONG))) for i in range(12)]
    await asyncio.sleep(0.2)
    scheduler_of_vllm().kill()
    async with asyncio.timeout(200):
        outcomes = await asyncio.gather(*running, return_exceptions=True)
        assert {type(outcome) for outcome in outcomes} == {EngineDied}
        for call in (vllm_engine.generate(ask("b")), vllm_engine.pause(), vllm_engine.logprobs_of_tokens([1, 2])):
            with pytest.raises(EngineDied, match="a process of vLLM died"):
                await call
        with pytest.raises(PushFailed, match="a process of vLLM died"):
            await weights_of().push(learner_of(policy_of(3, tie_word_embeddings=True), 9), vllm_engine)
    await vllm_engine.forget("a")
