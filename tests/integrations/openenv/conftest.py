"""Fixtures: real servers of ours on free ports, one of each per test run."""

from __future__ import annotations

import asyncio
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from integrations.openenv.hosting.server_process import ServerProcess

# A shell that starts pytest in the background lets it, and the runs that tests interrupt, ignore SIGINT.
signal.signal(signal.SIGINT, signal.default_int_handler)


def started(module: str, max_sessions: int = 16) -> Iterator[str]:
    server = asyncio.run(ServerProcess.start(module, max_sessions=max_sessions, timeout_s=90.0))
    yield server.url
    server.stop()


@pytest.fixture(scope="session")
def echo_url() -> Iterator[str]:
    yield from started("integrations.openenv.servers.echo_env")


@pytest.fixture(scope="session")
def coding_url() -> Iterator[str]:
    yield from started("integrations.openenv.servers.coding_env")


@pytest.fixture(scope="session")
def template_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return the folder of a server by other authors, which `openenv init` of the package openenv-core makes.

    Without uv on its PATH the command writes no lock file, which would need a package registry.
    """
    where = tmp_path_factory.mktemp("init")
    command = [str(Path(sys.executable).parent / "openenv"), "init", "my_env"]
    made = subprocess.run(
        command, cwd=where, env={**os.environ, "PATH": ""}, capture_output=True, text=True, timeout=200
    )
    assert made.returncode == 0, made.stdout + made.stderr
    return where / "my_env"
