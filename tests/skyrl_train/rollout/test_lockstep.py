"""Who takes a turn together, whatever the timing."""

from __future__ import annotations

import asyncio

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
