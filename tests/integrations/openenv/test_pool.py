from __future__ import annotations

import asyncio
import json
import os
import signal
import subprocess
import sys
import textwrap
import time

import psutil
import pytest

from integrations.openenv.catalog.coding import CodingEntry
from integrations.openenv.catalog.echo import EchoEntry
from integrations.openenv.client import OpenEnvError, SessionLost
from integrations.openenv.config import OpenEnvConfig
from integrations.openenv.pool import ServerPool, close_shared_pools, shared_pool
from integrations.openenv.server import ServerStartFailed
from integrations.openenv.server_process import ServerProcess
from integrations.openenv.source import ServerSource
from tests.integrations.openenv.processes import gone

ECHO, CODING = EchoEntry(), CodingEntry()
ECHO_SOURCE = ECHO.source(ECHO.read_options({}))
HELLO = ECHO.parse("hello")
LOCAL = OpenEnvConfig(runtime="local")


async def test_a_killed_server_costs_its_sessions_and_is_replaced_once() -> None:
    pool = ServerPool(LOCAL)
    leases = await asyncio.gather(*(pool.lease(ECHO_SOURCE) for _ in range(8)))
    [(_, server)] = pool.servers()
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
    [(_, server)] = pool.servers()
    await pool.close()
    assert gone([server.pid])
    with pytest.raises(OpenEnvError, match="pool is closed"):
        await pool.lease(ECHO_SOURCE)


async def test_a_stopped_server_counts_as_dead() -> None:
    pool = ServerPool(OpenEnvConfig(runtime="local", step_timeout_s=0.5))
    lease = await pool.lease(ECHO_SOURCE)
    [(_, server)] = pool.servers()
    os.kill(server.pid, signal.SIGSTOP)
    with pytest.raises(SessionLost, match=r"no answer to step within 0\.5 s"):
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
    lease = await asyncio.wait_for(second, 10)
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
        await ServerProcess.start("integrations.openenv.servers.chess_env", max_sessions=1, timeout_s=30)


async def test_leases_that_waited_for_a_failing_start_share_its_error() -> None:
    chess = ServerSource("chess_env", module="integrations.openenv.servers.chess_env")
    pool = ServerPool(LOCAL)
    start = time.monotonic()
    first = await asyncio.gather(pool.lease(chess), return_exceptions=True)
    one_s, start = time.monotonic() - start, time.monotonic()
    outcomes = await asyncio.gather(*(pool.lease(chess) for _ in range(20)), return_exceptions=True)
    assert all(isinstance(outcome, ServerStartFailed) for outcome in [*first, *outcomes])
    assert time.monotonic() - start < 10 * one_s
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
        from integrations.openenv.pool import shared_pool

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
    assert len(pids) == 3  # server, nursery, worker
    time.sleep(0.3)
    process.send_signal(how)
    process.wait(20)
    process.stdout.close()
    assert gone(pids, within_s=5)
