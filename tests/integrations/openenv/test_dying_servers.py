"""Servers that die, through the trainer's own collector with its usual retries."""

from __future__ import annotations

import asyncio
import os
import signal
import time
import zlib
from collections.abc import Callable, Iterator
from random import Random

import pytest

from integrations.openenv.config import OpenEnvConfig
from integrations.openenv.env import register_openenv
from integrations.openenv.hosting.server_process import ServerProcess
from integrations.openenv.pool import fleet
from integrations.openenv.pool.server_pool import close_shared_pools, shared_pool
from skyrl_gym.core import EnvFailure, EnvGivenUp, EnvLost
from skyrl_gym.envs.registration import deregister
from skyrl_train.engine.base import Completion, Request, SamplingParams
from skyrl_train.rollout import attempts
from skyrl_train.rollout.attempts import Attempts
from skyrl_train.rollout.chat import ChatTemplate
from skyrl_train.rollout.collector import Collector
from skyrl_train.rollout.episode import EpisodeLimits
from skyrl_train.rollout.round import EveryEpisodeFailed, Round
from skyrl_train.types import EpisodeEnd, Prompt, Trajectory
from tests.fakes import ScriptedEngine
from tests.integrations.openenv.troubled import NAME
from tests.tiny_models import tiny_tokenizer

LIMITS = EpisodeLimits(max_turns=3, max_input_length=4000, max_context=4096, step_timeout_s=60, episode_timeout_s=300)
CONFIG = OpenEnvConfig(
    runtime="local", max_servers=1, max_sessions=64, startup_timeout_s=200.0, trust_dataset_code=True
)


class SlowEngine(ScriptedEngine):
    """Takes times to answer that differ by the prompt, so that few episodes are in their steps at once."""

    async def generate(self, request: Request) -> Completion:
        await asyncio.sleep(0.1 + 0.05 * (zlib.crc32(request.session_id.encode()) % 10))
        return await super().generate(request)


@pytest.fixture(autouse=True)
def _openenv() -> Iterator[None]:
    register_openenv()
    yield
    deregister("openenv")


async def played(reply: Callable[[Request], str], words: list[str]) -> list[Trajectory]:
    """An episode for each of the words, which stand in its prompt."""
    tokenizer = tiny_tokenizer()
    row = {"env_name": NAME, "reward_spec": {"ground_truth": ""}, "max_turns": 3, "seed": 5}
    prompts = [Prompt(str(i), [{"role": "user", "content": word}], "openenv", row) for i, word in enumerate(words)]
    collector = Collector(
        SlowEngine(tokenizer, reply), ChatTemplate(tokenizer), LIMITS, env_configs={"openenv": CONFIG}
    )
    try:
        groups = await collector.collect(Round("train", 1, prompts, 1, SamplingParams(max_tokens=80)))
    finally:
        collector.close()
        await close_shared_pools()
    return [group.trajectories[0] for group in groups]


async def kill_three_servers() -> float:
    """Each as soon as it runs. Return how long that took from the first to the last."""
    killed: dict[int, float] = {}
    while len(killed) < 3:
        await asyncio.sleep(0.02)
        for _, server in shared_pool(CONFIG).servers():
            if isinstance(server, ServerProcess) and server.pid not in killed:
                await asyncio.sleep(0.1)  # sessions are open by now, and replies are being written
                os.kill(server.pid, signal.SIGKILL)
                killed[server.pid] = time.monotonic()
    return max(killed.values()) - min(killed.values())


async def test_three_servers_that_die_one_after_the_other_cost_no_episode() -> None:
    killing = asyncio.create_task(kill_three_servers())
    episodes = await played(lambda request: "<action>5</action>", ["go"] * 8)
    assert killing.done()
    assert [episode.end for episode in episodes] == [EpisodeEnd.FINISHED] * 8
    assert max(episode.num_attempts for episode in episodes) > 3  # more than the retries that other failures get


async def test_an_action_that_ends_the_server_costs_its_own_episode_only(monkeypatch: pytest.MonkeyPatch) -> None:
    tokenizer = tiny_tokenizer()

    def reply(request: Request) -> str:
        return f"<action>{'die' if 'poison' in str(tokenizer.decode(request.prompt_ids)) else '5'}</action>"

    monkeypatch.setattr(attempts, "LONGEST_PAUSE_S", 2.0)
    monkeypatch.setattr(attempts, "LOSSES_ALLOWED", 5)  # two deaths by its own step, the third is the last
    poison, *others = await played(reply, ["poison", *["go"] * 7])
    assert [episode.end for episode in others] == [EpisodeEnd.FINISHED] * 7
    assert poison.end is EpisodeEnd.ENV_FAILURE
    assert "the connection closed during step" in str(poison.failure)


async def test_an_environment_whose_servers_always_die_is_given_up_with_the_reason(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(attempts, "LONGEST_PAUSE_S", 0.2)
    monkeypatch.setattr(attempts, "LOSSES_ALLOWED", 40)
    monkeypatch.setattr(fleet, "FIRST_PAUSE_S", 0.05)
    monkeypatch.setattr(fleet, "MAX_FAILURES", 3)
    with pytest.raises(EveryEpisodeFailed, match=r"(?s)4 of the .* given up, 3 servers in a row failed .* has ended"):
        await played(lambda request: "<action>die</action>", ["go"] * 4)


def test_losses_are_retried_longer_than_failures_and_after_growing_pauses() -> None:
    def pauses(failure: EnvFailure) -> list[float]:
        tried, found = Attempts(max_retries=2, chance=chance), []
        while (pause := tried.pause_s(failure)) is not None:
            found.append(pause)
        return found

    class Longest(Random):
        def uniform(self, a: float, b: float) -> float:
            return b

    chance: Random = Longest()

    assert pauses(EnvFailure("it broke")) == [0.5, 1.0]
    assert pauses(EnvLost("gone", in_step=False)) == [0.5, 1.0, 2.0, 4.0, 8.0, 8.0, 8.0, 8.0]
    assert pauses(EnvLost("gone", in_step=True)) == [1.0, 4.0, 8.0, 8.0]
    assert pauses(EnvGivenUp("no server left")) == []
    chance = Random(1)
    by_chance = [pauses(EnvFailure("it broke"))[0] for _ in range(20)]
    assert len(set(by_chance)) == 20
    assert 0.25 <= min(by_chance) <= max(by_chance) <= 0.5


async def test_servers_that_die_together_are_one_failure() -> None:
    config = OpenEnvConfig(runtime="local", max_servers=2, max_sessions=1, startup_timeout_s=200.0)
    pool = shared_pool(config)
    from integrations.openenv.catalog.echo import EchoEntry

    source = EchoEntry().source(EchoEntry().read_options({}))
    leases = await asyncio.gather(*(pool.lease(source) for _ in range(2)))
    for _, server in pool.servers():
        assert isinstance(server, ServerProcess)
        os.kill(server.pid, signal.SIGKILL)
    await asyncio.sleep(0.1)
    await asyncio.gather(*(lease.step({}) for lease in leases), return_exceptions=True)
    for lease in leases:
        await lease.release()
    await (await pool.lease(source)).release()
    [of_echo] = pool._fleets.values()
    assert of_echo._num_eras == 1
    await close_shared_pools()
