"""The experiment that a configuration asks for: the trainer's own, or that of an integration, by import path."""

from __future__ import annotations

from collections.abc import Iterable
from importlib import import_module
from typing import Any

PLAIN = "skyrl_train.entrypoints.main_base"
OPENENV = "integrations.openenv.entrypoints.main_openenv"
RECIPE = "integrations.openenv.recipe"
OPENENV_KEYS = ("environment.openenv", "environment.env_class=openenv")


def is_openenv(keys: Iterable[str]) -> bool:
    """Return whether keys (`key=value`) ask for the environments of OpenEnv."""
    return any(key.lstrip("+").startswith(OPENENV_KEYS) for key in keys)


def entry_point(*, openenv: bool) -> Any:
    """Return the module whose `main(keys)` trains, with EXPERIMENT and ROOT, the classes that it trains with."""
    module = import_module(OPENENV if openenv else PLAIN)
    if openenv:
        module.register_openenv()
    return module
