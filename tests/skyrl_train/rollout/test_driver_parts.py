"""The parts that keep the driver fast: waiting for one future, and a garbage collector that stays out of the way."""

from __future__ import annotations

import asyncio
import gc

import pytest

from skyrl_train.rollout.garbage import rare_collections
from skyrl_train.rollout.waiting import is_done_within
from tests.simulated_time import in_simulated_time


def test_waiting_ends_with_the_future_or_with_the_time_and_leaves_the_future_alone():
    async def scenario() -> None:
        loop = asyncio.get_running_loop()
        future = loop.create_future()
        assert not await is_done_within(future, 5)
        assert (loop.time(), future.done()) == (5, False)
        loop.call_later(2, future.set_result, 1)
        assert await is_done_within(future, None)
        assert await is_done_within(future, 5)
        assert loop.time() == 7

    in_simulated_time(scenario())


def test_waiting_for_a_future_that_fails_raises_nothing_and_one_who_waits_can_be_cancelled():
    async def scenario() -> None:
        failed = asyncio.get_running_loop().create_future()
        failed.set_exception(KeyError("x"))
        assert await is_done_within(failed, 1)
        assert isinstance(failed.exception(), KeyError)
        future = asyncio.get_running_loop().create_future()
        waiting = asyncio.create_task(is_done_within(future, None))
        await asyncio.sleep(1)
        waiting.cancel()
        with pytest.raises(asyncio.CancelledError):
            await waiting
        assert not future.done()

    in_simulated_time(scenario())


def test_collections_are_rare_until_the_last_of_overlapping_rounds_ends():
    before = gc.get_threshold()
    first, second = rare_collections(1000), rare_collections(100)
    first.__enter__()
    assert gc.get_threshold() == (10_000, 50, before[2])
    assert gc.get_freeze_count() > 10_000
    second.__enter__()
    first.__exit__(None, None, None)
    assert gc.get_threshold() == (10_000, 50, before[2])
    second.__exit__(None, None, None)
    assert (gc.get_threshold(), gc.get_freeze_count()) == (before, 0)


def test_a_few_episodes_leave_the_collector_at_what_somebody_set():
    with rare_collections(8):
        assert gc.get_threshold()[0] == 700
    gc.set_threshold(0)
    try:
        with rare_collections(1000):
            assert gc.get_threshold()[0] == 0
    finally:
        gc.set_threshold(700, 10, 10)
