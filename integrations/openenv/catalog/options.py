"""Options of environments: a frozen dataclass each, filled from a row, a configuration or the command line."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from difflib import get_close_matches
from functools import cache
from typing import Any, TypeVar

from pydantic import TypeAdapter, ValidationError

OptionsT = TypeVar("OptionsT")


@dataclass(frozen=True, slots=True)
class NoOptions:
    """The options of an environment that has none."""


def read_options(options_type: type[OptionsT], values: Mapping[str, Any], of: str) -> OptionsT:
    """Return the dataclass with these values; ValueError names what is unknown or wrong, and the known options.

    An int given for a str option becomes text: the command line and YAML read game=2048 as a number.
    of: the environment's name, for messages.
    """
    known = {field.name: field.type for field in fields(options_type)}  # ty: ignore[invalid-argument-type]
    for name in values:
        if name not in known:
            nearest = get_close_matches(str(name), known, n=1)
            hint = f"did you mean {nearest[0]}?" if nearest else f"it has {', '.join(known) or 'none'}"
            raise ValueError(f"{of} has no option {name!r}; {hint}")
    try:
        return _adapter(options_type).validate_python(
            {name: str(v) if type(v) is int and known[name] in ("str", str) else v for name, v in values.items()}
        )
    except ValidationError as wrong:
        words = "; ".join(f"{'.'.join(map(str, error['loc']))}: {error['msg']}" for error in wrong.errors())
        raise ValueError(f"{of}: {words}") from None


@cache
def _adapter(options_type: type) -> TypeAdapter:
    return TypeAdapter(options_type)


def options_from_words(words: Sequence[str]) -> dict[str, Any]:
    """Return ["game=tic_tac_toe", "rows=8"] as a mapping. A value is read as JSON if possible, else as a string."""
    options: dict[str, Any] = {}
    for word in words:
        name, equals, text = word.partition("=")
        if not equals or not name:
            raise ValueError(f"option {word!r} must look like name=value")
        try:
            options[name] = json.loads(text)
        except ValueError:
            options[name] = text
    return options
