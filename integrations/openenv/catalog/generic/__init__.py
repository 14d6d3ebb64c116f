"""Entries for OpenEnv servers outside the catalog, made from what the server says of itself.

names.py (meaning of env_name) -> description.py (the server's schemas) -> actions.py, tools.py (text to action)
-> observation.py (observation to text) -> entry.py (all of it, as an entry of the catalog)
"""

from integrations.openenv.catalog.generic.entry import GenericEntry, GenericOptions
from integrations.openenv.catalog.generic.names import FORMS, ForeignName, foreign_name

__all__ = ["FORMS", "ForeignName", "GenericEntry", "GenericOptions", "foreign_name"]
