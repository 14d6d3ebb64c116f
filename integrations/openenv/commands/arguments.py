"""The arguments that `play` and `check` share: the environment, its options, and where it is served from."""

from __future__ import annotations

import argparse
from typing import Any

from rich.markup import escape

from integrations.openenv.catalog import CATALOG, FORMS, CatalogEntry, catalog_entry
from integrations.openenv.catalog.options import options_from_words
from integrations.openenv.config import OpenEnvConfig
from integrations.openenv.prepare_dummy_dataset import dataset_rows
from skyrl_train.visible import visible

CLASSES = "a class of yours (my_module:MyEnv) or another environment of skyrl_gym (gsm8k)"


def add_environment(parser: argparse.ArgumentParser, nargs: str | None = None) -> None:
    parser.add_argument("env", nargs=nargs, metavar="ENV", help=f"{', '.join(CATALOG)}; {FORMS}; or {CLASSES}")
    parser.add_argument(
        "--option",
        action="append",
        default=[],
        metavar="NAME=VALUE",
        help="option of the environment, e.g. game=catch; of a class, a setting in its env_config",
    )
    parser.add_argument("--seed", type=int, default=0, help="seed of the tasks and of the environment")
    parser.add_argument("--max-turns", type=int, help="turn limit of an episode")
    parser.add_argument("--runtime", default="auto", help="auto, local, docker or url")
    parser.add_argument("--url", help="address of a server that runs already")


def changed(arguments: argparse.Namespace, **values: Any) -> argparse.Namespace:
    """Return a copy with other values."""
    return argparse.Namespace(**{**vars(arguments), **values})


def shown(text: str) -> str:
    """Return text of a server or a data set without effects on the terminal or in rich's markup."""
    return escape(visible(text))


def environment_config(arguments: argparse.Namespace, **more: Any) -> OpenEnvConfig:
    """Return the configuration of the command line.

    It trusts what the user typed: the environment, its reward function and its variables.
    """
    words = options_from_words(arguments.option)
    named = {name: words[name] for name in catalog_entry(arguments.env).code_options & words.keys()}
    return OpenEnvConfig(runtime=arguments.runtime, url=arguments.url, env_names=[arguments.env], options=named, **more)


def task_rows(
    arguments: argparse.Namespace, num_rows: int, config: OpenEnvConfig
) -> tuple[CatalogEntry, list[dict[str, Any]]]:
    """Return the environment's entry and rows of a made-up data set, with `max_turns`."""
    entry = catalog_entry(arguments.env)
    if arguments.max_turns is not None and arguments.max_turns < 1:
        raise ValueError(f"--max-turns={arguments.max_turns} must be at least 1")
    rows, _ = dataset_rows(
        entry.name, num_rows, 0, arguments.seed, options=options_from_words(arguments.option), config=config
    )
    return entry, [{**row, "max_turns": arguments.max_turns or entry.max_turns} for row in rows]
