from __future__ import annotations

import asyncio
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import textwrap
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import psutil
import pytest

from integrations.openenv.catalog.coding import CodingEntry
from integrations.openenv.catalog.echo import EchoEntry
from integrations.openenv.client.errors import CapacityReached, OpenEnvError, SessionLost
from integrations.openenv.client.session import open_session
from integrations.openenv.config import OpenEnvConfig
from integrations.openenv.hosting import launch
from integrations.openenv.hosting.launch import preflight
from integrations.openenv.hosting.reaping import OWNER_VARIABLE, reap_processes, this_process
from integrations.openenv.hosting.server import ServerStartFailed
from integrations.openenv.hosting.server_process import ServerProcess
from integrations.openenv.hosting.source import ServerSource
from integrations.openenv.pool import fleet
from integrations.openenv.pool import lease as lease_module
from integrations.openenv.pool.fleet import MAX_FAILURES
from integrations.openenv.pool.server_pool import NoFreeSession, ServerPool, close_shared_pools, shared_pool
from tests.integrations.openenv.processes import gone
from tests.integrations.openenv.proxy import proxy_to
from tests.ports import taken_port

ECHO, CODING = EchoEntry(), CodingEntry()
ECHO_SOURCE = ECHO.source(ECHO.read_options({}))
HELLO = ECHO.parse("hello")
LOCAL = OpenEnvConfig(runtime="local")


def only_server(pool: ServerPool) -> ServerProcess:
    [(_, server)] = pool.servers()
    assert isinstance(server, ServerProcess)
    return server


async def test_a_killed_server_costs_its_sessions_and_is_replaced_once() -> None:
    pool = ServerPool(LOCAL)
    leases = await asyncio.gather(*(pool.lease(ECHO_SOURCE) for _ in range(8)))
    server = only_server(pool)
    os.kill(server.pid, signal.SIGKILL)
    outcomes = await asyncio.gather(*(lease.step(HELLO) for lease in leases), return_exceptions=True)
    assert all(isinstance(outcome, SessionLost) for outcome in outcomes)
    for lease in leases:
        await lease.release()

    fresh = await asyncio.gather(*(pool.lease(ECHO_SOURCE) for _ in range(8)))
    assert (await fresh[0].step(HELLO)).observation["result"]["data"] == "hello"
    assert pool.num_restarts == 1
    assert len(list(pool.servers())) == 1
    for lease in fresh:
        await lease.release()
    server = only_server(pool)
    await pool.close()
    assert gone([server.pid])
    with pytest.raises(OpenEnvError, match="pool is closed"):
        await pool.lease(ECHO_SOURCE)


async def test_a_stopped_server_counts_as_dead(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fleet, "LONGEST_SILENCE_S", 1.0)
    pool = ServerPool(OpenEnvConfig(runtime="local", step_timeout_s=8.0))
    lease = await pool.lease(ECHO_SOURCE)
    server = only_server(pool)
    os.kill(server.pid, signal.SIGSTOP)
    with pytest.raises(SessionLost, match=r"no answer to step within 8 s"):
        await lease.step(HELLO)
    await lease.release()
    assert await asyncio.to_thread(gone, [server.pid])
    await pool.close()


async def test_leases_beyond_max_sessions_wait_for_their_turn(echo_url: str) -> None:
    pool = ServerPool(OpenEnvConfig(url=echo_url, max_sessions=1))
    first = await pool.lease(ECHO_SOURCE)
    second = asyncio.create_task(pool.lease(ECHO_SOURCE))
    await asyncio.sleep(0.1)
    assert not second.done()
    await first.release()
    await first.release()  # twice frees one slot only
    lease = await asyncio.wait_for(second, 60)
    third = asyncio.create_task(pool.lease(ECHO_SOURCE))
    await asyncio.sleep(0.1)
    assert not third.done()
    await lease.release()
    await (await third).release()
    await pool.close()


async def test_shared_pools_are_one_per_configuration(echo_url: str) -> None:
    config = OpenEnvConfig(url=echo_url)
    assert shared_pool(config) is shared_pool(OpenEnvConfig(url=echo_url))
    assert shared_pool(config) is not shared_pool(OpenEnvConfig(url=echo_url, max_sessions=3))
    before = shared_pool(config)
    await close_shared_pools()
    assert shared_pool(config) is not before
    await close_shared_pools()


async def test_a_server_that_cannot_start_says_why() -> None:
    with pytest.raises(ServerStartFailed, match="No module named"):
        await ServerProcess.start("integrations.openenv.servers.chess_env", max_sessions=1, timeout_s=90)


async def test_leases_that_waited_for_a_failing_start_share_its_error(monkeypatch: pytest.MonkeyPatch) -> None:
    num_starts = 0

    async def start_server(*args: Any, **kwargs: Any) -> Any:
        nonlocal num_starts
        num_starts += 1
        return await launch.start_server(*args, **kwargs)

    monkeypatch.setattr(fleet, "start_server", start_server)
    chess = ServerSource("chess_env", module="integrations.openenv.servers.chess_env")
    pool = ServerPool(LOCAL)
    outcomes = await asyncio.gather(*(pool.lease(chess) for _ in range(20)), return_exceptions=True)
    assert all(isinstance(outcome, ServerStartFailed) for outcome in outcomes)
    assert num_starts == 1
    await pool.close()


@pytest.mark.parametrize("url", ["http://[::1:9", "http://x]:9", "http://host:99999"])
async def test_a_url_that_cannot_be_parsed_is_told_to_all_who_wait(url: str) -> None:
    pool = ServerPool(OpenEnvConfig(url=url))
    outcomes = await asyncio.gather(*(pool.lease(ECHO_SOURCE) for _ in range(3)), return_exceptions=True)
    assert all(isinstance(outcome, ServerStartFailed) for outcome in outcomes)
    assert "must look like http://host:8000" in str(outcomes[0])
    await pool.close()


async def test_a_fault_of_ours_at_a_start_leaves_nobody_waiting(monkeypatch: pytest.MonkeyPatch) -> None:
    async def broken(*_: Any, **__: Any) -> Any:
        raise ZeroDivisionError("a fault")

    monkeypatch.setattr(fleet, "start_server", broken)
    pool = ServerPool(LOCAL)
    with pytest.raises(ServerStartFailed, match="no server was started: ZeroDivisionError: a fault"):
        await asyncio.wait_for(pool.lease(ECHO_SOURCE), 60)
    await pool.close()


async def test_the_start_has_a_deadline() -> None:
    with pytest.raises(ServerStartFailed, match=r"within 0\.05 s"):
        await ServerProcess.start(ECHO.server_module, max_sessions=1, timeout_s=0.05)


async def test_the_server_does_not_see_our_environment_variables() -> None:
    os.environ["A_SECRET"] = "hunter2"
    try:
        server = await ServerProcess.start(ECHO.server_module, max_sessions=1, timeout_s=60)
        assert "A_SECRET" not in psutil.Process(server.pid).environ()
        server.stop()
    finally:
        del os.environ["A_SECRET"]


@pytest.mark.parametrize("how", [signal.SIGKILL, signal.SIGINT])
def test_nothing_outlives_the_trainer(how: signal.Signals) -> None:
    """A trainer with an episode in the middle of a program dies; its server, the nursery and the worker go too."""
    trainer = textwrap.dedent("""
        import asyncio, json, psutil
        from integrations.openenv.catalog import catalog_entry
        from integrations.openenv.config import OpenEnvConfig
        from integrations.openenv.pool.server_pool import shared_pool

        async def main():
            entry = catalog_entry("coding_env")
            lease = await shared_pool(OpenEnvConfig(runtime="local")).lease(entry.source(entry.read_options({})))
            await lease.step(entry.parse("print(1)"))
            print(json.dumps([child.pid for child in psutil.Process().children(recursive=True)]), flush=True)
            await lease.step(entry.parse("import time; time.sleep(9)"))

        asyncio.run(main())
    """)
    process = subprocess.Popen([sys.executable, "-c", trainer], stdout=subprocess.PIPE, stderr=subprocess.DEVNULL)
    assert process.stdout is not None
    pids = json.loads(process.stdout.readline())
    assert len(pids) in (3, 4)  # server, bubblewrap where it is here, nursery, worker
    time.sleep(0.3)
    process.send_signal(how)
    process.wait(60)
    process.stdout.close()
    assert gone(pids)


def with_sessions(num_sessions: int) -> ServerSource:
    """An echo server that takes so few, whatever the pool thinks."""
    return ServerSource("echo_env", module=ECHO.server_module, arguments=("--max-sessions", str(num_sessions)))


async def test_a_server_that_takes_few_sessions_is_found_out_and_others_are_started_beside_it() -> None:
    pool = ServerPool(OpenEnvConfig(runtime="local", max_servers=2))
    leases = await asyncio.gather(*(pool.lease(with_sessions(2)) for _ in range(4)))
    assert len(list(pool.servers())) == 2
    assert pool.num_restarts == 0
    results = await asyncio.gather(*(lease.step(HELLO) for lease in leases))
    assert all(result.observation["result"]["data"] == "hello" for result in results)
    fifth = asyncio.create_task(pool.lease(with_sessions(2)))
    await asyncio.sleep(0.1)
    assert not fifth.done()
    await leases[0].release()
    await (await fifth).release()
    await pool.close()


async def test_many_servers_are_started_a_few_at_a_time(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fleet.os, "cpu_count", lambda: 2)
    starting, most = 0, 0

    async def start_server(*args: Any, **kwargs: Any) -> Any:
        nonlocal starting, most
        starting += 1
        most = max(most, starting)
        try:
            return await launch.start_server(*args, **kwargs)
        finally:
            starting -= 1

    monkeypatch.setattr(fleet, "start_server", start_server)
    pool = ServerPool(OpenEnvConfig(runtime="local", max_servers=5, startup_timeout_s=120.0))
    await asyncio.gather(*(pool.lease(with_sessions(1)) for _ in range(5)))
    assert (len(list(pool.servers())), most) == (5, 2)
    await pool.close()


@pytest.mark.parametrize(("runtime", "most"), [("local", 32), ("docker", 6)])
def test_how_many_servers_there_may_be_goes_by_cores_and_memory(
    runtime: str, most: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(launch.os, "cpu_count", lambda: 2)
    monkeypatch.setattr(launch.os, "sysconf", {"SC_PHYS_PAGES": 24 * 2**18, "SC_PAGE_SIZE": 4096}.__getitem__)
    assert launch.default_max_servers(OpenEnvConfig(), runtime) == most
    assert launch.default_max_servers(OpenEnvConfig(max_servers=3), runtime) == 3


async def test_leases_are_given_in_the_order_in_which_they_were_asked_for(echo_url: str) -> None:
    pool = ServerPool(OpenEnvConfig(url=echo_url, max_sessions=1))
    order: list[int] = []

    async def play(number: int) -> None:
        lease = await pool.lease(ECHO_SOURCE)
        order.append(number)
        await lease.step(HELLO)
        await lease.release()

    await asyncio.gather(*(play(number) for number in range(20)))
    assert order == list(range(20))
    await pool.close()


async def test_a_full_server_is_not_stormed() -> None:
    server = await ServerProcess.start(ECHO.server_module, max_sessions=1, timeout_s=90)
    async with proxy_to(server.url) as proxy:
        pool = ServerPool(OpenEnvConfig(url=proxy.url))

        async def play() -> None:
            lease = await pool.lease(ECHO_SOURCE)
            await lease.step(HELLO)
            await lease.release()

        await asyncio.gather(*(play() for _ in range(30)))
        # one per episode, and at most two in vain for each slot that came free
        assert proxy.num_connections < 3 * 30 + 10
        await pool.close()
    server.stop()


async def test_a_lease_that_waits_too_long_says_who_holds_what(echo_url: str) -> None:
    pool = ServerPool(OpenEnvConfig(url=echo_url, max_sessions=1))
    holder = await pool.lease(ECHO_SOURCE)
    await holder.step(HELLO)
    patient, pool.config = pool.config, replace(pool.config, lease_timeout_s=0.5)
    with pytest.raises(NoFreeSession, match=r"within 0\.5 s .*1 of 1 sessions open.*: 1 steps in \d+ s, unused for"):
        await pool.lease(ECHO_SOURCE)
    pool.config = patient
    await holder.release()
    await (await pool.lease(ECHO_SOURCE)).release()
    await pool.close()


@pytest.mark.parametrize("name", ["idle_timeout_s", "episode_timeout_s"])
async def test_a_session_that_is_held_too_long_is_taken_back(echo_url: str, name: str) -> None:
    pool = ServerPool(OpenEnvConfig.from_any({"url": echo_url, "max_sessions": 1, name: 0.3}))
    lease = await pool.lease(ECHO_SOURCE)
    next_one = await asyncio.wait_for(pool.lease(ECHO_SOURCE), 60)  # although nobody released the first
    with pytest.raises(SessionLost, match=rf"for 0\.3 s \(openenv\.{name}\) and was taken back"):
        await lease.step(HELLO)
    await lease.release()
    await next_one.release()
    await pool.close()


class LaterClock:
    """Stands in for the module `time`: `shift` seconds later than it is."""

    shift = 0.0

    def monotonic(self) -> float:
        return time.monotonic() + self.shift


async def test_a_session_in_use_is_not_idle(echo_url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    clock = LaterClock()
    monkeypatch.setattr(lease_module, "time", clock)
    pool = ServerPool(OpenEnvConfig(url=echo_url, idle_timeout_s=100.0))
    lease = await pool.lease(ECHO_SOURCE)
    for _ in range(12):
        clock.shift += 20
        lease._watch()  # as its timer does
        await lease.step(HELLO)
    clock.shift += 101
    lease._watch()
    with pytest.raises(SessionLost, match="was not used for 100 s"):
        await lease.step(HELLO)
    await lease.release()
    await pool.close()


async def test_a_server_that_keeps_failing_is_given_up_with_the_end_of_its_log() -> None:
    chess = ServerSource("chess_env", module="integrations.openenv.servers.chess_env")
    pool = ServerPool(LOCAL)
    for _ in range(MAX_FAILURES):
        with pytest.raises(ServerStartFailed, match="ended with code 1"):
            await pool.lease(chess)
    before = set(psutil.Process().children())
    with pytest.raises(ServerStartFailed, match=rf"(?s)given up, {MAX_FAILURES} servers in a row.*No module named"):
        await pool.lease(chess)
    assert set(psutil.Process().children()) <= before  # others may have ended meanwhile
    await pool.close()


async def test_a_port_that_is_taken_is_the_reason_given_and_the_next_lease_tries_again() -> None:
    with taken_port() as taken:
        port = taken.getsockname()[1]
        source = ServerSource("echo_env", module=ECHO.server_module, arguments=("--port", str(port)))
        pool = ServerPool(LOCAL)
        with pytest.raises(ServerStartFailed, match="Address already in use"):
            await pool.lease(source)
    lease = await pool.lease(source)
    assert [server.url for _, server in pool.servers()] == [f"http://127.0.0.1:{port}"]
    await lease.release()
    await pool.close()


async def test_a_server_that_answers_garbage_again_and_again_is_replaced() -> None:
    pool = ServerPool(LOCAL)
    await (await pool.lease(ECHO_SOURCE)).release()
    server = only_server(pool)
    async with proxy_to(server.url) as proxy:
        server.url = proxy.url  # what stands between us and it answers health checks, and garbage to all else
        proxy.fault = "not json"
        for _ in range(3):
            with pytest.raises(SessionLost, match="not JSON"):
                await pool.lease(ECHO_SOURCE)
        lease = await pool.lease(ECHO_SOURCE)
        assert (await lease.step(HELLO)).observation["result"]["data"] == "hello"
        assert pool.num_restarts == 1
        await lease.release()
        await pool.close()


async def test_a_server_on_a_socket_file_needs_no_port() -> None:
    path = Path(tempfile.mkdtemp()) / "server.sock"
    server = await ServerProcess.start(ECHO.server_module, arguments=["--uds", str(path)], max_sessions=1, timeout_s=90)
    assert server.url == f"unix:{path}"
    assert not psutil.Process(server.pid).net_connections(kind="inet")
    client, _ = await open_session(server.url, {})
    assert (await client.step(HELLO)).observation["result"]["data"] == "hello"
    with pytest.raises(CapacityReached) as full:
        await open_session(server.url, {}, deadline_s=0)
    assert full.value.max_sessions == 1
    await client.close()
    server.stop()
    shutil.rmtree(path.parent)


def test_a_process_whose_owner_died_is_found_by_its_mark_and_ended() -> None:
    """A server that is cut off from its parent in every way, as if neither stdin nor the signal had reached it."""
    dead = subprocess.Popen(["true"])
    dead.wait()
    mark = replace(this_process(), pid=dead.pid, started="1")
    others = {str(mark), str(this_process()), str(replace(mark, boot="another machine"))}
    processes = {owner: subprocess.Popen(["sleep", "60"], env=os.environ | {OWNER_VARIABLE: owner}) for owner in others}
    try:
        reap_processes()  # or another test that runs beside this one
        assert processes.pop(str(mark)).wait(60) == -signal.SIGKILL
        assert all(process.poll() is None for process in processes.values())
    finally:
        for process in processes.values():
            process.kill()
            process.wait()


async def test_preflight_names_the_runtime_or_says_what_is_missing(echo_url: str) -> None:
    assert await preflight([ECHO_SOURCE], LOCAL) == {"echo_env": "local"}
    assert await preflight([ECHO_SOURCE], OpenEnvConfig(url=echo_url)) == {"echo_env": "url"}
    with pytest.raises(OpenEnvError, match=r"echo_env: no server answers at http://127\.0\.0\.1:9 .*start it"):
        await preflight([ECHO_SOURCE], OpenEnvConfig(url="http://127.0.0.1:9"))
    with pytest.raises(OpenEnvError, match="echo_env: its engine is not installed; type this"):
        await preflight([replace(ECHO_SOURCE, lack="its engine is not installed; type this")], LOCAL)
    with pytest.raises(OpenEnvError, match="far: there is no server of ours"):
        await preflight([ServerSource("far", url=echo_url)], LOCAL)
