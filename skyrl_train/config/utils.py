"""Entry points for Hydra users, as in SkyRL: the default configuration, and a folder for @hydra.main."""

from __future__ import annotations

import copy
from pathlib import Path

from hydra.core.config_store import ConfigStore
from omegaconf import DictConfig, OmegaConf

from skyrl_train.config.root import SkyRLConfig
from skyrl_train.config.typed import typed_defaults

# @hydra.main(config_path=config_dir, config_name="ppo_base_config", version_base=None): the folder holds no YAML,
# Hydra finds the tree in its ConfigStore.
config_dir = str(Path(__file__).parent)
# As plain nodes, so that Hydra lets +my.key=value pass; `validate_cfg` checks types, too. The refused keys are there:
# Hydra would refuse to set what it does not know, and say nothing of the reason.
ConfigStore.instance().store(
    name="ppo_base_config", node=OmegaConf.to_container(typed_defaults(SkyRLConfig), resolve=False)
)


def get_default_config() -> DictConfig:
    """Return the defaults as a DictConfig that checks types."""
    return copy.deepcopy(typed_defaults(SkyRLConfig))
