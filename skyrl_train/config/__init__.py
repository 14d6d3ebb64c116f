"""Every option once: dataclasses with type, default, meaning and rule, and the functions that load and check them."""

from skyrl_train.config.algorithm import ADVANTAGE_ESTIMATORS, POLICY_LOSSES, AlgorithmConfig
from skyrl_train.config.data import DataConfig
from skyrl_train.config.environment import EnvironmentConfig, EnvSettings, SkyRLGymConfig, env_config_for
from skyrl_train.config.generator import ChatTemplateConfig, EvalSamplingConfig, GeneratorConfig, SamplingConfig
from skyrl_train.config.load import load_config, validate_cfg
from skyrl_train.config.models import LoraConfig, ModelConfig, OptimizerConfig, PolicyConfig, RefConfig
from skyrl_train.config.root import SkyRLConfig
from skyrl_train.config.section import ConfigError, Problem, Section
from skyrl_train.config.trainer import TrainerConfig
from skyrl_train.config.tree import differences, to_flat_dict, to_yaml
from skyrl_train.config.utils import config_dir, get_default_config

__all__ = [
    "ADVANTAGE_ESTIMATORS",
    "POLICY_LOSSES",
    "AlgorithmConfig",
    "ChatTemplateConfig",
    "ConfigError",
    "DataConfig",
    "EnvSettings",
    "EnvironmentConfig",
    "EvalSamplingConfig",
    "GeneratorConfig",
    "LoraConfig",
    "ModelConfig",
    "OptimizerConfig",
    "PolicyConfig",
    "Problem",
    "RefConfig",
    "SamplingConfig",
    "Section",
    "SkyRLConfig",
    "SkyRLGymConfig",
    "TrainerConfig",
    "config_dir",
    "differences",
    "env_config_for",
    "get_default_config",
    "load_config",
    "to_flat_dict",
    "to_yaml",
    "validate_cfg",
]
