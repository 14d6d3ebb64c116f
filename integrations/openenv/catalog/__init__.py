"""The environments that can be trained on, by name."""

from __future__ import annotations

from functools import cache

from integrations.openenv.catalog.coding import CodingEntry
from integrations.openenv.catalog.echo import EchoEntry
from integrations.openenv.catalog.entry import CatalogEntry, InvalidAction, Messages, Task
from integrations.openenv.catalog.generic import FORMS, ForeignName, GenericEntry, foreign_name

__all__ = ["CATALOG", "FORMS", "CatalogEntry", "InvalidAction", "Messages", "Task", "catalog_entry"]

CATALOG: dict[str, CatalogEntry] = {entry.name: entry for entry in (EchoEntry(), CodingEntry())}
NOT_YET = ("openspiel_env", "atari_env", "sumo_rl_env", "finrl_env")


def catalog_entry(name: str) -> CatalogEntry:
    """The entry called `name` (echo-env is echo_env), or the one of a server outside the catalog."""
    known = f"known: {', '.join(CATALOG)}; not yet: {', '.join(NOT_YET)}; or name {FORMS}"
    if not isinstance(name, str) or not name.strip():
        raise ValueError(f"env_name={name!r} must name an OpenEnv environment ({known})")
    foreign = foreign_name(name)
    if foreign is not None:
        return _generic_entry(foreign)
    spelled = name.strip().lower().replace("-", "_")
    if spelled in NOT_YET:
        raise ValueError(f"env_name={name!r} is not there yet ({known})")
    if spelled not in CATALOG:
        raise ValueError(f"unknown env_name={name!r} ({known})")
    return CATALOG[spelled]


@cache
def _generic_entry(foreign: ForeignName) -> GenericEntry:
    """One entry per server and process: it remembers what the server says of itself."""
    return GenericEntry(foreign)
