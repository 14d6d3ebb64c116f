"""`python -m integrations.openenv.entrypoints.main_openenv [--env ENV] key=value ...`: train in OpenEnv environments.

With --env the keys of recipe.py come first. It adds to `skyrl_train.entrypoints.main_base` the environment "openenv",
its section of the configuration, and the shutdown of the environments' servers.
"""

from __future__ import annotations

import asyncio
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field

from integrations.openenv.client.errors import OpenEnvError
from integrations.openenv.config import OpenEnvConfig
from integrations.openenv.env import OpenEnv, register_openenv
from integrations.openenv.hosting.launch import preflight
from integrations.openenv.pool.server_pool import close_shared_pools, num_server_restarts
from integrations.openenv.recipe import with_recipe
from skyrl_train.config import EnvironmentConfig, SkyRLConfig
from skyrl_train.entrypoints import main_base
from skyrl_train.entrypoints.main_base import BasePPOExp
from skyrl_train.signals import ends_when_asked
from skyrl_train.visible import say


@dataclass
class OpenEnvEnvironmentConfig(EnvironmentConfig):
    """The section `environment` with the options of OpenEnv environments in `openenv`."""

    env_class: str = "openenv"
    openenv: OpenEnvConfig = field(default_factory=OpenEnvConfig)


@dataclass
class OpenEnvRunConfig(SkyRLConfig):
    """SkyRL's configuration with `environment.openenv`."""

    environment: OpenEnvEnvironmentConfig = field(default_factory=OpenEnvEnvironmentConfig)  # ty: ignore[incompatible-mutable-override]


class OpenEnvExp(BasePPOExp):
    """SkyRL's experiment in OpenEnv environments; it stops their servers at its end."""

    def __init__(self, cfg: OpenEnvRunConfig) -> None:
        super().__init__(cfg)
        self._preflight(cfg)

    def _preflight(self, cfg: OpenEnvRunConfig) -> None:
        """Check, before the model is loaded, that the data sets' environments accept their options and can be served.

        ValueError says what is missing.
        """
        config = cfg.environment.openenv
        envs: dict[tuple[str, str], OpenEnv] = {}
        for prompt in [*(self.train_dataset or ()), *(self.eval_dataset or ())]:
            extras = prompt.env_extras
            kind = (str(extras.get("env_name")), str(extras.get("options")))
            if prompt.env_class == "openenv" and kind not in envs:
                envs[kind] = OpenEnv(config, {"max_turns": cfg.generator.max_turns, **extras})
        sources = dict.fromkeys(env.entry.source(env.options) for env in envs.values())
        try:
            asyncio.run(preflight(sources, config))
        except OpenEnvError as missing:
            raise ValueError(str(missing)) from missing

    def extra_metrics(self) -> dict[str, float]:
        return {"environment/num_server_restarts": float(num_server_restarts())}

    async def close(self) -> None:
        await close_shared_pools()


EXPERIMENT, ROOT = OpenEnvExp, OpenEnvRunConfig


def main(words: Sequence[str] | None = None) -> int:
    """Train, and return the exit status."""
    words = sys.argv[1:] if words is None else words
    register_openenv()
    try:
        keys = with_recipe(words)
    except (ValueError, OpenEnvError) as refused:
        say(f"refused: {refused}")
        return main_base.Exit.REFUSED
    return main_base.main(keys, experiment=OpenEnvExp, root=OpenEnvRunConfig)


if __name__ == "__main__":
    sys.exit(ends_when_asked(main))
