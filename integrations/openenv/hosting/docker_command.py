"""Calls of the docker command, in the user's own Docker context, with errors that say what to do."""

from __future__ import annotations

import asyncio
import json
import os
import shutil
from dataclasses import dataclass
from typing import Any

from integrations.openenv.client.errors import OpenEnvError
from integrations.openenv.hosting.reaping import OWNER_LABEL, Owner, is_orphan

OUR_LABEL = ("org.openenv.server", "skyrl")  # on images whose entry command takes the arguments of serving.py
CONTAINER_PORT = 8000  # where a server listens if its image does not say


class DockerUnavailable(OpenEnvError):
    """No Docker daemon answers on this machine."""


@dataclass(frozen=True, slots=True)
class Image:
    """An image, as `docker image inspect` describes it."""

    name: str
    is_ours: bool
    port: int


async def docker(*arguments: str, timeout_s: float = 60.0, with_stderr: bool = False) -> str:
    """Return the output of a docker command; OpenEnvError with Docker's message if it fails."""
    stderr = asyncio.subprocess.STDOUT if with_stderr else asyncio.subprocess.PIPE
    process = await asyncio.create_subprocess_exec(
        "docker", *arguments, stdin=asyncio.subprocess.DEVNULL, stdout=asyncio.subprocess.PIPE, stderr=stderr
    )
    try:
        async with asyncio.timeout(timeout_s):
            output, errors = await process.communicate()
    except TimeoutError:
        raise OpenEnvError(f"docker {arguments[0]} took longer than {timeout_s:g} s") from None
    finally:
        if process.returncode is None:
            process.kill()
    if process.returncode != 0:
        raise OpenEnvError(f"docker {arguments[0]} failed: {(errors or output).decode(errors='replace').strip()}")
    return output.decode(errors="replace").strip()


async def require_docker() -> None:
    """Raise DockerUnavailable, with what to do, unless a daemon answers."""
    if shutil.which("docker") is None:
        reason = "the docker command is not installed"
    else:
        try:
            await docker("version", "--format={{.Server.Version}}", timeout_s=10.0)
            return
        except OpenEnvError as silent:
            reason = str(silent)
    raise DockerUnavailable(
        f"no Docker here ({reason}). Start Docker, or do without: `local()` (in a run: environment.openenv.runtime="
        "local) starts a server of ours with the same protocol, `from_url(url)` uses one that runs elsewhere"
    )


async def has_docker() -> bool:
    try:
        await require_docker()
    except DockerUnavailable:
        return False
    return True


async def find_image(name: str) -> Image | None:
    """Return the image if it is on this machine, else None. Never pulls."""
    try:
        settings = json.loads(await docker("image", "inspect", "--format={{json .Config}}", name))
    except OpenEnvError as missing:
        if "no such image" in str(missing).lower():
            return None
        raise
    label, value = OUR_LABEL
    return Image(name, (settings.get("Labels") or {}).get(label) == value, _port(settings))


async def daemon_is_here() -> bool:
    """Return whether the daemon runs on this machine, so that a folder can be shared with a container."""
    address = os.environ.get("DOCKER_HOST") or await docker("context", "inspect", "--format={{.Endpoints.docker.Host}}")
    return address.startswith("unix://")


async def reap_containers() -> int:
    """Remove the containers whose owner is dead. Returns how many there were."""
    form = f'--format={{{{.ID}}}}\t{{{{.State}}}}\t{{{{.Label "{OWNER_LABEL}"}}}}'
    lines = (await docker("ps", "--all", "--no-trunc", f"--filter=label={OWNER_LABEL}", form)).splitlines()
    found = [line.split("\t", 2) for line in lines]
    orphans = [container_id for container_id, state, mark in found if is_orphan(mark, state)]
    if orphans:
        await docker("rm", "--force", "--volumes", *orphans)
    return len(orphans)


async def containers_of(owner: Owner) -> set[str]:
    """Return the names of the containers that carry the owner's label, whether they run or not."""
    named = await docker("ps", "--all", f"--filter=label={OWNER_LABEL}={owner}", "--format={{.Names}}")
    return set(named.split())


def _port(settings: dict[str, Any]) -> int:
    ports = [name.removesuffix("/tcp") for name in settings.get("ExposedPorts") or {} if name.endswith("/tcp")]
    return int(ports[0]) if len(ports) == 1 else CONTAINER_PORT
