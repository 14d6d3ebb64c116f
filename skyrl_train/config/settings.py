"""Settings that are not fields of a section: those of an environment."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from omegaconf import DictConfig, OmegaConf

from skyrl_train.config.section import is_section


class EnvSettings(dict[str, Any]):
    """A mapping read as settings["topk"] or as settings.topk. An environment's constructor gets it as env_config."""

    def __getattr__(self, name: str) -> Any:
        if name in self:
            return self[name]
        raise AttributeError(f"there is no setting {name!r}; it has {sorted(self)}")


def as_settings(value: Any) -> Any:
    """Return a section or mapping as EnvSettings, nested ones included."""
    value = vars(value) if is_section(value) else plain_copy(value)
    if isinstance(value, dict):
        return EnvSettings({key: as_settings(item) for key, item in value.items()})
    return value


def plain_copy(value: Any) -> Any:
    """Return mappings as plain dictionaries, nested ones included: OmegaConf accepts no subclass."""
    if isinstance(value, DictConfig):
        return OmegaConf.to_container(value, resolve=True)
    return {name: plain_copy(item) for name, item in value.items()} if isinstance(value, Mapping) else value
