from __future__ import annotations

import asyncio

import pytest

from integrations.openenv.client.deadline import Deadline
from tests.simulated_time import in_simulated_time


def test_a_wait_that_takes_too_long_is_ended_and_the_next_has_its_own_time() -> None:
    async def waits() -> None:
        deadline = Deadline(0.05)
        with pytest.raises(TimeoutError), deadline:
            await asyncio.sleep(60)
        with deadline:
            await asyncio.sleep(0)
        with pytest.raises(TimeoutError), deadline:
            await asyncio.sleep(60)
        task = asyncio.current_task()
        assert task is not None
        assert task.cancelling() == 0

    in_simulated_time(waits())


def test_many_waits_together_may_take_longer_than_one() -> None:
    async def waits() -> None:
        deadline = Deadline(0.5)
        for _ in range(20):
            with deadline:
                await asyncio.sleep(0.05)
        deadline.stop()

    in_simulated_time(waits())


def test_who_is_cancelled_from_outside_is_cancelled_not_late() -> None:
    async def waits() -> None:
        deadline = Deadline(60)

        async def wait() -> None:
            with deadline:
                await asyncio.sleep(60)

        task = asyncio.create_task(wait())
        await asyncio.sleep(0)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        deadline.stop()

    in_simulated_time(waits())


def test_between_waits_no_timer_cancels_anybody() -> None:
    async def waits() -> None:
        deadline = Deadline(0.05)
        with deadline:
            await asyncio.sleep(0)
        await asyncio.sleep(0.15)
        with deadline:
            await asyncio.sleep(0)
        deadline.stop()

    in_simulated_time(waits())
