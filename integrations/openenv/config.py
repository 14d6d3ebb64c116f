"""The options of `environment.openenv`: where environments' servers run, and how long to wait for them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields, is_dataclass
from typing import Any, Self

RUNTIMES = ("auto", "local", "docker", "url")
SECONDS = ("startup_timeout_s", "lease_timeout_s", "step_timeout_s", "idle_timeout_s", "episode_timeout_s")
NOT_OF_SERVERS = ("options", "env_names", "trust_dataset_code")


@dataclass
class OpenEnvConfig:
    """Options of OpenEnv environments: where their servers run, time limits, and what an unreadable action costs."""

    runtime: str = "auto"  # local, docker or url; auto: url if one is given, docker if it has the image, else local
    url: str | None = None  # of a running server, like http://host:8000
    max_sessions: int = 256  # episodes at once on one server; servers that take fewer are detected
    max_servers: int | None = None  # of one environment; None: by this machine's cores and memory
    startup_timeout_s: float = 60.0  # until a started server answers
    lease_timeout_s: float = 600.0  # for which an episode waits for a free session
    step_timeout_s: float = 30.0  # of one reset or step
    idle_timeout_s: float = 1800.0  # a session unused for this long is taken back
    episode_timeout_s: float = 3600.0  # from reset; then the session is taken back
    network: bool = False  # may containers of ours reach a network
    memory_gb: float = 2.0  # of one container
    cpus: float | None = None  # of one container; None: all but one of this machine's
    accept_unsafe: bool = False  # run programs unsandboxed on machines without any wall
    # servers outside the catalog that rows may name: folders, apps, images, addresses
    env_names: list[str] = field(default_factory=list)
    trust_dataset_code: bool = False  # let rows choose the code that runs: env_name, reward function, variables
    invalid_action_penalty: float = 0.0  # taken from the reward of a turn whose action cannot be read
    max_invalid_actions: int | None = None  # the next one ends the episode, unfinished; None: only the turns count
    options: dict[str, Any] = field(default_factory=dict)  # of the environment, unless the data set's row sets them

    def __post_init__(self) -> None:
        if self.runtime not in RUNTIMES:
            raise ValueError(f"openenv.runtime={self.runtime!r} must be one of {', '.join(RUNTIMES)}")
        if self.runtime == "url" and not self.url:
            raise ValueError("openenv.runtime='url' needs openenv.url, like http://127.0.0.1:8000")
        if self.runtime in ("local", "docker") and self.url:
            raise ValueError(f"openenv.url={self.url!r} has no effect with runtime={self.runtime!r}; use runtime='url'")
        for name in ("max_sessions", "max_servers"):
            number = getattr(self, name)
            if number is not None and number < 1:
                raise ValueError(f"openenv.{name}={number} must be at least 1")
        for name in (*SECONDS, "memory_gb", "cpus"):
            number = getattr(self, name)
            if number is not None and not number > 0:
                raise ValueError(f"openenv.{name}={number} must be positive")
        if self.max_invalid_actions is not None and self.max_invalid_actions < 0:
            raise ValueError(f"openenv.max_invalid_actions={self.max_invalid_actions} must not be negative")
        if not self.invalid_action_penalty >= 0:
            raise ValueError(f"openenv.invalid_action_penalty={self.invalid_action_penalty} must not be negative")

    def key(self) -> tuple[Any, ...]:
        """Return the values that concern servers: configurations with equal keys share their servers."""
        return tuple(value for name, value in asdict(self).items() if name not in NOT_OF_SERVERS)

    @classmethod
    def from_any(cls, config: Any) -> Self:
        """Make a configuration from an instance, a dataclass, a mapping, an OmegaConf node, or None (the defaults)."""
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
