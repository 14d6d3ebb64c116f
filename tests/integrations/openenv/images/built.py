"""Real images and containers for tests, with tags and labels of their own, apart from the user's."""

from __future__ import annotations

import asyncio
import json
import shutil
import subprocess
import time
import uuid
from collections.abc import Generator
from contextlib import contextmanager
from functools import cache

import pytest

from integrations.openenv.catalog import catalog_entry
from integrations.openenv.client.addresses import is_healthy
from integrations.openenv.images.build import BASE_IMAGE, build_image, context_hash

BASE_IMAGES = ("python-standin:3.11-slim", BASE_IMAGE)  # the first that Docker has is taken
LABEL = "skyrl.test"
HARDENED = (
    "--read-only",
    "--tmpfs=/tmp:size=64m",
    "--cap-drop=ALL",
    "--security-opt=no-new-privileges",
    "--memory=2g",
    "--pids-limit=512",
    "--user=4242:4242",  # not the user of the image: any must work
)


def docker(*arguments: str, check: bool = True, timeout_s: float = 120.0) -> str:
    """Run a docker command and return what it printed."""
    ended = subprocess.run(["docker", *arguments], capture_output=True, text=True, timeout=timeout_s)
    assert ended.returncode == 0 or not check, f"docker {arguments[0]}: {ended.stderr}"
    return ended.stdout.strip()


def docker_or_skip() -> str:
    """Return the base image to build on; skip the test without a daemon or a base image."""
    why = _why_not()
    if why is not None:
        pytest.skip(why)
    return next(image for image in BASE_IMAGES if _is_here(image))


@cache
def built_image(name: str) -> str:
    """Return the tag of our image of this environment, built once per content, of which the tag has a hash."""
    base_image, entry = docker_or_skip(), catalog_entry(name)
    tag = f"skyrl-test/{entry.name.replace('_', '-')}:{context_hash(entry)}"
    if not _is_here(tag):
        asyncio.run(build_image(entry, tag, base_image=base_image))
    return tag


@contextmanager
def hardened_container(tag: str, *arguments: str) -> Generator[tuple[str, str]]:
    """Start a container with all restrictions and yield (name, url); remove it at the end in any case."""
    container = f"skyrl-test-{uuid.uuid4().hex[:12]}"
    try:
        docker(
            *("run", "--detach", "--pull=never", f"--name={container}", f"--label={LABEL}"),
            *("--publish=127.0.0.1::8000", *HARDENED, *arguments, tag),
        )
        url = f"http://{docker('port', container, '8000/tcp').splitlines()[0]}"
        end = time.monotonic() + 120
        while not asyncio.run(is_healthy(url)):
            logs = subprocess.run(["docker", "logs", container], capture_output=True, text=True)
            running = json.loads(docker("inspect", "--format={{.State.Running}}", container))
            assert running, f"{tag} ended: {logs.stdout}{logs.stderr}"
            assert time.monotonic() < end, f"{tag} does not answer: {logs.stdout}{logs.stderr}"
            time.sleep(0.1)
        yield container, url
    finally:
        docker("rm", "--force", "--volumes", container, check=False)


@cache
def _why_not() -> str | None:
    if shutil.which("docker") is None:
        return "the docker command is not installed"
    version = subprocess.run(["docker", "version", "--format={{.Server.Version}}"], capture_output=True, text=True)
    if version.returncode != 0:
        return f"no Docker daemon answers ({version.stderr.strip().splitlines()[-1]})"
    if not any(map(_is_here, BASE_IMAGES)):
        docker("pull", "--quiet", BASE_IMAGE, check=False, timeout_s=600)
    if not any(map(_is_here, BASE_IMAGES)):
        return f"no base image: neither {' nor '.join(BASE_IMAGES)} is here, and no registry answers"
    return None


def _is_here(image: str) -> bool:
    return bool(docker("image", "inspect", "--format={{.Id}}", image, check=False))
