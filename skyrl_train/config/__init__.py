"""Hold every option once, as dataclasses with type, default, meaning and rule; load and check them."""

from skyrl_train.config.algorithm import (
    ADVANTAGE_ESTIMATORS,
    POLICY_LOSSES,
    AlgorithmConfig,
    CISPOConfig,
    ClipCovConfig,
    DPPOConfig,
    DynamicSamplingConfig,
    KLCovConfig,
    KLCtrlConfig,
    OffPolicyCorrectionConfig,
    OverlongPenaltyConfig,
    SAPOConfig,
)
from skyrl_train.config.critic import CriticConfig
from skyrl_train.config.data import DataConfig
from skyrl_train.config.environment import EnvironmentConfig, EnvSettings, SkyRLGymConfig, env_config_for
from skyrl_train.config.generator import ChatTemplateConfig, EvalSamplingConfig, GeneratorConfig, SamplingConfig
from skyrl_train.config.load import is_resolved, load_config, validate_cfg
from skyrl_train.config.models import (
    FSDPConfig,
    LoraConfig,
    ModelConfig,
    OptimizerConfig,
    PolicyConfig,
    RefConfig,
)
from skyrl_train.config.placement import PlacementConfig
from skyrl_train.config.problems import ConfigError, Problem
from skyrl_train.config.root import SkyRLConfig
from skyrl_train.config.section import Section
from skyrl_train.config.settings import as_settings
from skyrl_train.config.sft import SFTConfig
from skyrl_train.config.skyrl_names import (
    BaseConfig,
    FullyAsyncConfig,
    SamplingParams,
    SkyRLLoraConfig,
    SkyRLTrainConfig,
    get_config_as_dict,
    get_config_as_yaml_str,
    make_config,
)
from skyrl_train.config.trainer import TrainerConfig
from skyrl_train.config.tree import differences, to_flat_dict, to_yaml
from skyrl_train.config.utils import config_dir, get_default_config

__all__ = [
    "ADVANTAGE_ESTIMATORS",
    "POLICY_LOSSES",
    "AlgorithmConfig",
    "BaseConfig",
    "CISPOConfig",
    "ChatTemplateConfig",
    "ClipCovConfig",
    "ConfigError",
    "CriticConfig",
    "DPPOConfig",
    "DataConfig",
    "DynamicSamplingConfig",
    "EnvSettings",
    "EnvironmentConfig",
    "EvalSamplingConfig",
    "FSDPConfig",
    "FullyAsyncConfig",
    "GeneratorConfig",
    "KLCovConfig",
    "KLCtrlConfig",
    "LoraConfig",
    "ModelConfig",
    "OffPolicyCorrectionConfig",
    "OptimizerConfig",
    "OverlongPenaltyConfig",
    "PlacementConfig",
    "PolicyConfig",
    "Problem",
    "RefConfig",
    "SAPOConfig",
    "SFTConfig",
    "SamplingConfig",
    "SamplingParams",
    "Section",
    "SkyRLConfig",
    "SkyRLGymConfig",
    "SkyRLLoraConfig",
    "SkyRLTrainConfig",
    "TrainerConfig",
    "as_settings",
    "config_dir",
    "differences",
    "env_config_for",
    "get_config_as_dict",
    "get_config_as_yaml_str",
    "get_default_config",
    "is_resolved",
    "load_config",
    "make_config",
    "to_flat_dict",
    "to_yaml",
    "validate_cfg",
]
