"""Real containers of our echo image. Skipped where no Docker daemon answers."""

from __future__ import annotations

import asyncio
import json
import os
import signal
import subprocess
import sys
import tempfile
import textwrap
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest

from integrations.openenv.catalog.echo import EchoAction, EchoEntry
from integrations.openenv.client.errors import OpenEnvError, SessionLost
from integrations.openenv.clients import EchoEnv
from integrations.openenv.config import OpenEnvConfig
from integrations.openenv.hosting.containers import Container, Limits
from integrations.openenv.hosting.docker_command import reap_containers
from integrations.openenv.hosting.launch import choose_runtime, preflight
from integrations.openenv.hosting.reaping import OWNER_LABEL, this_process
from integrations.openenv.hosting.server import ServerStartFailed
from integrations.openenv.hosting.source import ServerSource
from integrations.openenv.pool.server_pool import ServerPool
from tests.integrations.openenv.images.built import built_image, docker, docker_or_skip

HELLO = EchoEntry().parse("hello")


@pytest.fixture(scope="module", autouse=True)
def image() -> str:
    docker_or_skip()
    return built_image("echo_env")


def source(image: str) -> ServerSource:
    return ServerSource("echo_env", module=EchoEntry.server_module, image=image)


def settings(name: str) -> dict:
    return json.loads(docker("inspect", name))[0]


def containers(owner: str = str(this_process())) -> list[str]:
    return docker("ps", "--all", "--quiet", f"--filter=label={OWNER_LABEL}={owner}").split()


async def test_a_container_of_ours_has_limits_no_network_and_a_mark_and_is_removed(image: str) -> None:
    pool = ServerPool(OpenEnvConfig(runtime="docker", memory_gb=0.5, cpus=0.5, max_sessions=3))
    leases = await asyncio.gather(*(pool.lease(source(image)) for _ in range(3)))
    results = await asyncio.gather(*(lease.step(HELLO) for lease in leases))
    assert all(result.observation["result"]["data"] == "hello" for result in results)
    [(_, server)] = pool.servers()
    assert isinstance(server, Container)
    found = settings(server.name)
    host = found["HostConfig"]
    assert (host["Memory"], host["MemorySwap"], host["NanoCpus"]) == (2**29, 2**29, 500_000_000)
    assert (host["PidsLimit"], host["ReadonlyRootfs"], host["CapDrop"]) == (256 + 8 * 3, True, ["ALL"])
    assert host["SecurityOpt"] == ["no-new-privileges"]
    assert (host["NetworkMode"], host["PortBindings"]) == ("none", {})
    assert found["Config"]["Labels"][OWNER_LABEL] == str(this_process())
    for lease in leases:
        await lease.release()
    await pool.close()
    assert containers() == []


async def test_with_a_network_the_port_is_on_the_loopback_and_dockers_choice(image: str) -> None:
    container = await Container.start(image, limits=Limits(network=True), timeout_s=120, pull=False)
    [binding] = settings(container.name)["NetworkSettings"]["Ports"]["8000/tcp"]
    assert binding["HostIp"] == "127.0.0.1"
    assert container.url == f"http://127.0.0.1:{binding['HostPort']}"
    await asyncio.to_thread(container.stop)
    await asyncio.to_thread(container.stop)  # twice is fine
    assert containers() == []


@pytest.mark.parametrize("deed", ["kill", "pause"])
async def test_a_container_that_dies_or_stands_still_is_replaced(image: str, deed: str) -> None:
    pool = ServerPool(OpenEnvConfig(runtime="docker", step_timeout_s=10.0, startup_timeout_s=120))
    lease = await pool.lease(source(image))
    [(_, server)] = pool.servers()
    assert isinstance(server, Container)
    docker(deed, server.name)
    with pytest.raises(SessionLost):
        await lease.step(HELLO)
    await lease.release()
    lease = await pool.lease(source(image))
    assert (await lease.step(HELLO)).observation["result"]["data"] == "hello"
    assert pool.num_restarts == 1
    assert len(containers()) == 1
    await lease.release()
    await pool.close()
    assert containers() == []


async def test_a_container_that_cannot_serve_is_removed_and_the_end_of_its_log_shown(image: str) -> None:
    with pytest.raises(
        ServerStartFailed, match=r"(?s)ended at once; the end of its log:.*unrecognized arguments: --colour"
    ):
        await Container.start(image, arguments=["--colour"], timeout_s=120, pull=False)
    assert containers() == []


async def test_docker_is_chosen_where_the_image_is_here_and_asked_for_where_it_is_not(image: str) -> None:
    auto, asked = OpenEnvConfig(), OpenEnvConfig(runtime="docker")
    missing = ServerSource("echo_env", module=EchoEntry.server_module, image="skyrl-test/never-built:none")
    assert await preflight([source(image)], auto) == {"echo_env": "docker"}
    assert await choose_runtime(missing, auto) == "local"
    with pytest.raises(
        OpenEnvError, match=r"never-built:none is not on this machine; .*install_environment\.py echo_env"
    ):
        await preflight([missing], asked)


async def test_the_typed_client_of_an_image_without_a_network(image: str) -> None:
    async with await EchoEnv.from_docker_image(image) as env:
        await env.reset()
        assert (await env.step(EchoAction("hello"))).observation.echoed == "hello"
        assert env.url.startswith("unix:")
    assert containers() == []


TRAINER = """
    import asyncio, json, os
    from integrations.openenv.config import OpenEnvConfig
    from integrations.openenv.hosting.containers import container_reaper
    from integrations.openenv.pool.server_pool import shared_pool
    from integrations.openenv.hosting.reaping import owner_folder, this_process
    from integrations.openenv.hosting.source import ServerSource

    async def main():
        config = OpenEnvConfig(runtime="docker")
        lease = await shared_pool(config).lease(ServerSource("echo_env", image="{image}"))
        told = [str(this_process()), str(owner_folder()), container_reaper(os.getpid()).pid]
        print(json.dumps(told), flush=True)
        await asyncio.sleep(600)

    asyncio.run(main())
"""


def trainer(image: str) -> tuple[subprocess.Popen[bytes], str, Path, int]:
    """A process with a lease on a container: itself, its mark, its folder, and the pid of its container reaper."""
    command = [sys.executable, "-c", textwrap.dedent(TRAINER.format(image=image))]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL)
    assert process.stdout is not None
    owner, folder, reaper_pid = json.loads(process.stdout.readline())
    process.stdout.close()
    return process, owner, Path(folder), reaper_pid


@pytest.mark.parametrize("how", [signal.SIGKILL, signal.SIGTERM, signal.SIGINT])
def test_no_container_outlives_the_trainer(image: str, how: signal.Signals) -> None:
    process, owner, folder, _ = trainer(image)
    assert len(containers(owner)) == 1
    process.send_signal(how)
    process.wait(60)
    end = time.monotonic() + 60
    while (containers(owner) or folder.exists()) and time.monotonic() < end:
        time.sleep(0.1)
    assert containers(owner) == []
    assert not folder.exists()


@pytest.fixture
def own_temporary_folder(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Processes of other tests, which remove what dead trainers left, do not look there."""
    with tempfile.TemporaryDirectory() as folder:
        monkeypatch.setenv("TMPDIR", folder)
        monkeypatch.setattr(tempfile, "tempdir", folder)
        yield


@pytest.mark.usefixtures("own_temporary_folder")
async def test_what_even_the_container_reaper_missed_is_found_by_its_mark_at_the_next_start(image: str) -> None:
    process, owner, folder, reaper_pid = await asyncio.to_thread(trainer, image)
    os.kill(reaper_pid, signal.SIGKILL)
    process.kill()
    process.wait(60)
    others = replace(this_process(), boot="another machine")
    other = docker("run", "--detach", f"--label={OWNER_LABEL}={others}", "--entrypoint=sleep", image, "60")
    await asyncio.sleep(0.2)
    assert len(containers(owner)) == 1
    assert folder.exists()
    await preflight([source(image)], OpenEnvConfig(runtime="docker"))
    assert containers(owner) == []
    assert not folder.exists()
    assert containers(str(others)) == [other[:12]]  # it runs, and whether its owner lives cannot be known from here
    docker("kill", other)
    await reap_containers()
    assert containers(str(others)) == []
