"""200 episodes while everything goes wrong, through the trainer's own collector.

Every reply is the gold action, so a finished episode has earned exactly 1: any other reward would come from a failure.
"""

from __future__ import annotations

import asyncio
import os
import signal
from collections import Counter
from collections.abc import AsyncGenerator, Callable
from contextlib import asynccontextmanager
from typing import Any

import psutil
import pytest

from integrations.openenv.config import OpenEnvConfig
from integrations.openenv.env import register_openenv
from integrations.openenv.hosting.server_process import ServerProcess
from integrations.openenv.pool import fleet
from integrations.openenv.pool.server_pool import ServerPool, close_shared_pools, num_server_restarts, shared_pool
from integrations.openenv.prepare_dummy_dataset import dataset_rows
from skyrl_gym.envs.registration import deregister
from skyrl_train.engine.base import Completion, Request, SamplingParams
from skyrl_train.rollout import attempts
from skyrl_train.rollout.chat import ChatTemplate
from skyrl_train.rollout.collector import Collector
from skyrl_train.rollout.episode import EpisodeLimits
from skyrl_train.rollout.round import Round
from skyrl_train.types import EpisodeEnd, Prompt, Trajectory
from tests.fakes import ScriptedEngine
from tests.integrations.openenv.processes import gone
from tests.integrations.openenv.proxy import FAULTS, Proxy, proxy_to
from tests.tiny_models import tiny_tokenizer

LIMITS = EpisodeLimits(max_turns=4, max_input_length=4000, max_context=4096, step_timeout_s=60, episode_timeout_s=300)
AT_ONCE = 8  # replies that the engine writes at the same time


class PacedEngine(ScriptedEngine):
    """Takes 10 ms per reply, so that sessions are open for a while."""

    places = asyncio.Semaphore(AT_ONCE)

    async def generate(self, request: Request) -> Completion:
        async with self.places:
            await asyncio.sleep(0.01)
            return await super().generate(request)


@pytest.fixture(autouse=True)
def _openenv():
    register_openenv()
    PacedEngine.places = asyncio.Semaphore(AT_ONCE)
    yield
    deregister("openenv")


def prompts(num_prompts: int) -> list[Prompt]:
    rows, _ = dataset_rows("echo_env", num_prompts, 0, seed=0)
    extras = [{key: value for key, value in row.items() if key not in ("prompt", "env_class")} for row in rows]
    return [Prompt(str(i), rows[i]["prompt"], "openenv", {**extras[i], "max_turns": 4}) for i in range(num_prompts)]


async def trajectories(config: OpenEnvConfig, num_prompts: int, on_episode: Callable[[Trajectory], None]) -> list[Any]:
    """Five episodes of each prompt: a useless reply, then the gold one."""
    tokenizer = tiny_tokenizer()

    def reply(request: Request) -> str:
        asked = str(tokenizer.decode(request.prompt_ids)).split("Now these words.\n\n")[1]
        words = asked.split()[:3]
        return f"<action>{' '.join(word.split('<')[0] for word in words)}</action>" if "no action" in asked else "hm"

    collector = Collector(
        PacedEngine(tokenizer, reply), ChatTemplate(tokenizer), LIMITS, env_configs={"openenv": config}, max_retries=6
    )
    try:
        groups = await collector.collect(
            Round("train", 1, prompts(num_prompts), 5, SamplingParams(max_tokens=80)), on_episode
        )
    finally:
        collector.close()
        await close_shared_pools()
    return [trajectory for group in groups for trajectory in group.trajectories]


def assert_all_is_accounted_for(played: list[Trajectory], num_episodes: int) -> Counter[EpisodeEnd]:
    assert len(played) == num_episodes
    for trajectory in played:
        if trajectory.end is EpisodeEnd.FINISHED:
            assert [turn.reward for turn in trajectory.turns] == [0.0, 1.0]
        else:
            assert trajectory.end is EpisodeEnd.ENV_FAILURE
            assert trajectory.failure
            assert trajectory.reward == 0.0
    return Counter(trajectory.end for trajectory in played)


class Saboteur:
    """Does its next evil deed whenever so many more episodes have ended."""

    def __init__(self, pool: Callable[[], ServerPool], every: int, deeds: list[Callable[[int], None]]) -> None:
        self.pool = pool
        self.every = every
        self.deeds = list(deeds)
        self.num_ended = 0
        self.pids: set[int] = set()

    def on_episode(self, trajectory: Trajectory) -> None:
        self.num_ended += 1
        servers = [server for _, server in self.pool().servers() if isinstance(server, ServerProcess)]
        self.pids |= {server.pid for server in servers}
        if self.deeds and servers and self.num_ended % self.every == 0:
            self.deeds.pop(0)(servers[0].pid)


def kill(pid: int) -> None:
    os.kill(pid, signal.SIGKILL)


def pause(pid: int) -> None:
    os.kill(pid, signal.SIGSTOP)


def slow_down(pid: int) -> None:
    """Stands still for half a second."""
    pause(pid)
    asyncio.get_running_loop().call_later(0.5, lambda: psutil.pid_exists(pid) and os.kill(pid, signal.SIGCONT))


async def test_100_episodes_while_servers_are_killed_paused_and_slowed() -> None:
    config = OpenEnvConfig(runtime="local", max_sessions=16, max_servers=2, step_timeout_s=4.0)
    saboteur = Saboteur(lambda: shared_pool(config), every=15, deeds=[slow_down, kill, pause, kill, slow_down])
    restarts = num_server_restarts()
    ends = assert_all_is_accounted_for(await trajectories(config, 20, saboteur.on_episode), 100)
    assert not saboteur.deeds
    assert ends[EpisodeEnd.FINISHED] >= 90  # six retries survive three dead servers
    assert num_server_restarts() > restarts  # two servers at once, three of them ended
    assert await asyncio.to_thread(gone, list(saboteur.pids))


@asynccontextmanager
async def misbehaving(proxy: Proxy) -> AsyncGenerator[Counter[str]]:
    """Each of its faults in turn for a moment, with a moment's peace between."""
    seen: Counter[str] = Counter()

    async def go_wrong() -> None:
        while True:
            for fault in FAULTS:
                proxy.fault = fault
                await asyncio.sleep(0.06)
                proxy.fault = None
                seen[fault] += 1
                await asyncio.sleep(0.06)

    task = asyncio.create_task(go_wrong())
    try:
        yield seen
    finally:
        task.cancel()


async def test_100_episodes_over_a_connection_that_cuts_stalls_lies_and_is_full(
    echo_url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(attempts, "LONGEST_PAUSE_S", 0.1)  # a fault lasts as long
    monkeypatch.setattr(fleet, "FIRST_PAUSE_S", 0.05)
    monkeypatch.setattr(fleet, "LONGEST_PAUSE_S", 0.1)
    PacedEngine.places = asyncio.Semaphore(2)  # the replies take a second at least, in which every fault comes
    ended: list[Trajectory] = []
    async with proxy_to(echo_url) as proxy, misbehaving(proxy) as seen:
        config = OpenEnvConfig(url=proxy.url, max_sessions=8, step_timeout_s=1.0)
        ends = assert_all_is_accounted_for(await trajectories(config, 20, ended.append), 100)
    assert all(seen[fault] >= 1 for fault in FAULTS)
    assert sum(trajectory.num_attempts > 1 for trajectory in ended) + ends[EpisodeEnd.ENV_FAILURE] >= 1
    assert ends[EpisodeEnd.FINISHED] >= 1
