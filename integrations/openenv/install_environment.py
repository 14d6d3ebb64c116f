"""Install environments: engine and image, tested by an episode of the catalog's gold player.

uv run integrations/openenv/install_environment.py echo-env coding-env           the official images
uv run integrations/openenv/install_environment.py --build openspiel-env         an image of our own server

It says so if Docker, the registry or the engine is missing. Its exit code is 0 if each environment can be played.
"""

from __future__ import annotations

import argparse
import asyncio
import compileall
import importlib
import os
import shutil
import sys
import sysconfig
import time
from dataclasses import dataclass

from integrations.openenv.catalog import CATALOG, CatalogEntry, catalog_entry
from integrations.openenv.client.errors import OpenEnvError
from integrations.openenv.config import OpenEnvConfig
from integrations.openenv.env import OpenEnv
from integrations.openenv.hosting.docker_command import DockerUnavailable, docker, require_docker
from integrations.openenv.hosting.server_process import REPOSITORY_ROOT
from integrations.openenv.images.build import BASE_IMAGE, build_image
from integrations.openenv.images.long_command import run_long_command
from integrations.openenv.pool.server_pool import close_shared_pools
from integrations.openenv.prepare_dummy_dataset import dataset_rows
from skyrl_gym.core import EnvFailure
from skyrl_train.visible import Parser, make_errors_visible, visible


@dataclass(frozen=True, slots=True)
class InstallOptions:
    """The options of the command line."""

    build: bool = False  # build our own image instead of pulling the official one
    base_image: str = BASE_IMAGE
    timeout_s: float = 1800.0  # of each download and each build


def main() -> None:
    parser = _parser()
    words = parser.parse_args()
    try:
        entries = [catalog_entry(name) for name in words.names] or list(CATALOG.values())
    except ValueError as unknown:
        parser.error(str(unknown))
    options = InstallOptions(build=words.build, base_image=words.base_image, timeout_s=words.timeout)
    status = asyncio.run(install(entries, options))
    if status == 0 and sys.dont_write_bytecode and sys.prefix != sys.base_prefix:
        compile_packages(sysconfig.get_path("purelib"))
    raise SystemExit(status)


async def install(entries: list[CatalogEntry], options: InstallOptions) -> int:
    """Install the environments. Returns 0 if each can be played (also in its image, if that was to be built)."""
    try:
        await require_docker()
        has_docker = True
    except DockerUnavailable as missing:
        has_docker = False
        print(f"{missing}.\n" + ("Nothing can be built." if options.build else "The local runtime will serve."))
        if options.build:
            return 1
    failed = [entry.name for entry in entries if not await _install(entry, options, has_docker)]
    if failed:
        print(f"not ready: {', '.join(failed)}")
    return 1 if failed else 0


async def _install(entry: CatalogEntry, options: InstallOptions, has_docker: bool) -> bool:
    try:
        await bring_engine(entry, options.timeout_s)
    except OpenEnvError as failed:
        print(visible(f"{entry.name}: FAILED: {failed}"))
        return False
    has_image = has_docker and await _bring_image(entry, options)
    if options.build and not has_image:
        return False
    if not await _plays(entry, OpenEnvConfig(runtime="local"), "the local server"):
        return False
    return not has_image or await _plays(entry, OpenEnvConfig(runtime="docker"), f"the image {entry.local_image}")


async def bring_engine(entry: CatalogEntry, timeout_s: float) -> None:
    """Install the extra with the engine of our own server, unless it is installed."""
    if entry.extra is None or entry.has_engine:
        return
    uv = os.environ.get("UV") or shutil.which("uv")
    if uv is None or sys.prefix == sys.base_prefix:
        why = "uv is not here" if uv is None else "this Python is no virtual environment"
        raise OpenEnvError(
            f"{entry.engine_module} is missing and {why}; in {REPOSITORY_ROOT} type: "
            f"uv sync --inexact --extra {entry.extra}"
        )
    print(f"{entry.name}: installing its engine ({entry.extra}) ...", flush=True)
    find_links = os.environ.get("UV_FIND_LINKS") or os.environ.get("PIP_FIND_LINKS", "")
    await run_long_command(
        *(uv, "sync", "--inexact", "--project", str(REPOSITORY_ROOT), "--extra", entry.extra),
        timeout_s=timeout_s,
        environment={"UV_PROJECT_ENVIRONMENT": sys.prefix, "UV_FIND_LINKS": find_links},
    )
    importlib.invalidate_caches()
    if not entry.has_engine:
        raise OpenEnvError(f"uv installed the extra {entry.extra}, but {entry.engine_module} is still missing")


def compile_packages(folder: str) -> None:
    """Compile the installed packages to bytecode once.

    With PYTHONDONTWRITEBYTECODE set, each start of a run would otherwise compile thousands of imports again.
    """
    print(
        "PYTHONDONTWRITEBYTECODE is set: compiling the installed packages once, so that runs start fast ...", flush=True
    )
    start = time.monotonic()
    compileall.compile_dir(folder, maxlevels=50, quiet=2, workers=0)
    print(f"compiled in {time.monotonic() - start:.0f} s.")


async def _bring_image(entry: CatalogEntry, options: InstallOptions) -> bool:
    start = time.monotonic()
    try:
        if options.build or not entry.image:
            print(f"{entry.name}: building {entry.local_image} on {options.base_image} ...", flush=True)
            await build_image(entry, entry.local_image, base_image=options.base_image, timeout_s=options.timeout_s)
        else:
            print(f"{entry.name}: pulling {entry.image} ...", flush=True)
            await run_long_command("docker", "pull", entry.image, timeout_s=options.timeout_s)
            await docker("tag", entry.image, entry.local_image)
    except OpenEnvError as failed:
        print(
            visible(f"{entry.name}: no image: {failed}")
            + ("" if options.build else "\n  The local runtime will serve.")
        )
        return False
    size = int(await docker("image", "inspect", "--format={{.Size}}", entry.local_image))
    print(f"{entry.name}: {entry.local_image} is here: {size / 1e6:.0f} MB, {time.monotonic() - start:.0f} s.")
    return True


async def _plays(entry: CatalogEntry, config: OpenEnvConfig, where: str) -> bool:
    print(f"{entry.name}: starting {where} ...", flush=True)
    start = time.monotonic()
    try:
        reward, promised = await play_gold_episode(entry, config)
    except EnvFailure as failed:
        print(visible(f"{entry.name}: FAILED: {failed}"))
        return False
    good = promised is None or reward >= promised - 1e-6
    of = "" if promised is None else f" of {promised:g}"
    print(
        f"{entry.name}: the good player earned {reward:g}{of} in {time.monotonic() - start:.1f} s. "
        + ("Ready." if good else "That is too little: FAILED.")
    )
    return good


async def play_gold_episode(entry: CatalogEntry, config: OpenEnvConfig) -> tuple[float, float | None]:
    """Start a server, play one episode with the catalog's gold player, stop the server.

    Returns what the episode earned and the least that the catalog promises (None: no promise).
    """
    [row], _ = dataset_rows(entry.name, 1, 0, seed=0)
    env = OpenEnv(config, {**row, "max_turns": entry.max_turns})
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
    return reward, env.translator.gold_reward


def _parser() -> argparse.ArgumentParser:
    parser = Parser(description="Make OpenEnv environments ready to train on.")
    parser.add_argument("names", nargs="*", help=f"{', '.join(CATALOG)} (echo-env is echo_env); none means all")
    parser.add_argument("--build", action="store_true", help="build images of our own servers, pull nothing")
    parser.add_argument("--base_image", default=BASE_IMAGE, help="what they are built on (default: %(default)s)")
    parser.add_argument("--timeout", type=float, default=1800.0, help="seconds for each download and build (1800)")
    return parser


if __name__ == "__main__":
    make_errors_visible()
    main()
