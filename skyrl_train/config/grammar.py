"""Read overrides in Hydra's grammar (`trainer.epochs=2`)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import yaml
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.errors import OverrideParseException

from skyrl_train.config.problems import NO_VALUE, Problem, written


def parsed_overrides(overrides: Sequence[str]) -> tuple[list[tuple[str, Any]], list[Problem]]:
    """Return the settings ("a.b", 1) of texts `a.b=1`, and the problems with those that cannot be read."""
    parser = OverridesParser.create()
    parsed = [parsed_override(parser, text) for text in overrides]
    problems = [found for found in parsed if isinstance(found, Problem)]
    return [found for found in parsed if not isinstance(found, Problem)], problems


def parsed_override(parser: OverridesParser, text: str) -> tuple[str, Any] | Problem:
    """Return `a.b=1` as ("a.b", 1), or the problem with it."""
    key, _, value = text.partition("=")
    bare = key.lstrip("+")
    if text.startswith("-"):
        return Problem(
            text,
            NO_VALUE,
            "is not understood; settings are written key=value (`python -m skyrl_train.config`)",
            (text.lstrip("-"),) if "=" in text else (),
        )
    if "=" not in text and not text.startswith("~"):
        return Problem(text, NO_VALUE, f"has no value; write {text}=VALUE, or quotes around a value that holds spaces")
    try:
        [override] = parser.parse_overrides([text])
    except OverrideParseException as error:
        if (read := _as_yaml(value)) is not None:
            return bare, read
        reason = str(error.__cause__ or error).splitlines()[0]
        return Problem(
            bare,
            value,
            f"cannot be read ({reason}); put quotes around special characters: {bare}='\"...\"'",
            (written(key, value),) if "." in key else (),
        )
    if override.is_delete():
        return Problem(text, NO_VALUE, "would delete a key; set it to null or to its default")
    if override.is_sweep_override():
        fix = f"{key}=[{value}]"
        return Problem(bare, value, f"is a sweep, and one run takes one value; write a list as {fix}", (fix,))
    return override.key_or_group, override.value()


def _as_yaml(text: str) -> dict[str, Any] | list[Any] | None:
    """Return a mapping or a list in YAML or JSON, as the newest SkyRL reads it: {"a": "b"}; None for anything else."""
    try:
        read = yaml.safe_load(text)
    except (yaml.YAMLError, ValueError, RecursionError):
        return None
    is_plain = isinstance(read, list) or (isinstance(read, dict) and all(isinstance(name, str) for name in read))
    return read if is_plain else None
