"""The rule that a data set's row may not decide by itself which code runs.

A row names its environment and options. Those of the catalog are this package's own code. A folder, an app, an image or
an address outside it, a reward function and a server's variables run code or reach servers chosen by whoever made the
data set, so the configuration must name them too.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from integrations.openenv.catalog import CATALOG, CatalogEntry, catalog_entry
from integrations.openenv.config import OpenEnvConfig

SWITCH = "environment.openenv.trust_dataset_code=true trusts all that the data set names"


def require_trusted(config: OpenEnvConfig, entry: CatalogEntry, row_options: Mapping[str, Any]) -> None:
    """Raise ValueError, with what to type, if the row chooses code that the configuration does not name."""
    if config.trust_dataset_code:
        return
    if entry.name not in CATALOG and entry.name not in _named(config):
        raise ValueError(
            f"the data set's row names env_name={entry.name!r}, a server outside the catalog, and the configuration "
            f"does not: environment.openenv.env_names=['{entry.name}'] allows it; {SWITCH}"
        )
    for name in sorted(entry.code_options & row_options.keys()):
        value = row_options[name]
        if value and value != config.options.get(name):
            raise ValueError(
                f"{entry.name}: the data set's row sets the option {name}={value!r}, which decides what code runs, and "
                f"the configuration does not: environment.openenv.options.{name}={_typed(value)} allows it; {SWITCH}"
            )


def _named(config: OpenEnvConfig) -> set[str]:
    names = [*config.env_names, *([config.url] if config.url else [])]
    return {catalog_entry(name).name for name in names}


def _typed(value: Any) -> str:
    """Return the value as it is written for Hydra on a command line."""
    return value if isinstance(value, str) else json.dumps(value).replace('"', "")
