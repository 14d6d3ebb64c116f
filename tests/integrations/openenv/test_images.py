"""Each environment's image of our own: built here, started behind every wall, played, stopped."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest

from integrations.openenv.catalog import CATALOG, CatalogEntry, catalog_entry
from integrations.openenv.config import OpenEnvConfig
from integrations.openenv.env import OpenEnv
from integrations.openenv.pool import close_shared_pools
from integrations.openenv.prepare_dummy_dataset import dataset_rows
from tests.integrations.openenv.images import built_image, docker, docker_or_skip, hardened_container

pytestmark = pytest.mark.timeout(1200)  # a first build downloads the engine


@pytest.fixture(scope="module", params=list(CATALOG))
def container(request: pytest.FixtureRequest) -> Iterator[tuple[CatalogEntry, str, str]]:
    """The environment, a container of its image, and where it listens."""
    entry = catalog_entry(request.param)
    if entry.engine_module is not None:
        pytest.importorskip(entry.engine_module)
    with hardened_container(built_image(entry.name)) as (container_id, url):
        yield entry, container_id, url


async def gold_episode(entry: CatalogEntry, url: str) -> tuple[OpenEnv, list[Any]]:
    """One episode of the catalog's good player, and all that came back."""
    [row], _ = dataset_rows(entry.name, 1, 0, seed=3)
    env = OpenEnv(OpenEnvConfig(runtime="url", url=url), {**row, "max_turns": entry.max_turns})
    prompt, _ = await env.init_async(row["prompt"])
    seen: list[Any] = [prompt]
    try:
        while not seen[-1:] or not isinstance(seen[-1], dict) or not seen[-1]["done"]:
            gold = env.gold_action()
            assert gold is not None
            seen.append(dict(await env.step_async(gold)))
    finally:
        await env.close_async()
        await close_shared_pools()
    return env, seen


async def test_a_good_players_episode_earns_the_gold_reward_and_the_same_seed_repeats(
    container: tuple[CatalogEntry, str, str],
) -> None:
    entry, _, url = container
    env, first = await gold_episode(entry, url)
    _, second = await gold_episode(entry, url)
    earned = sum(step["reward"] for step in first[1:])
    assert env.translator.gold_reward is None or earned >= env.translator.gold_reward - 1e-6
    assert first == second


def test_it_runs_as_nobody_in_particular_and_says_whose_it_is(container: tuple[CatalogEntry, str, str]) -> None:
    entry, container_id, _ = container
    assert docker("exec", container_id, "id", "-u") == "4242"
    labels = '{{index .Config.Labels "org.openenv.server"}} {{index .Config.Labels "org.openenv.environment"}}'
    image = docker("inspect", "--format={{.Image}}", container_id)
    assert docker("inspect", f"--format={labels}", image) == f"skyrl {entry.name}"
    assert docker("inspect", "--format={{.Config.User}}", image) == "10001:10001"


def test_its_health_check_passes(container: tuple[CatalogEntry, str, str]) -> None:
    _, container_id, _ = container
    check = docker("inspect", "--format={{range .Config.Healthcheck.Test}}{{println .}}{{end}}", container_id)
    kind, *command = check.splitlines()
    assert kind == "CMD"
    docker("exec", container_id, *command)  # raises unless it ends with 0


def test_it_stops_when_it_is_asked_to(container: tuple[CatalogEntry, str, str]) -> None:
    _, _, url = container
    with hardened_container(docker("inspect", "--format={{.Config.Image}}", container[1])) as (container_id, _):
        docker("stop", "--time=60", container_id)
        assert docker("inspect", "--format={{.State.ExitCode}}", container_id) == "0"  # 137 is SIGKILL's


def test_no_container_is_left() -> None:
    docker_or_skip()
    tag = built_image("echo_env")
    with hardened_container(tag) as (container_id, _):
        assert container_id.startswith(docker("ps", "--quiet", f"--filter=id={container_id}"))
    assert docker("ps", "--all", "--quiet", f"--filter=id={container_id}") == ""
