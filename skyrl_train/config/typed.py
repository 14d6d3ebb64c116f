"""The tree as OmegaConf holds it: every section with its types, and SkyRL's refused keys where they stand in SkyRL."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from dataclasses import field, make_dataclass
from functools import cache, partial
from typing import Any

from omegaconf import DictConfig, OmegaConf, open_dict
from omegaconf.errors import OmegaConfBaseException

from skyrl_train.config.problems import Problem
from skyrl_train.config.refused_rows import ROWS
from skyrl_train.config.section import is_interpolation, refusal


@cache
def typed_defaults(root: type) -> DictConfig:
    """Return the defaults of a root class. Copy before you change it; a copy takes a seventh of the time."""
    tree = OmegaConf.structured(root)
    for key, node in _nodes():
        parent, _, name = key.rpartition(".")
        section = _section(tree, parent)
        if name not in section:  # a subclass may have made a field of a refused key
            with open_dict(section):
                section[name] = node
    return tree


def _nodes() -> Iterator[tuple[str, Any]]:
    """Return each refused key with a node of OmegaConf that converts and checks values of the key's type."""
    rows = [
        (f"row{number}", row.type, field(default_factory=partial(copy.copy, row.default)))
        for number, row in enumerate(ROWS.values())
    ]
    nodes = OmegaConf.structured(make_dataclass("Rows", rows))
    return ((key, nodes._get_node(name)) for key, name in zip(ROWS, nodes, strict=True))


def _section(tree: DictConfig, key: str) -> DictConfig:
    """Return the section at this key; create it if all of its keys are refused."""
    section = tree
    for name in key.split("."):
        if name not in section:
            with open_dict(section):
                section[name] = {}
            OmegaConf.set_struct(section[name], True)
        section = section[name]
    return section


def changed_rows(tree: DictConfig, defaults: Any) -> Iterator[Problem]:
    """Return a problem for each refused key that has not its default, or whose value cannot be resolved.

    defaults: an instance of the root class; a key that is a field there is checked with the other fields.
    """
    for key, row in ROWS.items():
        if _is_field(defaults, key):
            continue
        try:
            value, default = _plain(tree, key), row.default
        except OmegaConfBaseException as error:
            reason = str(error).splitlines()[0]
            yield Problem(key, _text(tree, key), f"cannot be resolved: {reason}")
            continue
        if is_interpolation(default):
            default = _plain(tree, default[2:-1])
        if value != default:
            yield refusal(key, value)


def followed_rows(tree: DictConfig, defaults: Any) -> Iterator[tuple[str, Any]]:
    """Return each refused key that follows another key, with the value of that one; the tree has no problems."""
    for key, row in ROWS.items():
        if is_interpolation(row.default) and not _is_field(defaults, key):
            yield key, _plain(tree, key)


def _is_field(section: Any, key: str) -> bool:
    *parents, name = key.split(".")
    for parent in parents:
        section = vars(section).get(parent)
        if section is None or not hasattr(section, "__dict__"):
            return False
    return name in vars(section)


def _plain(tree: DictConfig, key: str) -> Any:
    value = OmegaConf.select(tree, key, throw_on_missing=True)
    return OmegaConf.to_container(value, resolve=True) if OmegaConf.is_config(value) else value


def _text(tree: DictConfig, key: str) -> Any:
    """Return the value with interpolations unresolved."""
    parent, _, name = key.rpartition(".")
    section: Any = OmegaConf.to_container(OmegaConf.select(tree, parent), resolve=False)
    return section[name]
