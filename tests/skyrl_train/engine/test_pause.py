"""A paused engine computes nothing, loses nothing, and goes on where it stood."""

from __future__ import annotations

import asyncio
from dataclasses import replace
from typing import Any

import pytest

from skyrl_train.engine.base import EngineDied
from tests.skyrl_train.engine.conftest import answers, ask, until_step
from tests.tiny_models import tiny_policy

LONG: dict[str, Any] = {"min_tokens": 60, "max_tokens": 60}
AT_MOST_S = 200.0  # a test that waits longer hangs


async def test_no_step_is_computed_while_paused_and_every_request_gets_its_tokens(make_engine):
    requests = [ask("a", f"{i}", seed=i, **LONG) for i in range(6)]
    expected = await answers(make_engine(max_num_seqs=4), requests)  # two wait for a slot
    engine = make_engine(max_num_seqs=4)
    begun = [asyncio.create_task(engine.generate(request)) for request in requests[:5]]
    await until_step(engine, 3)
    await engine.pause()
    steps = engine.stats().steps
    late = asyncio.create_task(engine.generate(requests[5]))
    await asyncio.sleep(0.1)
    assert engine.stats().steps == steps < 60
    assert not any(task.done() for task in [*begun, late])
    await engine.pause()  # it is paused already
    await engine.resume()
    async with asyncio.timeout(AT_MOST_S):
        completions = await asyncio.gather(*begun, late)
    assert [c.response_ids for c in completions] == [c.response_ids for c in expected]


async def test_an_idle_engine_can_be_paused_and_resumed(make_engine):
    engine = make_engine()
    await engine.pause()
    asked = asyncio.create_task(engine.generate(ask("a", max_tokens=2, min_tokens=2)))
    await asyncio.sleep(0.05)
    assert engine.stats().steps == 0
    await engine.resume()
    assert len((await asked).response_ids) == 2


async def test_rounds_are_held_between_their_steps_and_orders_pass_those_that_wait(make_engine):
    requests = [[replace(ask("a", f"{n}{i}", seed=i, **LONG), in_round=True) for i in range(2)] for n in range(2)]
    policy = tiny_policy()
    alone = make_engine(policy)
    expected = [await answers(alone, requests[0]), await answers(alone, requests[1])]
    engine = make_engine(policy)
    rounds = [asyncio.create_task(answers(engine, requests[0]))]
    await until_step(engine, 2)
    rounds.append(asyncio.create_task(answers(engine, requests[1])))  # it waits for the first round
    await asyncio.sleep(0)
    async with asyncio.timeout(AT_MOST_S):
        await engine.pause()
        await engine.weights_changed(7)  # the same weights under another name
        await engine.resume()
        first, second = await asyncio.gather(*rounds)
    assert [c.response_ids for c in first + second] == [c.response_ids for c in expected[0] + expected[1]]
    assert {c.policy_version for c in first} == {0}  # begun under the old version
    assert {c.policy_version for c in second} == {7}


async def test_who_waits_while_the_engine_is_paused_can_give_up(make_engine):
    engine = make_engine(max_num_seqs=1)
    running = asyncio.create_task(engine.generate(ask("a", **LONG)))
    await until_step(engine, 2)
    await engine.pause()
    running.cancel()
    await asyncio.gather(running, return_exceptions=True)
    await engine.resume()
    assert len((await engine.generate(ask("b", max_tokens=2, min_tokens=2))).response_ids) == 2
    assert engine.stats().tokens_sampled < 60


async def test_closing_a_paused_engine_fails_those_who_wait(make_engine):
    engine = make_engine()
    begun = asyncio.create_task(engine.generate(ask("a", **LONG)))
    await until_step(engine, 2)
    await engine.pause()
    waiting = asyncio.create_task(engine.generate(ask("b")))
    await asyncio.sleep(0)
    await engine.close()
    async with asyncio.timeout(AT_MOST_S):
        outcomes = await asyncio.gather(begun, waiting, return_exceptions=True)
    assert [type(outcome) for outcome in outcomes] == [EngineDied, EngineDied]
    for call in (engine.pause, engine.resume):
        with pytest.raises(EngineDied, match="closed"):
            await call()
