"""The catalog: the environments that can be trained on, by name."""

from __future__ import annotations

from difflib import get_close_matches
from functools import cache

from integrations.openenv.catalog.atari import AtariEntry
from integrations.openenv.catalog.coding import CodingEntry
from integrations.openenv.catalog.echo import EchoEntry
from integrations.openenv.catalog.entry import CatalogEntry, InvalidAction, Messages, Task
from integrations.openenv.catalog.finrl import FinRLEntry
from integrations.openenv.catalog.generic import FORMS, ForeignName, GenericEntry, foreign_name
from integrations.openenv.catalog.openspiel import OpenSpielEntry
from integrations.openenv.catalog.sumo_rl import SumoEntry

__all__ = ["CATALOG", "FORMS", "CatalogEntry", "InvalidAction", "Messages", "Task", "catalog_entry"]

_ENTRIES: tuple[CatalogEntry, ...] = (
    EchoEntry(),
    CodingEntry(),
    OpenSpielEntry(),
    AtariEntry(),
    SumoEntry(),
    FinRLEntry(),
)
CATALOG: dict[str, CatalogEntry] = {entry.name: entry for entry in _ENTRIES}


def catalog_entry(name: str) -> CatalogEntry:
    """Return the entry called `name` (echo-env means echo_env), or one for a server outside the catalog.

    ValueError: the name is neither an environment of the catalog nor in one of FORMS.
    """
    known = f"known: {', '.join(CATALOG)}; or name {FORMS}"
    if not isinstance(name, str) or not name.strip():
        raise ValueError(f"env_name={name!r} must name an OpenEnv environment ({known})")
    foreign = foreign_name(name)
    if foreign is not None:
        return _generic_entry(foreign)
    spelled = name.strip().lower().replace("-", "_")
    if spelled not in CATALOG:
        near = get_close_matches(spelled, CATALOG, n=1)
        raise ValueError(f"unknown env_name={name!r}{f'; did you mean {near[0]}?' if near else ''} ({known})")
    return CATALOG[spelled]


@cache
def _generic_entry(foreign: ForeignName) -> GenericEntry:
    """Return the one entry of a server in this process, which keeps the server's description of itself."""
    return GenericEntry(foreign)
