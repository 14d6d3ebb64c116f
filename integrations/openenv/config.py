"""The options of `environment.openenv`: where the environments' servers run, and how long to wait for them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields, is_dataclass
from typing import Any, Self

RUNTIMES = ("auto", "local", "url")


@dataclass
class OpenEnvConfig:
    """Where the environments' servers run, and how long to wait for them."""

    runtime: str = "auto"  # "local": servers of our own, started when needed; "url": yours; "auto": url if one is given
    url: str | None = None  # of a running server, like http://host:8000
    max_sessions: int = 256  # episodes at once on one server
    startup_timeout_s: float = 60.0  # until a started server answers, or a full one has a free slot
    step_timeout_s: float = 30.0  # of one reset or step
    invalid_action_penalty: float = 0.0  # taken from the reward of a turn whose action cannot be read
    options: dict[str, Any] = field(default_factory=dict)  # of the environment, where the data set's row says nothing

    def __post_init__(self) -> None:
        if self.runtime == "docker":
            raise ValueError(
                "openenv.runtime='docker' is not there yet: start a container yourself "
                "(EchoEnv.from_docker_image, or docker run -p 127.0.0.1:8000:8000 IMAGE) and give its url"
            )
        if self.runtime not in RUNTIMES:
            raise ValueError(f"openenv.runtime={self.runtime!r} must be one of {', '.join(RUNTIMES)}")
        if self.runtime == "url" and not self.url:
            raise ValueError("openenv.runtime='url' needs openenv.url, like http://127.0.0.1:8000")
        if self.runtime == "local" and self.url:
            raise ValueError(f"openenv.url={self.url!r} has no effect with runtime='local'; use runtime='url'")
        if self.max_sessions < 1:
            raise ValueError(f"openenv.max_sessions={self.max_sessions} must be at least 1")
        for name in ("startup_timeout_s", "step_timeout_s"):
            if not getattr(self, name) > 0:
                raise ValueError(f"openenv.{name}={getattr(self, name)} must be positive")
        if not self.invalid_action_penalty >= 0:
            raise ValueError(f"openenv.invalid_action_penalty={self.invalid_action_penalty} must not be negative")

    @property
    def uses_url(self) -> bool:
        return self.runtime == "url" or (self.runtime == "auto" and self.url is not None)

    def key(self) -> tuple[Any, ...]:
        """Equal configurations share their servers."""
        return tuple(value for name, value in asdict(self).items() if name != "options")

    @classmethod
    def from_any(cls, config: Any) -> Self:
        """From an instance, a mapping, an OmegaConf node, or nothing."""
        if isinstance(config, cls):
            return config
        if config is None:
            return cls()
        if is_dataclass(config) and not isinstance(config, type):
            config = asdict(config)
        if not isinstance(config, Mapping) and not hasattr(config, "items"):
            raise TypeError(f"env_config={config!r} must be an OpenEnvConfig or a mapping of its fields")
        values = dict(config.items())
        known = [field.name for field in fields(cls)]
        unknown = sorted(set(values) - set(known))
        if unknown:
            raise ValueError(f"unknown openenv option(s) {', '.join(unknown)}; there are {', '.join(known)}")
        return cls(**values)
