"""Settings that are not fields of a section: those of an environment, and keys of the user's own."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from skyrl_train.config.section import is_section


class EnvSettings(dict[str, Any]):
    """A mapping read as settings["topk"] or as settings.topk. An environment's constructor gets it as env_config."""

    def __getattr__(self, name: str) -> Any:
        if name in self:
            return self[name]
        raise AttributeError(f"there is no setting {name!r}; it has {sorted(self)}")


def as_settings(value: Any) -> Any:
    """Return a section or mapping as EnvSettings, nested ones included."""
    if is_section(value):
        value = vars(value)
    if isinstance(value, dict):
        return EnvSettings({key: as_settings(item) for key, item in value.items()})
    return value


def plain_copy(value: Any) -> Any:
    """Return mappings as plain dictionaries, nested ones included: OmegaConf accepts no subclass."""
    return {name: plain_copy(item) for name, item in value.items()} if isinstance(value, Mapping) else value
