"""Several real engines as one: a lost one is replaced, with the same weights and the same replies."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from skyrl_train.engine.base import Completion, EngineDied, Request
from skyrl_train.engine.pool import EnginePool
from skyrl_train.engine.torch.loading import LoadingTorchEngine
from skyrl_train.weights.shared_memory import SharedWeights, write_shared
from tests.skyrl_train.engine.conftest import answers, ask
from tests.tiny_models import tiny_policy, tiny_tokenizer

IDS = [5, 6, 7, 8, 9, 10]


class Engines:
    """Makes engines, each with a policy of its own, and keeps them by their place."""

    def __init__(self) -> None:
        self.made: list[tuple[int, LoadingTorchEngine]] = []

    def make(self, index: int, *, seed: int = 0) -> LoadingTorchEngine:
        engine = LoadingTorchEngine(
            tiny_policy(seed=seed), tiny_tokenizer(), max_num_seqs=8, max_num_batched_tokens=256
        )
        self.made.append((index, engine))
        return engine

    async def start(self, index: int) -> LoadingTorchEngine:
        return self.make(index, seed=100)  # not the weights that the others have

    def last(self, index: int) -> LoadingTorchEngine:
        return [engine for its, engine in self.made if its == index][-1]


@pytest.fixture
async def engines() -> AsyncIterator[Engines]:
    made = Engines()
    yield made
    for _, engine in made.made:
        await engine.close()


@pytest.fixture
def weights(tmp_path: Path) -> Callable[[int], SharedWeights]:
    def write(version: int) -> SharedWeights:
        return write_shared(tiny_policy(seed=version).weights.items(), tmp_path / f"version_{version}", version)

    return write


async def push(pool: EnginePool, shared: SharedWeights) -> list[float]:
    await pool.pause()
    await pool.load_weights(shared)
    logprobs = await pool.logprobs_of_tokens(IDS)
    await pool.weights_changed(shared.version)
    await pool.resume()
    shared.path.unlink()
    return logprobs


def requests(num: int, **sampling: Any) -> list[Request]:
    return [ask([1 + i] * 16, session_id=f"s{i}", seed=i, **sampling) for i in range(num)]


async def alone(version: int, asked: list[Request]) -> list[Completion]:
    """The replies of one engine that always had these weights."""
    engine = Engines().make(0, seed=version)
    await engine.weights_changed(version)
    replies = await answers(engine, asked)
    await engine.close()
    return replies


def tokens(replies: list[Completion]) -> list[list[int]]:
    return [reply.response_ids for reply in replies]


async def until_it_computes(engine: LoadingTorchEngine, after_step: int = 0) -> None:
    while engine.stats().steps < after_step + 3:  # noqa: ASYNC110 (the thread tells nobody about its steps)
        await asyncio.sleep(0)


async def test_two_engines_reply_as_one_does_and_the_next_turn_finds_its_keys(engines, weights):
    pool = EnginePool([engines.make(0), engines.make(1)], engines.start)
    await push(pool, weights(7))
    first = requests(8)
    replies = await answers(pool, first)
    second = [
        replace(request, prompt_ids=[*request.prompt_ids, *reply.response_ids, 4])
        for request, reply in zip(first, replies, strict=True)
    ]
    assert tokens(replies) == tokens(await alone(7, first))
    assert tokens(await answers(pool, second)) == tokens(await alone(7, second))
    for _, engine in engines.made[:2]:
        assert engine.stats().prompt_tokens_computed == 4 * 16 + 4 * 2  # of a second turn: the last reply's end, and 4
    await pool.close()


@pytest.mark.parametrize("dies", [False, True])
async def test_a_round_is_the_same_up_to_the_bit_also_after_a_death(engines, weights, dies):
    pool = EnginePool([engines.make(0), engines.make(1)], engines.start)
    await push(pool, weights(7))
    asked = [replace(request, in_round=True) for request in requests(8, max_tokens=48, min_tokens=48)]
    expected = await answers(pool, asked)
    for request in asked:
        await pool.forget(request.session_id)
    steps = engines.last(1).stats().steps
    replies = asyncio.create_task(answers(pool, asked))
    if dies:
        await until_it_computes(engines.last(1), steps)
        await engines.last(1).close()
    assert await replies == expected
    assert len(engines.made) == (3 if dies else 2)
    await pool.close()


async def test_an_engine_lost_while_the_learner_has_the_memory_is_replaced_when_new_weights_come(engines, weights):
    pool = EnginePool([engines.make(0), engines.make(1)], engines.start)
    await push(pool, weights(7))
    await pool.sleep()
    await engines.last(1).close()
    await pool.weights_changed(7)  # here its death is seen
    waiting = asyncio.create_task(answers(pool, requests(8)))
    await asyncio.sleep(0.1)
    assert len(engines.made) == 2
    assert not waiting.done()
    await push(pool, weights(9))
    assert tokens(await waiting) == tokens(await alone(9, requests(8)))
    assert len(engines.made) == 3
    await pool.close()


async def test_requests_of_an_engine_that_dies_are_sent_again_and_replied_to_alike(engines, weights):
    pool = EnginePool([engines.make(0), engines.make(1)], engines.start)
    await push(pool, weights(7))
    asked = requests(8, max_tokens=48, min_tokens=48)
    replies = asyncio.create_task(answers(pool, asked))
    await until_it_computes(engines.last(1))
    await engines.last(1).close()
    got = await replies
    assert tokens(got) == tokens(await alone(7, asked))
    assert {reply.policy_version for reply in got} == {7}
    await pool.close()


async def test_the_only_engine_is_replaced_and_has_the_weights_before_its_first_request(engines, weights):
    pool = EnginePool([engines.make(0)], engines.start)
    await push(pool, weights(7))
    asked = requests(4, max_tokens=48, min_tokens=48)
    replies = asyncio.create_task(answers(pool, asked))
    await until_it_computes(engines.last(0))
    await engines.last(0).close()
    assert tokens(await replies) == tokens(await alone(7, asked))
    assert len(engines.made) == 2
    await pool.close()


async def test_weights_that_are_pushed_while_an_engine_starts_are_the_ones_it_has(engines, weights):
    may_start = asyncio.Event()

    async def start_late(index: int) -> LoadingTorchEngine:
        await may_start.wait()
        return await engines.start(index)

    pool = EnginePool([engines.make(0), engines.make(1)], start_late)
    await push(pool, weights(7))
    await engines.last(1).close()
    await answers(pool, requests(8))
    proof = await push(pool, weights(8))
    may_start.set()
    while len(engines.made) < 3 or len(pool._up()) < 2:  # noqa: ASYNC110
        await asyncio.sleep(0.01)
    await engines.last(0).close()
    asked = requests(8)
    got = await answers(pool, asked)
    assert tokens(got) == tokens(await alone(8, asked))
    assert {reply.policy_version for reply in got} == {8}
    assert await engines.last(1).logprobs_of_tokens(IDS) == proof
    await pool.close()


async def test_weights_that_no_engine_takes_are_an_error_and_nothing_is_sampled_from_until_others_come(
    engines, weights
):
    pool = EnginePool([engines.make(0), engines.make(1)], engines.start)
    shared = weights(7)
    shared.path.write_bytes(bytes(shared.num_bytes))
    with pytest.raises(ValueError, match="digest"):
        await push(pool, shared)
    await pool.resume()
    with pytest.raises(RuntimeError, match="not loaded"):
        await answers(pool, requests(1))
    assert len(engines.made) == 2
    await push(pool, weights(8))
    asked = requests(4)
    assert tokens(await answers(pool, asked)) == tokens(await alone(8, asked))
    await pool.close()


async def test_engines_with_unequal_weights_are_found_by_the_proof(engines):
    pool = EnginePool([engines.make(0), engines.make(1, seed=1)], engines.start)
    with pytest.raises(RuntimeError, match="weights are not equal"):
        await pool.logprobs_of_tokens(IDS)
    await pool.close()


async def test_the_proof_of_an_engine_is_what_its_decoder_samples_with(engines, weights):
    engine = engines.make(0)
    await engine.load_weights(weights(7))
    await engine.weights_changed(7)
    [reply] = await answers(engine, [ask(IDS, min_tokens=12)])
    ids = IDS + reply.response_ids
    assert (await engine.logprobs_of_tokens(ids))[len(IDS) - 1 :] == pytest.approx(reply.logprobs, abs=1e-4)


@pytest.mark.parametrize("change", ["name", "shape"])
async def test_weights_of_another_model_change_nothing_and_end_sampling(engines, tmp_path, change):
    engine = engines.make(0)
    named = dict(tiny_policy(seed=3).weights)
    last = list(named)[-1]
    taken = named.pop(last)
    if change == "shape":
        named[last] = taken[:-1].clone()
    before = await engine.logprobs_of_tokens(IDS)
    with pytest.raises(ValueError, match=last.replace(".", r"\.")):
        await engine.load_weights(write_shared(named.items(), tmp_path / "weights", 3))
    assert await engine.logprobs_of_tokens(IDS) == before
    with pytest.raises(RuntimeError, match="not loaded"):
        await answers(engine, requests(1))


async def test_a_pool_that_is_closed_fails_what_is_under_way(engines):
    pool = EnginePool([engines.make(0), engines.make(1)], engines.start)
    replies = [asyncio.create_task(pool.generate(request)) for request in requests(4, max_tokens=200, min_tokens=200)]
    await until_it_computes(engines.last(0))
    await pool.close()
    outcomes = await asyncio.gather(*replies, return_exceptions=True)
    assert {type(outcome) for outcome in outcomes} == {EngineDied}
    with pytest.raises(EngineDied, match="closed"):
        await pool.pause()
    assert len(engines.made) == 2
