"""Choice of the runtime that serves an environment here, and the start of its server.

url     if the source or the configuration has one
docker  if a daemon answers and the image is on this machine; nothing is ever pulled in the middle of a run
local   otherwise: a server of ours as a child process
"""

from __future__ import annotations

import asyncio
import os
import time
from collections.abc import Iterable

from loguru import logger

from integrations.openenv.client.addresses import fetch_json
from integrations.openenv.client.errors import OpenEnvError
from integrations.openenv.config import OpenEnvConfig
from integrations.openenv.hosting.containers import Container, Limits, num_workers
from integrations.openenv.hosting.docker_command import find_image, has_docker, reap_containers, require_docker
from integrations.openenv.hosting.reaping import reap_folders, reap_processes
from integrations.openenv.hosting.server import GivenServer, Server, ServerStartFailed
from integrations.openenv.hosting.server_process import ServerProcess
from integrations.openenv.hosting.source import ServerSource

PROCESS_GB = 0.25  # of one server process; those measured take 0.1 to 0.2


async def preflight(sources: Iterable[ServerSource], config: OpenEnvConfig) -> dict[str, str]:
    """Return the runtime of each source by name, before anything expensive; OpenEnvError if one cannot be served.

    Also ends the servers that killed runs left behind.
    """
    runtimes = {}
    for source in sources:
        try:
            runtimes[source.name] = await choose_runtime(source, config)
            if runtimes[source.name] == "url":
                await _given(source, config, patience_s=0.0)
        except OpenEnvError as missing:
            raise OpenEnvError(f"{source.name}: {missing}") from missing
    await reap_orphans(containers="docker" in runtimes.values())
    return runtimes


async def reap_orphans(*, containers: bool) -> None:
    """End the servers of runs that were killed."""
    reap_folders()
    num_orphans = reap_processes() + (await reap_containers() if containers else 0)
    if num_orphans:
        logger.info(f"ended {num_orphans} environment servers of runs that were killed")


async def choose_runtime(source: ServerSource, config: OpenEnvConfig) -> str:
    """Return "url", "docker" or "local"; OpenEnvError, with what to do, if `openenv.runtime` cannot be had here."""
    if config.runtime == "docker":
        await _require_image(source)
        return "docker"
    if config.runtime == "local":
        if source.module is None:
            raise OpenEnvError("there is no server of ours for it; use another openenv.runtime")
        return _local(source)
    if url_of(source, config) is not None:
        return "url"
    if source.image is not None and await has_docker() and await find_image(source.image) is not None:
        return "docker"
    if source.module is None:
        await _require_image(source)
    return _local(source)


def _local(source: ServerSource) -> str:
    if source.lack is not None:
        raise OpenEnvError(source.lack)
    return "local"


async def _require_image(source: ServerSource) -> None:
    if source.image is None:
        raise OpenEnvError("there is no image of it; use another openenv.runtime")
    await require_docker()
    if await find_image(source.image) is None:
        raise OpenEnvError(
            f"the image {source.image} is not on this machine; "
            f"uv run integrations/openenv/install_environment.py {source.name}"
        )


def url_of(source: ServerSource, config: OpenEnvConfig) -> str | None:
    """Return the address of a server that runs already, if the runtime ("auto" or "url") allows using it."""
    return (source.url or config.url) if config.runtime in ("auto", "url") else None


async def start_server(source: ServerSource, runtime: str, config: OpenEnvConfig, *, patience_s: float = 0.0) -> Server:
    """Start a server and return it once it answers; ServerStartFailed, with the end of its log, if it does not.

    patience_s: how long to wait for a server that somebody else runs, at an address.
    """
    if runtime == "url":
        return await _given(source, config, patience_s)
    arguments = [*source.arguments, *(["--accept-unsafe"] if config.accept_unsafe else [])]
    if runtime == "docker":
        assert source.image is not None
        return await Container.start(
            source.image,
            env=dict(source.variables),
            arguments=arguments,
            limits=Limits(config.memory_gb, config.cpus, config.max_sessions, config.network),
            timeout_s=config.startup_timeout_s,
            pull=False,
        )
    assert source.module is not None
    return await ServerProcess.start(
        source.module,
        arguments=arguments,
        max_sessions=config.max_sessions,
        timeout_s=config.startup_timeout_s,
    )


async def _given(source: ServerSource, config: OpenEnvConfig, patience_s: float) -> GivenServer:
    url = url_of(source, config)
    assert url is not None
    end = time.monotonic() + patience_s
    while True:
        try:
            if (await fetch_json(url, "/health", timeout_s=5.0)).get("status") == "healthy":
                return GivenServer(url)
            reason = "it is not healthy"
        except OpenEnvError as silent:
            reason = str(silent)
        if time.monotonic() > end:
            raise ServerStartFailed(f"no server answers at {url} ({reason}); start it, or correct the url")
        await asyncio.sleep(0.5)


def announce(source: ServerSource, runtime: str, server: Server) -> None:
    """Log once what serves an environment."""
    if not isinstance(server, Container):
        logger.info(f"{source.name}: served by {server.url if runtime == 'url' else 'a process of ours'} ({runtime})")
    elif not server.has_network:
        logger.info(f"{source.name}: served by containers of {source.image} without a network (docker)")
    elif server.image.is_ours:
        logger.info(f"{source.name}: served by containers of {source.image} with a network (docker)")
    else:
        logger.warning(
            f"{source.name}: served by containers of {source.image}, {num_workers()} workers each, with a network: an "
            "image that is not ours listens on a port only (docker)"
        )


def default_max_servers(config: OpenEnvConfig, runtime: str) -> int:
    """Return how many servers one environment may have.

    Unless configured, at most half the memory, and four containers or sixteen processes per core. So many are needed
    only if a server takes one session, as most servers written by others do.
    """
    if config.max_servers is not None:
        return config.max_servers
    try:
        memory_gb = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") / 2**30
    except (ValueError, OSError):
        memory_gb = 8.0
    per_core, each_gb = (16, PROCESS_GB) if runtime == "local" else (4, config.memory_gb)
    return max(1, min(per_core * (os.cpu_count() or 1), int(memory_gb / 2 / each_gb)))
