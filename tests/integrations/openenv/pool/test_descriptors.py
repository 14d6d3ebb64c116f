"""Few file descriptors: each case in a process of its own, whose limit it sets."""

from __future__ import annotations

import subprocess
import sys
import textwrap
from collections.abc import Iterator

import pytest

from integrations.openenv.catalog.echo import EchoEntry
from tests.integrations.openenv.conftest import started

BEGINNING = """
import asyncio, os, resource, sys
from integrations.openenv.catalog.echo import EchoEntry
from integrations.openenv.client.errors import OutOfDescriptors
from integrations.openenv.client.session import open_session
from integrations.openenv.config import OpenEnvConfig
from integrations.openenv.client.descriptors import num_affordable
from integrations.openenv.pool.server_pool import ServerPool

ECHO = EchoEntry()
SOURCE, HELLO = ECHO.source(ECHO.read_options({})), ECHO.parse("hello")
URL = sys.argv[1]

async def play(pool, hold_s, meanwhile=None):
    lease = await pool.lease(SOURCE)
    for _ in range(2):
        assert (await lease.step(HELLO)).observation["result"]["data"] == "hello"
        await (asyncio.sleep(hold_s) if meanwhile is None else meanwhile())
    await lease.release()
"""


@pytest.fixture(scope="module")
def roomy_url() -> Iterator[str]:
    """An echo server for more sessions than the processes here can hold."""
    yield from started(EchoEntry.server_module, max_sessions=400)


def in_a_process(program: str, url: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-c", BEGINNING + textwrap.dedent(program), url]
    done = subprocess.run(command, capture_output=True, text=True, timeout=400)
    assert done.returncode == 0, done.stdout + done.stderr
    return done


def test_the_soft_limit_is_raised(roomy_url: str) -> None:
    done = in_a_process(
        """
        hard = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
        resource.setrlimit(resource.RLIMIT_NOFILE, (128, hard))

        async def main():
            pool = ServerPool(OpenEnvConfig(url=URL, max_sessions=400))
            all_there = asyncio.Barrier(200)
            await asyncio.gather(*(play(pool, 0, all_there.wait) for _ in range(200)))
            await pool.close()

        asyncio.run(main())
        """,
        roomy_url,
    )
    assert "WARNING" not in done.stderr


def test_more_sessions_than_the_hard_limit_allows_wait_for_their_turn(roomy_url: str) -> None:
    done = in_a_process(
        """
        resource.setrlimit(resource.RLIMIT_NOFILE, (160, 160))

        async def main():
            pool = ServerPool(OpenEnvConfig(url=URL, max_sessions=400))
            await asyncio.gather(*(play(pool, 0.2) for _ in range(250)))
            assert pool.num_restarts == 0
            await pool.close()

        asyncio.run(main())
        """,
        roomy_url,
    )
    assert done.stderr.count("WARNING") == 1
    assert "sessions at once, by its limit of open files (ulimit -n); further episodes wait" in done.stderr


def test_our_own_lack_of_descriptors_is_not_blamed_on_the_server(roomy_url: str) -> None:
    """Others in this process take all descriptors, after the pool has planned with them, and later give them back."""
    in_a_process(
        """
        resource.setrlimit(resource.RLIMIT_NOFILE, (160, 160))

        def take_all():
            taken = []
            while True:
                try:
                    taken.append(os.open(os.devnull, os.O_RDONLY))
                except OSError:
                    return taken

        async def main():
            pool = ServerPool(OpenEnvConfig(url=URL, max_sessions=400))
            good = [await pool.lease(SOURCE) for _ in range(5)]
            taken = take_all()
            for url in (URL, URL.replace("127.0.0.1", "localhost")):
                try:
                    await open_session(url, {})
                except OutOfDescriptors as refused:
                    assert "ulimit -n" in str(refused)
                else:
                    raise AssertionError("no descriptor was left")
            [fleet] = pool._fleets.values()
            fleet.suspect(fleet.members[0])  # its health cannot be asked for now
            playing = [asyncio.create_task(play(pool, 0)) for _ in range(20)]
            await asyncio.sleep(1.5)
            assert not any(task.done() for task in playing)
            for descriptor in taken:
                os.close(descriptor)
            await asyncio.gather(*playing)
            assert pool.num_restarts == 0
            for lease in good:
                await lease.step(HELLO)
                await lease.release()
            await pool.close()

        asyncio.run(main())
        """,
        roomy_url,
    )


def test_a_server_of_ours_takes_no_more_sessions_than_it_has_descriptors_for() -> None:
    in_a_process(
        """
        from integrations.openenv.client.errors import CapacityReached
        from integrations.openenv.hosting.server_process import ServerProcess

        async def main():
            limits = resource.getrlimit(resource.RLIMIT_NOFILE)
            resource.setrlimit(resource.RLIMIT_NOFILE, (160, 160))  # the server inherits it
            server = await ServerProcess.start(ECHO.server_module, max_sessions=256, timeout_s=100)
            assert not await asyncio.to_thread(lambda: server.log_end()) or "at most" in server.log_end()
            sessions = []
            try:
                while True:
                    sessions.append(await open_session(server.url, {}, deadline_s=0))
            except CapacityReached:
                assert 10 < len(sessions) < 80, len(sessions)
            for client, _ in sessions:
                await client.step(HELLO)
                await client.close()
            server.stop()

        asyncio.run(main())
        """,
        "",
    )
