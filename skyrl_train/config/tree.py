"""Flatten a configuration into keys, to print it, store it, or compare two of them."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from omegaconf import OmegaConf

from skyrl_train.config.refused_rows import ROWS
from skyrl_train.config.section import is_interpolation, is_section
from skyrl_train.config.settings import plain_copy

ABSENT = "(absent)"  # stands for the value of a key that only the other configuration has


def leaves(section: Any, prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Return every key with its value; sections are opened, mappings are not."""
    for name, value in vars(section).items():
        if is_section(value):
            yield from leaves(value, f"{prefix}{name}.")
        else:
            yield f"{prefix}{name}", value


def to_flat_dict(config: Any) -> dict[str, Any]:
    """Return {"trainer.epochs": 1, ...} with values that JSON can hold. Mappings are opened; empty ones have no key."""
    return {key: value for leaf, content in leaves(config) for key, value in opened(leaf, content)}


def opened(key: str, value: Any) -> Iterator[tuple[str, Any]]:
    if isinstance(value, Mapping):
        for name, item in plain_copy(value).items():
            yield from opened(f"{key}.{name}", item)
    else:
        yield key, value


def differences(before: Any, after: Any) -> dict[str, tuple[Any, Any]]:
    """Return {key: (value before, value after)} of the keys that differ, from configurations or flat dictionaries."""
    old, new = (to_flat_dict(side) if is_section(side) else dict(side) for side in (before, after))
    pairs = {
        key: (old.get(key, ABSENT), new.get(key, ABSENT)) for key in [*old, *(key for key in new if key not in old)]
    }
    return {key: (a, b) for key, (a, b) in pairs.items() if a != b}


def to_yaml(config: Any) -> str:
    """Return the whole configuration as YAML, sections nested."""
    return OmegaConf.to_yaml(OmegaConf.create(nested(config)))


def nested(section: Any) -> dict[str, Any]:
    return {name: nested(value) if is_section(value) else plain_copy(value) for name, value in vars(section).items()}


def defaults_of(config: Any) -> dict[str, Any]:
    """Return the default of every key; one that follows another key ("${a.b}") has that key's value in `config`."""
    values = dict(leaves(config))
    defaults = {key: ROWS[key].default for key in values if key in ROWS} | dict(leaves(type(config)()))
    return {key: _followed(raw[2:-1], values) if is_interpolation(raw) else raw for key, raw in defaults.items()}


def _followed(key: str, values: Mapping[str, Any]) -> Any:
    return ROWS[key].default if key in ROWS and key not in values else values[key]
