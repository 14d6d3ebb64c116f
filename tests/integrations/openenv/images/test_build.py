"""Each environment's image of our own: built here, started behind every wall, played, stopped."""

from __future__ import annotations

import asyncio
import base64
import importlib.util
import io
import subprocess
import sys
import tarfile
import time
from pathlib import Path
from typing import Any

import pytest

from integrations.openenv import install_environment
from integrations.openenv.catalog import CATALOG, CatalogEntry, catalog_entry
from integrations.openenv.catalog.echo import EchoEntry
from integrations.openenv.client.errors import OpenEnvError
from integrations.openenv.commands.findings import report
from integrations.openenv.commands.measure import descendants, measure
from integrations.openenv.config import OpenEnvConfig
from integrations.openenv.env import OpenEnv
from integrations.openenv.hosting import containers
from integrations.openenv.hosting.reaping import OWNER_LABEL, this_process
from integrations.openenv.images.build import (
    build_context,
    build_image,
    context_hash,
    engine_packages,
    installed_closure,
)
from integrations.openenv.pool.server_pool import close_shared_pools
from integrations.openenv.prepare_dummy_dataset import dataset_rows
from tests.integrations.openenv.images.built import built_image, docker, docker_or_skip, hardened_container

IN_DOCKER = OpenEnvConfig(runtime="docker", startup_timeout_s=180.0, step_timeout_s=120.0)

pytestmark = pytest.mark.timeout(1200)  # a first build downloads the engine


@pytest.fixture(params=list(CATALOG))
def entry(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> CatalogEntry:
    """An environment whose image was built here; the tests' own tag stands in for the user's."""
    docker_or_skip()
    entry = catalog_entry(request.param)
    if entry.engine_module is not None and importlib.util.find_spec(entry.engine_module) is None:
        pytest.skip(f"{entry.engine_module} is not installed here: uv sync --extra {entry.extra}")
    monkeypatch.setattr(type(entry), "local_image", built_image(entry.name))
    return entry


async def gold_episode(entry: CatalogEntry) -> tuple[OpenEnv, list[Any]]:
    """One episode of the catalog's good player, and all that came back."""
    [row], _ = dataset_rows(entry.name, 1, 0, seed=3)
    env = OpenEnv(IN_DOCKER, {**row, "max_turns": entry.max_turns})
    try:
        prompt, _ = await env.init_async(row["prompt"])
        steps: list[Any] = []
        while not steps or not steps[-1]["done"]:
            gold = env.gold_action()
            assert gold is not None
            steps.append(await env.step_async(gold))
    finally:
        await env.close_async()
    return env, [prompt, *steps]


async def test_a_good_player_earns_the_gold_reward_a_seed_repeats_and_no_container_is_left(entry: CatalogEntry) -> None:
    try:
        env, first = await gold_episode(entry)
        _, second = await gold_episode(entry)
    finally:
        await close_shared_pools()
    earned = sum(step["reward"] for step in first[1:])
    assert env.translator.gold_reward is None or earned >= env.translator.gold_reward - 1e-6
    assert first == second
    assert docker("ps", "--all", "--quiet", f"--filter=label={OWNER_LABEL}={this_process()}") == ""


async def test_check_finds_nothing_that_would_make_training_fail(entry: CatalogEntry) -> None:
    rows, _ = dataset_rows(entry.name, 8, 0, seed=0)
    rows = [{**row, "max_turns": entry.max_turns} for row in rows]
    seen = await measure(IN_DOCKER, entry.name, rows, began_s=time.monotonic(), before=descendants())
    assert report(seen).findings == []
    assert (seen.left_processes, seen.left_containers) == ([], [])


def test_it_runs_as_any_user_on_a_port_is_healthy_and_stops_when_asked(entry: CatalogEntry) -> None:
    with hardened_container(entry.local_image) as (container, _):
        assert docker("exec", container, "id", "-u") == "4242"
        check = docker("inspect", "--format={{range .Config.Healthcheck.Test}}{{println .}}{{end}}", container)
        kind, *command = check.splitlines()
        assert kind == "CMD"
        docker("exec", container, *command)  # raises unless it ends with 0
        docker("stop", "--time=60", container)
        assert docker("inspect", "--format={{.State.ExitCode}}", container) == "0"  # SIGKILL would be 137


def test_it_says_what_it_is_and_that_it_needs_no_rights(entry: CatalogEntry) -> None:
    labels = '{{index .Config.Labels "org.openenv.server"}} {{index .Config.Labels "org.openenv.environment"}}'
    assert docker("inspect", f"--format={labels}", entry.local_image) == f"skyrl {entry.name}"
    assert docker("inspect", "--format={{.Config.User}}", entry.local_image) == "10001:10001"


@pytest.fixture
def old_echo(monkeypatch: pytest.MonkeyPatch) -> CatalogEntry:
    """echo_env whose image is of the time before WebSockets."""
    docker_or_skip()
    tag = "skyrl-test/old-echo-env:latest"
    server = (Path(__file__).parents[1] / "client" / "old_http_server.py").read_bytes()
    dockerfile = (
        f"FROM {built_image('echo_env')}\n"
        "LABEL org.openenv.server=nobody\n"
        f"ENV PYTHONPATH=/tmp SERVER={base64.b64encode(server).decode()}\n"
        'ENTRYPOINT ["sh", "-c", "echo $SERVER | base64 -d > /tmp/old_http_server.py; '
        'exec python -m uvicorn old_http_server:app --host 0.0.0.0 --port 8000"]\n'
    )
    subprocess.run(["docker", "build", "--tag", tag, "-"], input=dockerfile.encode(), check=True, capture_output=True)
    entry = catalog_entry("echo_env")
    monkeypatch.setattr(type(entry), "local_image", tag)
    return entry


async def test_an_image_from_before_2026_gets_one_process_and_is_played_by_one_episode_at_a_time(
    old_echo: CatalogEntry, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(containers, "num_workers", lambda: 4)
    container = await containers.Container.start(old_echo.local_image, pull=False, timeout_s=180.0)
    try:
        assert "WEB_CONCURRENCY=1" in docker("exec", container.name, "env").splitlines()
        assert container.num_workers == 1
    finally:
        container.stop()
    try:
        played = await asyncio.gather(*(gold_episode(old_echo) for _ in range(3)))
    finally:
        await close_shared_pools()
    assert [[step["reward"] for step in seen[1:]] for _, seen in played] == [[1.0]] * 3


def test_the_command_line_builds_the_image_and_plays_in_it(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    base_image, tag = docker_or_skip(), f"skyrl-test/echo-env:command-line-{context_hash(catalog_entry('echo_env'))}"
    monkeypatch.setattr(type(catalog_entry("echo_env")), "local_image", tag)
    monkeypatch.setattr(sys, "argv", ["install", "--build", "--base_image", base_image, "echo-env"])
    monkeypatch.setattr(sys, "dont_write_bytecode", False)
    try:
        with pytest.raises(SystemExit) as ended:
            install_environment.main()
    finally:
        docker("image", "rm", tag, check=False)
    printed = capsys.readouterr().out
    assert ended.value.code == 0
    assert f"starting the image {tag}" in printed
    assert printed.count("the good player earned 1 of 1") == 2  # the local server's, the image's


async def test_a_base_image_that_cannot_be_had_fails_the_build_and_leaves_no_tag() -> None:
    docker_or_skip()
    with pytest.raises(OpenEnvError, match="docker build failed\n"):
        await build_image(catalog_entry("echo_env"), "skyrl-test/nothing:latest", base_image="skyrl-test/no-such-base")
    assert docker("images", "--quiet", "skyrl-test/nothing") == ""


def test_equal_inputs_give_equal_contexts_and_different_engines_different_ones() -> None:
    echo, coding = catalog_entry("echo_env"), catalog_entry("coding_env")
    assert build_context(echo) == build_context(echo)
    assert context_hash(echo) != context_hash(coding)


def test_the_context_holds_the_servers_and_pinned_requirements_and_nothing_else() -> None:
    with tarfile.open(fileobj=io.BytesIO(build_context(catalog_entry("coding_env")))) as tar:
        names = tar.getnames()
        members = {name: tar.extractfile(name) for name in names}
        files = {name: member.read().decode() for name, member in members.items() if member is not None}
    assert {name.split("/")[0] for name in names} == {
        "Dockerfile",
        "system.sh",
        "requirements",
        "integrations",
        "skyrl_gym",
    }
    gym = {name for name in names if name.startswith("skyrl_gym")}
    assert {name.rpartition("/")[0] for name in gym - {"skyrl_gym/contract.py", "skyrl_gym/tool_calls.py"}} == {
        "skyrl_gym/walls"
    }
    assert "integrations/openenv/servers/coding_env.py" in names
    server, engine = (files[f"requirements/{name}.txt"].splitlines() for name in ("server", "engine"))
    assert "openenv-core==0.3.0" in server
    assert "smolagents==1.26.0" in engine
    assert not set(server) & set(engine)
    assert not [line for line in server if line.startswith(("gradio=", "torch=", "openai="))]


def test_an_engine_is_the_extra_of_pyproject_with_what_it_asks_for() -> None:
    class Finrl(EchoEntry):
        extra = "finrl-env"

    assert engine_packages(Finrl()) == ["skfolio"]
    assert {"pandas", "numpy", "python-dateutil", "six"} <= set(installed_closure(["pandas"]))
    assert "numpy" not in installed_closure(["pandas"], left_out={"numpy"})
    with pytest.raises(OpenEnvError, match=r"no-such-package is not installed here"):
        installed_closure(["no-such-package"])
