"""Make environments ready: pull the official image where Docker answers, else check that the local server serves.

uv run integrations/openenv/install_environment.py echo-env coding-env
"""

from __future__ import annotations

import argparse
import asyncio
import time

from integrations.openenv.catalog import CATALOG, CatalogEntry, catalog_entry
from integrations.openenv.client import OpenEnvError
from integrations.openenv.config import OpenEnvConfig
from integrations.openenv.docker_command import DockerUnavailable, docker, require_docker
from integrations.openenv.env import OpenEnv
from integrations.openenv.pool import close_shared_pools
from integrations.openenv.prepare_dummy_dataset import dataset_rows
from skyrl_gym.core import EnvFailure

PULL_TIMEOUT_S = 1800.0


def main() -> None:
    parser = _parser()
    try:
        entries = [catalog_entry(name) for name in parser.parse_args().names] or list(CATALOG.values())
    except ValueError as unknown:
        parser.error(str(unknown))
    raise SystemExit(asyncio.run(install(entries)))


async def install(entries: list[CatalogEntry]) -> int:
    """0 if every environment can be played."""
    try:
        await require_docker()
        has_docker = True
    except DockerUnavailable as missing:
        has_docker = False
        print(f"{missing}.\nThe local runtime will serve.")
    failed = [entry.name for entry in entries if not await _install(entry, has_docker)]
    if failed:
        print(f"not ready: {', '.join(failed)}")
    return 1 if failed else 0


async def _install(entry: CatalogEntry, has_docker: bool) -> bool:
    if has_docker:
        try:
            await pull(entry)
        except OpenEnvError as failed:
            print(f"{entry.name}: no image ({failed}). The local runtime will serve.")
    print(f"{entry.name}: starting the local server ...", flush=True)
    start = time.monotonic()
    try:
        reward = await play_gold_action(entry)
    except EnvFailure as failed:
        print(f"{entry.name}: FAILED: {failed}")
        return False
    print(f"{entry.name}: the known solution earned {reward:g} of 1 in {time.monotonic() - start:.1f} s. Ready.")
    return reward == 1.0


async def pull(entry: CatalogEntry) -> None:
    """Pull the official image and tag it with the environment's short name."""
    short = f"{entry.name.replace('_', '-')}:latest"
    print(f"{entry.name}: pulling {entry.image} ...", flush=True)
    await docker("pull", "--quiet", entry.image, timeout_s=PULL_TIMEOUT_S)
    await docker("tag", entry.image, short)
    print(f"{entry.name}: the image is here, also as {short}.")


async def play_gold_action(entry: CatalogEntry) -> float:
    """Start our own server, play one episode as its gold player does, stop the server. What the episode earned."""
    [row], _ = dataset_rows(entry.name, 1, 0, seed=0)
    env = OpenEnv(OpenEnvConfig(runtime="local"), {**row, "max_turns": entry.max_turns})
    reward, done = 0.0, False
    try:
        await env.init_async(row["prompt"])
        while not done:
            gold = env.gold_action()
            if gold is None:
                raise EnvFailure(f"{entry.name}: the catalog knows no good action here")
            output = await env.step_async(gold)
            reward, done = reward + output["reward"], output["done"]
    finally:
        await env.close_async()
        await close_shared_pools()
    return reward


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description="Make OpenEnv environments ready to train on.")
    parser.add_argument("names", nargs="*", help=f"{', '.join(CATALOG)} (echo-env is echo_env); none means all")
    return parser


if __name__ == "__main__":
    main()
