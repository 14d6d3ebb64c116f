"""The environments that can be trained on, by name."""

from __future__ import annotations

from integrations.openenv.catalog.coding import CodingEntry
from integrations.openenv.catalog.echo import EchoEntry
from integrations.openenv.catalog.entry import CatalogEntry, InvalidAction, Messages, Task
from integrations.openenv.catalog.finrl import FinRLEntry

__all__ = ["CATALOG", "CatalogEntry", "InvalidAction", "Messages", "Task", "catalog_entry"]

CATALOG: dict[str, CatalogEntry] = {entry.name: entry for entry in (EchoEntry(), CodingEntry(), FinRLEntry())}
NOT_YET = ("openspiel_env", "atari_env", "sumo_rl_env")


def catalog_entry(name: str) -> CatalogEntry:
    """The entry called `name`; echo-env is echo_env."""
    known = f"known: {', '.join(CATALOG)}; not yet: {', '.join(NOT_YET)}"
    if not isinstance(name, str) or not name:
        raise ValueError(f"env_name={name!r} must name an OpenEnv environment ({known})")
    spelled = name.strip().lower().replace("-", "_")
    if spelled in NOT_YET:
        raise ValueError(f"env_name={name!r} is not there yet ({known})")
    if spelled not in CATALOG:
        raise ValueError(f"unknown env_name={name!r} ({known})")
    return CATALOG[spelled]
