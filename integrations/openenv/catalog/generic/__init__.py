"""Any OpenEnv server outside the catalog, by what it says of itself.

names.py (what env_name names) -> description.py (what the server says) -> actions.py, tools.py (how a model acts)
-> observation.py (what it reads) -> entry.py (all of it, as an entry of the catalog)
"""

from integrations.openenv.catalog.generic.entry import GenericEntry, GenericOptions
from integrations.openenv.catalog.generic.names import FORMS, ForeignName, foreign_name

__all__ = ["FORMS", "ForeignName", "GenericEntry", "GenericOptions", "foreign_name"]
