"""Environments for language models. Needs neither torch nor ray nor numpy."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from skyrl_gym import envs, error, tools
from skyrl_gym.core import Env, EnvFailure
from skyrl_gym.envs.registration import make, pprint_registry, register, registry, spec

if TYPE_CHECKING:
    from skyrl_gym.check import check_env

__all__ = [
    "Env",
    "EnvFailure",
    "check_env",
    "envs",
    "error",
    "make",
    "pprint_registry",
    "register",
    "registry",
    "spec",
    "tools",
]


def __getattr__(name: str) -> Any:
    """Load `check_env` when it is asked for: it uses this package, which is complete then."""
    if name == "check_env":
        return importlib.import_module("skyrl_gym.check").check_env
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
