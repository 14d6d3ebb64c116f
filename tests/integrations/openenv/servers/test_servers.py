from __future__ import annotations

import asyncio

import psutil
import pytest
from openenv.core.env_server.mcp_environment import MCPEnvironment
from openenv.core.env_server.mcp_types import CallToolAction
from openenv.core.env_server.serialization import serialize_observation

from integrations.openenv.client.errors import ServerError
from integrations.openenv.client.session import open_session
from integrations.openenv.hosting.server_process import ServerProcess
from integrations.openenv.servers.coding_env import official_reward
from integrations.openenv.servers.echo_env import EchoEnvironment
from tests.integrations.openenv.processes import gone


async def test_echo_knows_both_tools_and_the_older_form(echo_url: str) -> None:
    client, _ = await open_session(echo_url, {})
    call = {"type": "call_tool", "tool_name": "echo_with_length", "arguments": {"message": "hello"}}
    assert (await client.step(call)).observation["result"]["data"] == {"message": "hello", "length": 5}
    old = await client.step({"message": "hello"})
    assert (old.observation, old.reward) == ({"echoed_message": "hello", "message_length": 5}, 0.5)
    tools = (await client.step({"type": "list_tools"})).observation["tools"]
    assert [tool["name"] for tool in tools] == ["echo_message", "echo_with_length"]
    missing = await client.step({"type": "call_tool", "tool_name": "shout", "arguments": {}})
    assert missing.observation["error"]["error_type"] == "tool_not_found"
    await client.close()


@pytest.mark.parametrize("tool", ["echo_message", "echo_with_length"])
async def test_echos_own_answer_to_a_call_is_the_one_of_fastmcp(tool: str) -> None:
    env, call = EchoEnvironment(), CallToolAction(tool_name=tool, arguments={"message": 'say "ü"\n'})
    own = serialize_observation(await env.step_async(call))
    theirs = serialize_observation(await MCPEnvironment.step_async(env, call))
    theirs["observation"]["result"]["meta"] = None  # names FastMCP's version, no client reads it
    assert own == theirs


async def test_the_official_client_plays_on_both_servers(echo_url: str, coding_url: str) -> None:
    from openenv.core import GenericEnvClient

    async with GenericEnvClient(base_url=echo_url) as client:
        await client.reset()
        call = {"type": "call_tool", "tool_name": "echo_message", "arguments": {"message": "hello"}}
        assert (await client.step(call)).observation["result"]["data"] == "hello"
    async with GenericEnvClient(base_url=coding_url) as client:
        await client.reset()
        result = await client.step({"code": "print(3 + 4)"})
        assert (result.observation["stdout"], result.observation["exit_code"], result.reward) == ("7\n", 0, 0.1)
        assert (await client.state())["last_exit_code"] == 0


async def test_variables_stay_until_reset_and_belong_to_one_session(coding_url: str) -> None:
    client, _ = await open_session(coding_url, {})
    other, _ = await open_session(coding_url, {})
    assert (await client.step({"code": "x = 5"})).observation["stdout"] == "5"  # the last statement's value
    assert (await client.step({"code": "print(x + 1)"})).observation["stdout"] == "6\n"
    assert (await other.step({"code": "print(x)"})).observation["exit_code"] == 1
    await client.reset()
    assert "`x` is not defined" in (await client.step({"code": "print(x)"})).observation["stderr"]
    await client.close()
    await other.close()


async def test_the_same_seed_draws_the_same_numbers(coding_url: str) -> None:
    drawn = []
    for seed in (7, 7, 8):
        client, _ = await open_session(coding_url, {"seed": seed})
        drawn.append((await client.step({"code": "import random\nprint(random.random())"})).observation["stdout"])
        await client.close()
    assert drawn[0] == drawn[1] != drawn[2]


async def test_a_runaway_program_is_stopped_and_blocks_nobody(coding_url: str) -> None:
    runaway, _ = await open_session(coding_url, {})
    neighbour, _ = await open_session(coding_url, {})
    stopping = asyncio.create_task(runaway.step({"code": "10 ** 10 ** 8"}))  # C code: no bytecode to interrupt
    assert (await neighbour.step({"code": "print(1)"})).observation["stdout"] == "1\n"
    assert not stopping.done()
    stopped = await stopping
    assert "was stopped after" in stopped.observation["stderr"]
    assert (await runaway.step({"code": "print(2)"})).observation["stdout"] == "2\n"
    await runaway.close()
    await neighbour.close()


@pytest.mark.parametrize(
    ("code", "complaint"),
    [
        ("a = 'x' * 10**9", "MemoryError"),
        ("import os", "Import of os is not allowed"),
        ("open('/etc/passwd')", "Forbidden function"),
        ("raise SystemExit(3)", "SystemExit"),
        ("1 / 0", "ZeroDivisionError"),
        ("def f():\n    return f()\nf()", "RecursionError"),
        ("(" * 5000, "SyntaxError"),
        ("-" * 200_000 + "1", ""),
    ],
    ids=["memory", "import", "open", "exit", "zero", "recursion", "parentheses", "minus"],
)
async def test_a_bad_program_fails_alone(coding_url: str, code: str, complaint: str) -> None:
    client, _ = await open_session(coding_url, {})
    failed = await client.step({"code": code})
    assert failed.observation["exit_code"] == 1
    assert complaint in failed.observation["stderr"]
    assert (await client.step({"code": "print('next')"})).observation["stdout"] == "next\n"
    await client.close()


async def test_a_killed_nursery_is_a_failure_of_the_environment_and_is_replaced() -> None:
    server = await ServerProcess.start("integrations.openenv.servers.coding_env", max_sessions=4, timeout_s=60)
    try:
        client, _ = await open_session(server.url, {})
        await client.step({"code": "print(1)"})
        worker = psutil.Process(server.pid).children(recursive=True)[-1]  # the deepest
        worker.parent().kill()
        assert await asyncio.to_thread(gone, [worker.pid])
        with pytest.raises(ServerError, match="EXECUTION_ERROR"):
            await client.step({"code": "print(2)"})
        assert (await client.step({"code": "print(3)"})).observation["stdout"] == "3\n"
        await client.close()
    finally:
        server.stop()


async def test_clients_that_leave_are_no_errors_in_the_log() -> None:
    server = await ServerProcess.start("integrations.openenv.servers.echo_env", max_sessions=4, timeout_s=90)
    for _ in range(3):
        client, _ = await open_session(server.url, {})
        await client.close()
    assert server.log_end() == ""
    server.stop()


async def test_a_killed_server_leaves_no_process_behind() -> None:
    server = await ServerProcess.start("integrations.openenv.servers.coding_env", max_sessions=4, timeout_s=60)
    try:
        client, _ = await open_session(server.url, {})
        await client.step({"code": "print(1)"})
        below = [process.pid for process in psutil.Process(server.pid).children(recursive=True)]
        assert len(below) >= 2  # a nursery and a worker
        psutil.Process(server.pid).kill()
        assert await asyncio.to_thread(gone, below)
        await client.close()
    finally:
        server.stop()


async def test_output_is_capped(coding_url: str) -> None:
    client, _ = await open_session(coding_url, {})
    result = await client.step({"code": "for i in range(100):\n    print('y' * 100000)"})
    assert 0 < len(result.observation["stdout"]) < 60_000
    await client.close()


@pytest.mark.parametrize(
    ("code", "reward"),
    [
        ("1/0", 0.1),
        ("x" * 101, 0.0),
        ("(", -0.1),
        ("import  os", -0.9),
        ("# open(", -0.9),
        ("open(\n" + "x" * 101, -1.2),
    ],
)
def test_the_official_reward_looks_at_the_text_only(code: str, reward: float) -> None:
    assert official_reward(code) == pytest.approx(reward)
