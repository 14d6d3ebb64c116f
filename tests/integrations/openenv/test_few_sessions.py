"""`trainer.deterministic` on a real server with fewer sessions than episodes: who plays together is always the same."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator

import pytest

from integrations.openenv.catalog.echo import EchoEntry
from integrations.openenv.config import OpenEnvConfig
from integrations.openenv.env import register_openenv
from integrations.openenv.hosting.server_process import ServerProcess
from integrations.openenv.pool.server_pool import close_shared_pools
from integrations.openenv.prepare_dummy_dataset import dataset_rows
from skyrl_gym.envs.registration import deregister
from skyrl_train.engine.base import Request, SamplingParams
from skyrl_train.rollout.chat import ChatTemplate
from skyrl_train.rollout.collector import Collector
from skyrl_train.rollout.episode import EpisodeLimits
from skyrl_train.rollout.round import Round
from skyrl_train.types import EpisodeEnd, Prompt
from tests.fakes import ScriptedEngine
from tests.tiny_models import tiny_tokenizer

LIMITS = EpisodeLimits(max_turns=2, max_input_length=4000, max_context=4096, step_timeout_s=60, episode_timeout_s=300)


@pytest.fixture
async def url_of_a_server_with_two_sessions() -> AsyncIterator[str]:
    server = await ServerProcess.start(EchoEntry().server_module, max_sessions=2, timeout_s=90)
    yield server.url
    server.stop()


async def together(config: OpenEnvConfig) -> list[str]:
    """The episodes of each turn. Episode 0 gives the right words at once, 1 to 4 only in their second turn."""
    rows, _ = dataset_rows("echo_env", 5, 0, seed=0)
    extras = [{key: value for key, value in row.items() if key not in ("prompt", "env_class")} for row in rows]
    prompts = [Prompt(str(i), rows[i]["prompt"], "openenv", {**extras[i], "max_turns": 2}) for i in range(5)]
    tokenizer = tiny_tokenizer()

    def reply(request: Request) -> str:
        text = str(tokenizer.decode(request.prompt_ids))
        words = [word.split("<")[0] for word in text.split("Now these words.\n\n")[1].split()[:3]]
        speaks = request.session_id.startswith("train_1_0") or "no action" in text
        return f"<action>{' '.join(words)}</action>" if speaks else "hm"

    engine = ScriptedEngine(tokenizer, reply)
    collector = Collector(
        engine, ChatTemplate(tokenizer), LIMITS, env_configs={"openenv": config}, deterministic=True, max_retries=0
    )
    try:
        async with asyncio.timeout(100):
            groups = await collector.collect(Round("train", 1, prompts, 1, SamplingParams(max_tokens=80)))
    finally:
        collector.close()
        await close_shared_pools()
    assert {trajectory.end for group in groups for trajectory in group.trajectories} == {EpisodeEnd.FINISHED}
    return [request.session_id.split("_")[2] for request in engine.requests]


@pytest.fixture(autouse=True)
def _openenv():
    register_openenv()
    yield
    deregister("openenv")


ALWAYS = list("".join(["01", "12", "23", "34", "4"]))


async def test_the_pool_knows_how_many_sessions_there_are(echo_url: str) -> None:
    assert await together(OpenEnvConfig(url=echo_url, max_sessions=2)) == ALWAYS


async def test_a_server_of_someone_else_takes_fewer_than_the_pool_thinks(
    url_of_a_server_with_two_sessions: str,
) -> None:
    assert await together(OpenEnvConfig(url=url_of_a_server_with_two_sessions)) == ALWAYS


async def test_two_servers_of_ours_with_one_session_each() -> None:
    assert await together(OpenEnvConfig(runtime="local", max_sessions=1, max_servers=2)) == ALWAYS
