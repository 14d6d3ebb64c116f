"""The episodes that take a turn together do not depend on timing."""

from __future__ import annotations

import asyncio

import pytest

from skyrl_train.rollout.lockstep import Lockstep


async def play(lockstep: Lockstep, name: str, turns: int, log: list[str]) -> None:
    async with lockstep.beginning(name, lambda: False):
        await asyncio.sleep(0.001 * len(name))
    for turn in range(turns):
        await asyncio.sleep(0.001 * len(name))
        await lockstep.arrive(name)
        log.append(f"{turn}{name}")
    lockstep.leave(name)


async def test_nobody_starts_a_turn_before_all_have_arrived() -> None:
    log: list[str] = []
    lockstep = Lockstep(3)
    await asyncio.gather(*(play(lockstep, *episode, log) for episode in [("ccc", 2), ("bb", 3), ("a", 1)]))
    assert log == ["0a", "0bb", "0ccc", "1bb", "1ccc", "2bb"]


async def test_who_can_begin_only_after_anothers_end_is_not_waited_for() -> None:
    log: list[str] = []
    lockstep, a_has_ended = Lockstep(3), asyncio.Event()

    async def first() -> None:
        await play(lockstep, "a", 2, log)
        a_has_ended.set()

    async def held_up() -> None:
        async with lockstep.beginning("b", lambda: not a_has_ended.is_set()):
            await a_has_ended.wait()
        await lockstep.arrive("b")
        log.append("0b")
        lockstep.leave("b")

    await asyncio.gather(first(), held_up(), play(lockstep, "c", 1, log))  # c begins behind b
    assert log == ["0a", "1a", "0b", "0c"]


async def test_a_start_that_failed_is_waited_for_once_more() -> None:
    log: list[str] = []
    lockstep = Lockstep(2)

    async def fails_first() -> None:
        with pytest.raises(OSError, match="no such server"):
            async with lockstep.beginning("a", lambda: False):
                raise OSError("no such server")
        await play(lockstep, "a", 2, log)

    await asyncio.gather(fails_first(), play(lockstep, "b", 2, log))
    assert log == ["0a", "0b", "1a", "1b"]
