"""Parse overrides in Hydra's grammar (`trainer.epochs=2`) and build the tree that they describe."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, TypeVar

from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.errors import OverrideParseException

from skyrl_train.config.build import build
from skyrl_train.config.corrected import advice_to_paste
from skyrl_train.config.problems import NO_VALUE, ConfigError, Problem
from skyrl_train.config.refused import lies_in
from skyrl_train.config.section import Section

Root = TypeVar("Root", bound=Section)


def tree_of(overrides: Sequence[str], root: type[Root]) -> Root:
    """Return the checked tree, or raise a ConfigError with every problem that ends with the corrected command."""
    try:
        return with_overrides(overrides, root)
    except ConfigError as error:
        raise ConfigError(error.problems, paste(overrides, root)) from None


def paste(overrides: Sequence[str], root: type[Section]) -> str:
    """Return the end of a refusal: the command that would start, or nothing if none is known."""
    return advice_to_paste(overrides, lambda texts: with_overrides(texts, root))


def with_overrides(overrides: Sequence[str], root: type[Root]) -> Root:
    """Return the checked tree, or raise a ConfigError with every problem."""
    settings, problems = parsed_overrides(overrides)
    added = {text.lstrip("+").partition("=")[0] for text in overrides if text.startswith("+")}
    return build(root, settings, problems, may_add=lambda key: any(lies_in(key, own) for own in added))


def parsed_overrides(overrides: Sequence[str]) -> tuple[list[tuple[str, Any]], list[Problem]]:
    """Return the settings ("a.b", 1) of texts `a.b=1`, and the problems with those that cannot be read."""
    parser = OverridesParser.create()
    parsed = [parsed_override(parser, text) for text in overrides]
    problems = [found for found in parsed if isinstance(found, Problem)]
    return [found for found in parsed if not isinstance(found, Problem)], problems


def parsed_override(parser: OverridesParser, text: str) -> tuple[str, Any] | Problem:
    """Return `a.b=1` as ("a.b", 1), or the problem with it."""
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
