"""One container with an environment's server: its limits, its owner's label, and its removal in every case.

Images of ours get no network: their server listens on a file in a folder that the container shares with this process.
Official images listen on a port only, which Docker publishes on the loopback. That needs Docker's network, through
which the container reaches whatever this machine reaches: Docker cannot publish a port without outgoing traffic.
"""

from __future__ import annotations

import asyncio
import atexit
import os
import shlex
import shutil
import subprocess
import sys
import time
import uuid
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path

from integrations.openenv.client.addresses import is_healthy
from integrations.openenv.client.errors import OpenEnvError
from integrations.openenv.client.old_http import speaks_old_http
from integrations.openenv.hosting.docker_command import Image, daemon_is_here, docker, find_image, require_docker
from integrations.openenv.hosting.reaping import OWNER_LABEL, owner_folder, this_process
from integrations.openenv.hosting.server import ServerStartFailed

SHARED = "/run/openenv"  # path in a container of ours of the folder with its socket
PULL_TIMEOUT_S = 1800.0


@dataclass(frozen=True, slots=True)
class Limits:
    """Resource limits of one container."""

    memory_gb: float = 2.0
    cpus: float | None = None  # None: all but one of this machine's
    max_sessions: int = 256  # at once; the limit of processes follows from it
    network: bool = False  # for images of ours; official ones always have one

    def flags(self) -> list[str]:
        cpus = self.cpus or max(1, (os.cpu_count() or 1) - 1)
        memory = f"{int(self.memory_gb * 1024)}m"
        return [
            f"--memory={memory}",
            f"--memory-swap={memory}",  # the sum of memory and swap: no swap
            f"--cpus={cpus:g}",
            f"--pids-limit={256 + 8 * self.max_sessions}",  # threads count
            "--no-healthcheck",  # the pool checks the server's health itself
            "--read-only",
            "--tmpfs=/tmp:size=256m,mode=1777",
            "--cap-drop=ALL",
            "--security-opt=no-new-privileges",
        ]


class Container:
    """A running container. `stop` removes it; so does the end of this process, even by a kill."""

    def __init__(self, image: Image, limits: Limits, *, by_socket: bool, num_workers: int) -> None:
        self.name = f"skyrl-openenv-{uuid.uuid4().hex[:12]}"
        self.num_workers: int | None = num_workers
        self.folder = owner_folder() / self.name if by_socket else None
        self.url = f"unix:{self.folder}/server.sock" if by_socket else ""  # a port is known once the container runs
        self.image = image
        self._limits = limits

    @classmethod
    async def start(
        cls,
        image: str,
        *,
        env: Mapping[str, str] | None = None,
        arguments: Sequence[str] = (),
        limits: Limits | None = None,
        timeout_s: float = 60.0,
        pull: bool = True,
    ) -> Container:
        """Run the image and wait until its server answers. Only images of ours are given `arguments`."""
        await require_docker()
        limits = limits or Limits()
        found = await _image(image, pull)
        by_socket = found.is_ours and not limits.network and sys.platform == "linux" and await daemon_is_here()
        wanted = (dict(env or {}), arguments if found.is_ours else (), timeout_s)
        workers = 1 if found.is_ours else num_workers()
        container = cls(found, limits, by_socket=by_socket, num_workers=workers)
        await container._start(*wanted)
        if workers > 1 and await speaks_old_http(container.url, timeout_s=5.0):
            # such a server has no sessions: each of its processes would get some steps of every episode
            await asyncio.to_thread(container.stop)
            container = cls(found, limits, by_socket=by_socket, num_workers=1)
            await container._start(*wanted)
        return container

    @property
    def has_network(self) -> bool:
        return self.folder is None

    @property
    def is_running(self) -> bool:
        """True if the container runs, or if Docker does not answer."""
        answer = _output("inspect", "--format={{.State.Running}}", self.name)
        return answer != "false" and "no such" not in answer.lower()

    def log_end(self) -> str:
        """Return the end of the server's log, for an error message."""
        text = _output("logs", "--tail=20", self.name)[-2000:].strip()
        return f"; the end of its log:\n{text}" if text else ""

    def stop(self) -> None:
        """Kill and remove the container, without waiting for it to react to SIGTERM. May be called twice."""
        atexit.unregister(self.stop)
        _output("rm", "--force", "--volumes", self.name)
        if self.folder is not None:
            shutil.rmtree(self.folder, ignore_errors=True)

    async def _start(self, env: Mapping[str, str], arguments: Sequence[str], timeout_s: float) -> None:
        try:
            await self._run(env, arguments, timeout_s)
            await self._wait_until_healthy(timeout_s)
        except BaseException:
            await asyncio.to_thread(self.stop)
            raise

    async def _run(self, env: Mapping[str, str], arguments: Sequence[str], timeout_s: float) -> None:
        container_reaper(os.getpid())
        atexit.register(self.stop)
        sessions = self._limits.max_sessions
        variables = {"HOME": "/tmp", "MAX_CONCURRENT_ENVS": str(sessions)}
        if self.image.is_ours:
            arguments = ["--max-sessions", str(sessions), *arguments]
        else:  # most official servers take one session per process, so uvicorn forks several
            variables |= {"WEB_CONCURRENCY": str(self.num_workers), "WORKERS": str(self.num_workers)}
        flags = [*self._limits.flags(), *(f"--env={key}={value}" for key, value in (variables | dict(env)).items())]
        if self.folder is not None:
            self.folder.mkdir()
            self.folder.chmod(0o777)  # the container has another user; no user but ours can enter the parent folder
            flags += ["--network=none", f"--volume={self.folder}:{SHARED}"]
            arguments = ["--uds", f"{SHARED}/server.sock", *arguments]
        else:
            flags += [f"--publish=127.0.0.1::{self.image.port}"]  # Docker picks a free port
            if self.image.is_ours:
                arguments = ["--host", "0.0.0.0", "--port", str(self.image.port), *arguments]
        label = f"--label={OWNER_LABEL}={this_process()}"
        command = ["run", "--detach", "--pull=never", f"--name={self.name}", label, *flags, self.image.name, *arguments]
        await docker(*command, timeout_s=timeout_s)
        if self.folder is None:
            address = (await docker("port", self.name, f"{self.image.port}/tcp")).splitlines()
            if not address:
                raise ServerStartFailed(f"the container of {self.image.name} ended at once{self.log_end()}")
            self.url = f"http://{address[0]}"

    async def _wait_until_healthy(self, timeout_s: float) -> None:
        end, pause = time.monotonic() + timeout_s, 0.05
        while not await is_healthy(self.url, timeout_s=2.0):
            running = await asyncio.to_thread(lambda: self.is_running)
            if not running or time.monotonic() > end:
                what = f"does not answer within {timeout_s:g} s" if running else "ended at once"
                words = await asyncio.to_thread(self.log_end)
                raise ServerStartFailed(f"the container of {self.image.name} {what}{words}")
            await asyncio.sleep(pause)
            pause = min(1.5 * pause, 0.5)


def num_workers() -> int:
    """Return how many worker processes an official image's server is asked to fork."""
    return os.cpu_count() or 1


@cache
def container_reaper(owner_pid: int) -> subprocess.Popen[bytes]:
    """Start, once per process, a shell that removes this process's containers when this process has ended.

    It notices the end because its stdin closes.
    """
    command = (
        f"while read -r _; do :; done; docker ps -aq --filter {shlex.quote(f'label={OWNER_LABEL}={this_process()}')}"
        f" | while read -r id; do docker rm -f -v $id; done; rm -rf {shlex.quote(str(owner_folder()))}"
    )
    kept = {name: value for name, value in os.environ.items() if name in ("PATH", "HOME") or "DOCKER" in name}
    return subprocess.Popen(
        ["sh", "-c", command],
        stdin=subprocess.PIPE,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        env=kept,
        cwd=Path("/"),
        start_new_session=True,
    )


def container_reaper_pid() -> int | None:
    """Return the process id of this process's container reaper; None if no container has been started yet."""
    return container_reaper(os.getpid()).pid if container_reaper.cache_info().currsize else None


async def _image(name: str, pull: bool) -> Image:
    found = await find_image(name)
    if found is None and pull:
        await docker("pull", "--quiet", name, timeout_s=PULL_TIMEOUT_S)
        found = await find_image(name)
    if found is None:
        raise OpenEnvError(f"the image {name} is not on this machine")
    return found


def _output(*arguments: str) -> str:
    """Return what a docker command printed, stderr included; "" if Docker does not answer within 60 s."""
    command = ["docker", *arguments]
    try:
        done = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, timeout=60, check=False)
    except subprocess.TimeoutExpired:
        return ""
    return done.stdout.decode(errors="replace").strip()
