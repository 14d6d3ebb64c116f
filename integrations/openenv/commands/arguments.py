"""The arguments that `play` and `check` share: which environment, its options, and where it is served from."""

from __future__ import annotations

import argparse
from typing import Any

from rich.markup import escape

from integrations.openenv.catalog import CATALOG, FORMS, CatalogEntry, catalog_entry
from integrations.openenv.catalog.options import options_from_words
from integrations.openenv.config import OpenEnvConfig
from integrations.openenv.prepare_dummy_dataset import dataset_rows
from skyrl_train.visible import visible


def add_environment(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("env", metavar="ENV", help=f"{', '.join(CATALOG)}; or {FORMS}")
    parser.add_argument(
        "--option", action="append", default=[], metavar="NAME=VALUE", help="of the environment, e.g. game=catch"
    )
    parser.add_argument("--seed", type=int, default=0, help="of the tasks and of the environment's chance")
    parser.add_argument("--max-turns", type=int, help="of one episode")
    parser.add_argument("--runtime", default="auto", help="auto, local, docker or url")
    parser.add_argument("--url", help="a server that runs already")


def shown(text: str) -> str:
    """Text of a server or a data set for rich's console: it steers neither the terminal nor rich's markup."""
    return escape(visible(text))


def environment_config(arguments: argparse.Namespace, **more: Any) -> OpenEnvConfig:
    """What the command line names is trusted: the environment, its reward function, its variables."""
    words = options_from_words(arguments.option)
    named = {name: words[name] for name in catalog_entry(arguments.env).code_options & words.keys()}
    return OpenEnvConfig(runtime=arguments.runtime, url=arguments.url, env_names=[arguments.env], options=named, **more)


def task_rows(
    arguments: argparse.Namespace, num_rows: int, config: OpenEnvConfig
) -> tuple[CatalogEntry, list[dict[str, Any]]]:
    """Rows of the data set, with `max_turns`."""
    entry = catalog_entry(arguments.env)
    rows, _ = dataset_rows(
        entry.name, num_rows, 0, arguments.seed, options=options_from_words(arguments.option), config=config
    )
    return entry, [{**row, "max_turns": arguments.max_turns or entry.max_turns} for row in rows]
