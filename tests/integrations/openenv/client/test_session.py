from __future__ import annotations

import asyncio
import json
import subprocess
import sys
from collections.abc import AsyncGenerator, Awaitable, Callable
from contextlib import asynccontextmanager

import pytest
from websockets.asyncio.server import ServerConnection, serve

from integrations.openenv.client.addresses import is_healthy, schema, websocket_url
from integrations.openenv.client.errors import CapacityReached, OpenEnvError, ServerError, SessionLost
from integrations.openenv.client.session import OpenEnvClient, open_session
from integrations.openenv.hosting.server_process import ServerProcess

HELLO = {"type": "call_tool", "tool_name": "echo_message", "arguments": {"message": "hello"}}


def observation_frame(n: int, reward: str = "0.5") -> str:
    return f'{{"type": "observation", "data": {{"observation": {{"n": {n}}}, "reward": {reward}, "done": false}}}}'


@asynccontextmanager
async def fake_server(talk: Callable[[ServerConnection], Awaitable[None]]) -> AsyncGenerator[str]:
    """A server that says what the test wants it to say."""
    async with serve(talk, "127.0.0.1", 0) as server:
        yield f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}"


async def test_reset_step_state_against_the_real_server(echo_url: str) -> None:
    async with OpenEnvClient(echo_url) as client:
        first = await client.reset(seed=3)
        result = await client.step(HELLO)
        assert (first.reward, first.done) == (0.0, False)
        assert result.observation["result"]["data"] == "hello"
        assert result.reward is None  # the official echo server pays nothing on a step
        assert (await client.state())["step_count"] == 1


async def test_a_wrong_action_is_a_typed_error_and_the_session_goes_on(echo_url: str) -> None:
    async with OpenEnvClient(echo_url) as client:
        await client.reset()
        with pytest.raises(ServerError) as refused:
            await client.step({"colour": "red"})
        assert refused.value.code == "VALIDATION_ERROR"
        assert {detail["loc"][0] for detail in refused.value.details} == {"tool_name", "colour"}
        assert (await client.step(HELLO)).observation["result"]["data"] == "hello"


async def test_health_and_schema(echo_url: str) -> None:
    assert await is_healthy(echo_url)
    assert set((await schema(echo_url))["action"]["properties"]) == {"metadata", "type", "tool_name", "arguments"}
    assert not await is_healthy("http://127.0.0.1:9")


async def test_an_answer_that_comes_too_late_is_never_taken_for_the_next_one() -> None:
    given_up = asyncio.Event()

    async def slow_once(socket: ServerConnection) -> None:
        for n in range(5):
            await socket.recv()
            if n == 1:
                await given_up.wait()
            await socket.send(observation_frame(n))

    async with fake_server(slow_once) as url:
        client = OpenEnvClient(url, step_timeout_s=5.0)
        await client.connect()
        assert (await client.reset()).observation == {"n": 0}
        with pytest.raises(SessionLost, match=r"no answer to step within 5 s"):
            await client.step({})
        given_up.set()
        with pytest.raises(SessionLost, match="cannot be used"):
            await client.step({})
        await client.close()


async def test_a_cancelled_wait_makes_the_session_unusable() -> None:
    async def silent_after_reset(socket: ServerConnection) -> None:
        await socket.recv()
        await socket.send(observation_frame(0))
        await socket.wait_closed()

    async with fake_server(silent_after_reset) as url, OpenEnvClient(url) as client:
        await client.reset()
        with pytest.raises(TimeoutError):
            await asyncio.wait_for(client.step({}), 0.05)
        with pytest.raises(SessionLost, match="interrupted"):
            await client.step({})


@pytest.mark.parametrize(
    "garbage",
    [
        "not json",
        "[1, 2]",
        "[" * 100_000,
        '{"type": "observation"}',
        '{"type": "state", "data": {}}',
        '{"type": "observation", "data": {"observation": [], "done": false}}',
        '{"type": "observation", "data": {"observation": {}, "reward": "much", "done": false}}',
        '{"type": "observation", "data": {"observation": {}, "done": "no"}}',
        b"\xff\xfe",
    ],
    ids=lambda garbage: repr(garbage[:40]),
)
async def test_a_garbage_frame_loses_the_session(garbage: str | bytes) -> None:
    async def talk(socket: ServerConnection) -> None:
        await socket.recv()
        await socket.send(garbage)
        await socket.wait_closed()

    async with fake_server(talk) as url, OpenEnvClient(url) as client:
        with pytest.raises(SessionLost):
            await client.reset()
        with pytest.raises(SessionLost, match="cannot be used"):
            await client.reset()


@pytest.mark.parametrize(
    ("sent", "read"), [("null", None), ("NaN", None), ("Infinity", None), ("true", 1.0), ("2", 2.0)]
)
async def test_rewards_are_finite_numbers_or_none(sent: str, read: float | None) -> None:
    async def talk(socket: ServerConnection) -> None:
        await socket.recv()
        await socket.send(observation_frame(0, reward=sent))

    async with fake_server(talk) as url, OpenEnvClient(url) as client:
        assert (await client.reset()).reward == read


async def test_a_closed_connection_is_a_lost_session() -> None:
    async def hang_up(socket: ServerConnection) -> None:
        await socket.recv()

    async with fake_server(hang_up) as url, OpenEnvClient(url) as client:
        with pytest.raises(SessionLost, match="closed during reset"):
            await client.reset()


async def test_nobody_listening_is_a_lost_session() -> None:
    with pytest.raises(SessionLost, match="cannot connect"):
        await OpenEnvClient("http://127.0.0.1:9").connect()
    with pytest.raises(SessionLost, match="never connected"):
        await OpenEnvClient("http://127.0.0.1:9").step({})


async def test_a_full_server_is_waited_for_and_the_wait_has_a_deadline() -> None:
    server = await ServerProcess.start("integrations.openenv.servers.echo_env", max_sessions=1, timeout_s=60)
    try:
        holder, _ = await open_session(server.url, {})
        with pytest.raises(CapacityReached, match=r"1 of 1 sessions in use, and no slot came free within 0\.3 s"):
            await open_session(server.url, {}, deadline_s=0.3)
        waiting = asyncio.create_task(open_session(server.url, {}, deadline_s=20))
        await asyncio.sleep(0.1)
        await holder.close()
        client, _ = await waiting
        assert (await client.step(HELLO)).observation["result"]["data"] == "hello"
        await client.close()
    finally:
        server.stop()


async def test_one_client_carries_one_request_at_a_time(echo_url: str) -> None:
    async with OpenEnvClient(echo_url) as client:
        await client.reset()
        first = asyncio.create_task(client.step(HELLO))
        await asyncio.sleep(0)
        with pytest.raises(SessionLost, match="under way"):
            await client.step(HELLO)
        assert (await first).observation["result"]["data"] == "hello"


def test_urls() -> None:
    assert websocket_url("http://host:8000/") == "ws://host:8000/ws"
    assert websocket_url("https://host/space") == "wss://host/space/ws"
    assert websocket_url("ws://host:1/ws") == "ws://host:1/ws"
    with pytest.raises(OpenEnvError, match="must look like http"):
        websocket_url("host:8000")


def test_the_client_needs_neither_openenv_nor_pydantic() -> None:
    code = "import sys, integrations.openenv.client.session, json; print(json.dumps(list(sys.modules)))"
    modules = json.loads(subprocess.run([sys.executable, "-c", code], capture_output=True, check=True).stdout)
    assert not {"openenv", "pydantic", "gradio", "torch", "ray"} & set(modules)


@pytest.mark.parametrize("reward", ["NaN", "Infinity", "-1e999", "1e12", "true", '"1"', "[0.1]", "9" * 400])
async def test_a_reward_that_cannot_be_learned_from_is_no_answer(reward: str) -> None:
    async def pays(socket: ServerConnection) -> None:
        await socket.recv()
        await socket.send(observation_frame(0))
        await socket.recv()
        await socket.send(observation_frame(1, reward))

    async with fake_server(pays) as url, OpenEnvClient(url) as client:
        await client.reset()
        if reward == "true":
            assert (await client.step({})).reward == 1.0
        else:
            with pytest.raises(SessionLost, match=r"reward must |a wrong type"):
                await client.step({})
