"""Load the typed and checked tree from the command line, or from a configuration that Hydra composed."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from typing import Any, TypeGuard, TypeVar

from omegaconf import DictConfig, OmegaConf

from skyrl_train.config.build import build
from skyrl_train.config.corrected import advice_to_paste, without
from skyrl_train.config.overrides import paste, with_overrides
from skyrl_train.config.problems import NO_VALUE, ConfigError, Problem, Unfit
from skyrl_train.config.root import SkyRLConfig
from skyrl_train.config.section import is_interpolation
from skyrl_train.config.tree import leaves

Root = TypeVar("Root", bound=SkyRLConfig)


def load_config(overrides: Sequence[str], root: type[Root] = SkyRLConfig) -> Root:  # ty: ignore[invalid-parameter-default]
    """Return the tree after overrides in Hydra's grammar (`trainer.epochs=2`).

    `+key=value` is the same as `key=value` where the tree has the key, else a key of the user's own, which only the
    user's code reads. Every problem is reported in one ConfigError, which ends with the corrected command.
    """
    return root.from_cli_overrides(overrides)


def validate_cfg(config: DictConfig | SkyRLConfig, root: type[SkyRLConfig] = SkyRLConfig) -> SkyRLConfig:
    """Return the typed, resolved and checked tree of a configuration that Hydra composed or that was made by hand.

    Keys that the tree does not have are the user's own (+my.key=value), unless they look like one that it has.
    """
    if isinstance(config, SkyRLConfig):
        return build(type(config), list(leaves(config)), may_add=lambda key: True).advised()
    settings: Any = OmegaConf.to_container(config, resolve=False)
    try:
        return build(root, settings.items(), may_add=lambda key: True).advised()
    except ConfigError as error:
        typed = sys.argv[1:]
        if not typed or not all("=" in text for text in typed):
            raise
        raise ConfigError(error.problems, paste(typed, root)) from None


def refused_later(problem: Problem, root: type[SkyRLConfig]) -> ConfigError:
    """Return the error of a problem that was found after the configuration was read, with this process's command."""
    typed = sys.argv[1:]
    if (left := without(problem, typed)) == typed:
        return ConfigError([problem])
    return ConfigError([problem], advice_to_paste(typed, lambda texts: with_overrides(texts, root), begin=left))


def command_instead(error: Unfit, overrides: Sequence[str], root: type[SkyRLConfig]) -> str:
    """Return the end of a refusal: the command with the settings that would fit, or nothing where none are known."""
    if not error.fix:
        return ""
    keys = tuple(setting.partition("=")[0] for setting in error.fix)
    fitting = without(Problem("", NO_VALUE, "", fix=error.fix, drops=keys), list(overrides))
    return advice_to_paste(overrides, lambda texts: load_config(texts, root), begin=fitting)


def is_resolved(config: object) -> TypeGuard[SkyRLConfig]:
    """Return whether this is a typed tree without an unresolved value ("${trainer.max_prompt_length}")."""
    return isinstance(config, SkyRLConfig) and not any(is_interpolation(value) for _, value in leaves(config))
