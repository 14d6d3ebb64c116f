"""Every name that SkyRL's documents and examples import is where they look for it, or the page says why not."""

from __future__ import annotations

import importlib
import re
from pathlib import Path

import pytest

PAGE = Path(__file__).parents[2] / "skyrl_train" / "SKYRL.md"
NAMES = {
    "skyrl_gym": "make register Env",
    "skyrl_gym.envs": "register deregister",
    "skyrl_gym.envs.base_text_env": "BaseTextEnv BaseTextEnvStepOutput ConversationType MessageType",
    "skyrl_gym.tools": "SQLCodeExecutorToolGroup SearchToolGroup PythonCodeExecutorToolGroup",
    "skyrl_gym.tools.core": "tool ToolGroup",
    "skyrl_gym.metrics": "default_aggregate_metrics aggregate_for_environment",
    "skyrl_train.entrypoints.main_base": (
        "BasePPOExp config_dir validate_cfg main skyrl_entrypoint create_ray_wrapped_inference_engines_from_config "
        "create_remote_inference_engines_from_config"
    ),
    "skyrl_train.entrypoints.main_generate": "EvalOnlyEntrypoint",
    "skyrl_train.utils": "initialize_ray validate_cfg Timer",
    "skyrl_train.utils.utils": "initialize_ray validate_cfg Timer",
    "skyrl_train.utils.callbacks": "TrainingCallback CallbackInput TrainingControl",
    "skyrl_train.utils.ppo_utils": (
        "AdvantageEstimatorRegistry PolicyLossRegistry BaseFunctionRegistry AdvantageEstimator PolicyLossType "
        "register_advantage_estimator register_policy_loss sync_registries reduce_loss masked_mean compute_approx_kl "
        "compute_advantages_and_returns"
    ),
    "skyrl_train.utils.trainer_utils": "ResumeMode",
    "skyrl_train.utils.tracking": "Tracking",
    "skyrl_train.trainer": "RayPPOTrainer",
    "skyrl_train.evaluate": "Evaluator",
    "skyrl_train.dataset": "PromptDataset",
    "skyrl_train.generators": (
        "GeneratorInterface GeneratorInput GeneratorOutput TrajectoryID BatchMetadata TrainingPhase"
    ),
    "skyrl_train.generators.base": "GeneratorInterface GeneratorInput GeneratorOutput TrajectoryID BatchMetadata",
    "skyrl_train.generators.skyrl_gym_generator": "SkyRLGymGenerator GeneratorInput GeneratorOutput",
    "skyrl_train.generators.utils": (
        "get_rollout_metrics get_response_ids_and_loss_mask_from_messages prepare_generator_input"
    ),
    "skyrl_train.inference_engines.base": "InferenceEngineInput InferenceEngineOutput ConversationType",
    "skyrl_train.inference_engines.inference_engine_client": "InferenceEngineClient",
    "skyrl_train.inference_engines.utils": "get_sampling_params_for_backend",
    "skyrl_train.config": (
        "SkyRLConfig SkyRLTrainConfig TrainerConfig GeneratorConfig AlgorithmConfig DataConfig EnvironmentConfig "
        "SkyRLGymConfig ModelConfig PolicyConfig CriticConfig RefConfig OptimizerConfig FSDPConfig PlacementConfig "
        "SamplingParams ChatTemplateConfig KLCtrlConfig SAPOConfig CISPOConfig ClipCovConfig KLCovConfig BaseConfig "
        "DynamicSamplingConfig OffPolicyCorrectionConfig FullyAsyncConfig SkyRLLoraConfig make_config "
        "get_config_as_dict get_config_as_yaml_str"
    ),
    "skyrl_train.config.utils": "get_default_config",
}
LEFT_OUT = (
    "skyrl_train.training_batch",
    "skyrl_train.distributed.dispatch",
    "skyrl_train.workers.worker",
    "skyrl_train.fully_async_trainer",
    "skyrl_train.env_vars",
)


@pytest.mark.parametrize("module", sorted(NAMES))
def test_the_names_are_there(module):
    found = importlib.import_module(module)
    assert [name for name in NAMES[module].split() if not hasattr(found, name)] == []


def test_the_page_names_every_path_and_what_is_left_out():
    text = PAGE.read_text()
    missing = [module for module in [*NAMES, *LEFT_OUT] if f"`{module}`" not in text]
    assert missing == []


@pytest.mark.parametrize("module", LEFT_OUT)
def test_what_is_left_out_is_not_there(module):
    with pytest.raises(ModuleNotFoundError):
        importlib.import_module(module)


def test_a_maker_of_skyrls_engines_says_what_to_override_when_it_is_called():
    from skyrl_train.entrypoints import main_base

    with pytest.raises(NotImplementedError, match=r"override get_engine\(policy\) instead"):
        main_base.create_remote_inference_engines_from_config(None, tokenizer=None)
    with pytest.raises(AttributeError, match="has no attribute 'nothing'"):
        _ = main_base.nothing


def test_each_test_that_the_page_names_is_there():
    tests = PAGE.parents[1] / "tests"
    named = re.findall(r"`(test_\w+\.py)::(test_\w+)`", PAGE.read_text())
    assert len(named) == 16
    for file, name in named:
        assert any(f"def {name}(" in path.read_text() for path in tests.rglob(file)), f"{file}::{name}"
