"""From the command line, or from what Hydra composed, to the typed and checked tree."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from typing import Any, TypeGuard, TypeVar

from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.errors import OverrideParseException
from loguru import logger
from omegaconf import DictConfig, OmegaConf

from skyrl_train.config.build import build
from skyrl_train.config.corrected import advice_to_paste
from skyrl_train.config.refused import lies_in
from skyrl_train.config.root import SkyRLConfig
from skyrl_train.config.section import NO_VALUE, ConfigError, Problem, is_interpolation
from skyrl_train.config.tree import leaves
from skyrl_train.config.validation import advice

Root = TypeVar("Root", bound=SkyRLConfig)


def load_config(overrides: Sequence[str], root: type[Root] = SkyRLConfig) -> Root:  # ty: ignore[invalid-parameter-default]
    """The tree after overrides in Hydra's grammar (`trainer.epochs=2`).

    `+key=value` is the same as `key=value` where the tree has the key, else a key of the user's own, which only the
    user's code reads. Every problem is reported in one ConfigError, which ends with the corrected command.
    """
    try:
        return advised(_tree_of(overrides, root))
    except ConfigError as error:
        raise ConfigError(error.problems, advice_to_paste(overrides, lambda texts: _tree_of(texts, root))) from None


def validate_cfg(config: DictConfig | SkyRLConfig, root: type[SkyRLConfig] = SkyRLConfig) -> SkyRLConfig:
    """The typed, resolved and checked tree of a configuration that Hydra composed or that was made by hand.

    Keys that the tree does not have are the user's own (+my.key=value), unless they look like one that it has.
    """
    if isinstance(config, SkyRLConfig):
        return advised(build(type(config), list(leaves(config)), may_add=lambda key: True))
    settings: Any = OmegaConf.to_container(config, resolve=False)
    try:
        return advised(build(root, settings.items(), may_add=lambda key: True))
    except ConfigError as error:
        typed = sys.argv[1:]
        if not typed or not all("=" in text for text in typed):
            raise
        raise ConfigError(error.problems, advice_to_paste(typed, lambda texts: _tree_of(texts, root))) from None


def is_resolved(config: object) -> TypeGuard[SkyRLConfig]:
    """Whether this is a typed tree in which no value waits for another ("${trainer.max_prompt_length}")."""
    return isinstance(config, SkyRLConfig) and not any(is_interpolation(value) for _, value in leaves(config))


def _tree_of(overrides: Sequence[str], root: type[Root]) -> Root:
    parser = OverridesParser.create()
    settings: list[tuple[str, Any]] = []
    problems: list[Problem] = []
    for text in overrides:
        parsed = parsed_override(parser, text)
        if isinstance(parsed, Problem):
            problems.append(parsed)
        else:
            settings.append(parsed)
    added = {text.lstrip("+").partition("=")[0] for text in overrides if text.startswith("+")}
    return build(root, settings, problems, may_add=lambda key: any(lies_in(key, own) for own in added))


def parsed_override(parser: OverridesParser, text: str) -> tuple[str, Any] | Problem:
    """`a.b=1` as ("a.b", 1), or what is wrong with it."""
    if text.startswith("-"):
        return Problem(
            text, NO_VALUE, "is not understood; settings are written key=value (`python -m skyrl_train.config`)"
        )
    if "=" not in text and not text.startswith("~"):
        return Problem(text, NO_VALUE, f"has no value; write {text}=VALUE")
    try:
        [override] = parser.parse_overrides([text])
    except OverrideParseException as error:
        key, _, value = text.partition("=")
        reason = str(error.__cause__ or error).splitlines()[0]
        return Problem(key, value, f"cannot be read ({reason}); put quotes around special characters: {key}='\"...\"'")
    if override.is_delete():
        return Problem(text, NO_VALUE, "would delete a key; set it to null or to its default")
    if override.is_sweep_override():
        key, _, value = text.partition("=")
        return Problem(key, value, f"is a sweep, and one run takes one value; write a list as {key}=[{value}]")
    return override.key_or_group, override.value()


def advised(config: Root) -> Root:
    for sentence in advice(config):
        logger.warning(sentence)
    return config
