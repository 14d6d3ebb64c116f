"""The run of a watched model: it plays the tasks of the evaluation, with the turns and the rewards of the run."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from integrations.openenv.catalog import catalog_entry
from skyrl_train.commands.sources import Source, configuration
from skyrl_train.config import SkyRLConfig
from skyrl_train.files import user_path
from skyrl_train.prompts import DataError, read_source
from skyrl_train.visible import say

PlacedRow = tuple[str, dict[str, Any]]  # a row of a data set, after its place for messages
OPENENV = "openenv"  # the env_class of every OpenEnv environment


@dataclass(frozen=True)
class WatchedRun:
    """The settings of a run and the rows of its validation data; none of these if the files are not here."""

    cfg: Any  # OpenEnvRunConfig, if OpenEnv is among the environments
    rows: list[PlacedRow]

    @classmethod
    def of(cls, source: Source) -> WatchedRun:
        """Return what the run of a model left. The source names its environment."""
        cfg: SkyRLConfig = configuration(source)
        sources = cfg.data.val_data or ()
        if missing := [one for one in sources if not user_path(one).is_file()]:
            say(f"the run's validation data is not here ({', '.join(missing)}), so tasks are made up")
            return cls(cfg, [])
        return cls(cfg, [row for one in sources for row in read_source(one)])

    def rows_of(self, name: str) -> list[PlacedRow]:
        """Return the rows of the environment with this name."""
        return [placed for placed in self.rows if same(self._environment(placed), name)]

    def environment_at(self, seed: int) -> str:
        """Return the name of the environment that the seed's row is of. ValueError if the run does not say it."""
        if self.rows:
            return self._environment(self.rows[seed % len(self.rows)])
        if self.cfg.environment.env_class != OPENENV:
            return self.cfg.environment.env_class
        raise ValueError("the run does not say in which environment it was trained: skyrl play ENV --model ...")

    def _environment(self, placed: PlacedRow) -> str:
        place, row = placed
        name = row.get("env_class") or self.cfg.environment.env_class
        name = row.get("env_name") if name == OPENENV else name
        if not isinstance(name, str):
            raise DataError(f"{place}: the name of an environment must be a text, got {name!r}")
        return name


def same(one: str, other: str) -> bool:
    """Return whether both name one environment: echo-env is echo_env, and a folder is known by its own name."""
    if one == other:
        return True
    try:
        return catalog_entry(one).seed_name == catalog_entry(other).seed_name
    except ValueError:  # of skyrl_gym, not of OpenEnv
        return False
