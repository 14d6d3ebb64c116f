"""The ways in that SkyRL's users know: @hydra.main with config_dir, DictConfig, get_default_config, to_object."""

from __future__ import annotations

import subprocess
import sys

import pytest
from hydra import compose, initialize_config_dir
from omegaconf import OmegaConf

from skyrl_train.config import (
    ConfigError,
    SkyRLConfig,
    config_dir,
    env_config_for,
    get_default_config,
    load_config,
    validate_cfg,
)

SCRIPT = """
import hydra
from omegaconf import DictConfig
from skyrl_train.config import config_dir, env_config_for, validate_cfg

@hydra.main(config_path=config_dir, config_name="ppo_base_config", version_base=None)
def main(cfg: DictConfig) -> None:
    config = validate_cfg(cfg)
    print(cfg.generator.max_input_length, config.trainer.epochs, env_config_for(config.environment, "mine"))

if __name__ == "__main__":
    main()
"""


def test_a_users_own_hydra_main_works(tmp_path):
    script = tmp_path / "script.py"
    script.write_text(SCRIPT)
    overrides = ["trainer.epochs=3", "trainer.max_prompt_length=99", "+environment.skyrl_gym.mine.x=1"]
    run = subprocess.run(
        [sys.executable, str(script), *overrides, f"hydra.run.dir={tmp_path}"],
        capture_output=True,
        text=True,
        check=False,
    )
    assert run.stdout == "99 3 {'x': 1}\n", run.stderr


def test_what_hydra_composes_becomes_the_same_tree():
    overrides = ["trainer.seed=7", "trainer.policy.model.path=/m"]
    with initialize_config_dir(config_dir, version_base=None):
        composed = compose("ppo_base_config", overrides=overrides)
    assert SkyRLConfig.from_dict_config(composed) == load_config(overrides) == validate_cfg(composed)


def test_the_default_config_can_be_edited_and_validated():
    cfg = get_default_config()
    cfg.trainer.policy.model.path = "/m"
    assert cfg.trainer.ref.model.path == "/m"
    assert validate_cfg(cfg).trainer.ref.model.path == "/m"
    cfg.generator.backend = "sglang"
    with pytest.raises(ConfigError, match=r"backend=sglang"):
        validate_cfg(cfg)


def test_to_object_gives_the_typed_tree_and_runs_the_rules():
    cfg = get_default_config()
    assert OmegaConf.to_object(cfg) == load_config([])
    cfg.trainer.epochs = 0
    with pytest.raises(ConfigError, match="epochs=0 must be at least 1"):
        OmegaConf.to_object(cfg)


def test_a_plain_dict_config_may_leave_keys_out_but_not_invent_them():
    plain = OmegaConf.create({"trainer": {"epochs": 2}, "environment": {"skyrl_gym": {"mine": {"x": 1}}}})
    config = SkyRLConfig.from_dict_config(plain)
    assert config.trainer.epochs == 2
    assert env_config_for(config.environment, "mine").x == 1
    with pytest.raises(ValueError, match=r"trainer.epoch is not a key .* did you mean trainer.epochs"):
        SkyRLConfig.from_dict_config(OmegaConf.create({"trainer": {"epoch": 2}}))
