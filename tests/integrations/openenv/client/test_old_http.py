from __future__ import annotations

import asyncio
import json
import socket
import subprocess
import sys
import urllib.request
from collections.abc import Iterator

import pytest

from integrations.openenv.catalog import catalog_entry
from integrations.openenv.client.errors import CapacityReached, ServerError, SessionLost
from integrations.openenv.client.session import OpenEnvClient, open_session
from integrations.openenv.config import OpenEnvConfig
from integrations.openenv.install_environment import play_gold_episode

SAY_HELLO = {"type": "call_tool", "tool_name": "echo_message", "arguments": {"message": "hello"}}


def started() -> tuple[str, subprocess.Popen[bytes]]:
    with socket.create_server(("127.0.0.1", 0)) as listening:
        command = [sys.executable, "-m", "tests.integrations.openenv.client.old_http_server", str(listening.fileno())]
        server = subprocess.Popen(command, pass_fds=[listening.fileno()])
        url = f"http://127.0.0.1:{listening.getsockname()[1]}"
    with urllib.request.urlopen(f"{url}/health", timeout=120):
        return url, server


@pytest.fixture
def old_url() -> Iterator[str]:
    url, server = started()
    yield url
    server.kill()
    server.wait()


async def test_a_server_without_websockets_is_played_as_any_other(old_url: str) -> None:
    async with OpenEnvClient(old_url, connect_timeout_s=60) as client:
        first = await client.reset(seed=3)
        assert first.observation["echoed_message"] == "Echo environment ready!"
        result = await client.step({"message": "hello"})
        assert (result.observation["echoed_message"], result.reward, result.done) == ("hello", 0.5, False)
        assert (await client.state())["step_count"] == 1


async def test_a_tool_call_becomes_the_action_that_the_tool_was_before_there_were_tools(old_url: str) -> None:
    async with OpenEnvClient(old_url, connect_timeout_s=60) as client:
        await client.reset()
        assert (await client.step(SAY_HELLO)).observation["echoed_message"] == "hello"


async def test_the_good_player_of_echo_env_earns_full_reward_there(old_url: str) -> None:
    config = OpenEnvConfig(runtime="url", url=old_url)
    assert await play_gold_episode(catalog_entry("echo_env"), config) == (1.0, 1.0)


async def test_its_one_environment_is_one_slot(old_url: str) -> None:
    holder, _ = await open_session(old_url, {})
    with pytest.raises(CapacityReached, match=r"1 of 1 sessions in use"):
        await open_session(old_url, {}, deadline_s=0.2)
    waiting = asyncio.create_task(open_session(old_url, {}, deadline_s=60))
    await holder.close()
    client, _ = await waiting
    assert (await client.state())["step_count"] == 0
    await client.close()


async def test_what_raises_in_the_environment_is_an_execution_error_and_the_session_goes_on(old_url: str) -> None:
    client, _ = await open_session(old_url, {})
    with pytest.raises(ServerError, match="HTTP 500 to /step") as failed:
        await client.step({"colour": "red"})
    assert failed.value.code == "EXECUTION_ERROR"
    assert (await client.step({"message": "on"})).reward == pytest.approx(0.2)
    await client.close()


async def test_somebody_elses_reset_is_noticed(old_url: str) -> None:
    client, _ = await open_session(old_url, {})
    elsewhere = urllib.request.Request(f"{old_url}/reset", data=b"{}", headers={"Content-Type": "application/json"})
    json.load(await asyncio.to_thread(urllib.request.urlopen, elsewhere))
    with pytest.raises(SessionLost, match="somebody else has reset"):
        await client.step({"message": "hello"})
    await client.close()


async def test_a_step_that_comes_too_late_does_not_reach_the_next_episode(old_url: str) -> None:
    client, _ = await open_session(old_url, {})
    late = asyncio.create_task(client.step({"message": "sleep 1"}))
    await asyncio.sleep(0.2)
    late.cancel()
    await client.close()
    following, _ = await open_session(old_url, {})
    assert (await following.state())["step_count"] == 0
    assert (await following.step({"message": "a"})).reward == pytest.approx(0.1)
    assert (await following.state())["step_count"] == 1
    await following.close()


async def test_a_server_that_dies_loses_the_session() -> None:
    url, server = started()
    client, _ = await open_session(url, {})
    server.kill()
    server.wait()
    with pytest.raises(SessionLost, match="SESSION_ERROR"):
        await client.step({"message": "hello"})
    await client.close()
    with pytest.raises(SessionLost, match="cannot connect"):
        await open_session(url, {})
