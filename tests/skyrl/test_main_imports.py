"""What the sixteen example mains of the last old SkyRL import is there; four need what is left out on purpose.

With each main stand the modules of its folder that it imports.
"""

from __future__ import annotations

from importlib import import_module

import pytest

BASE = "skyrl_train.entrypoints.main_base:BasePPOExp,config_dir,validate_cfg skyrl_train.utils:initialize_ray"
HARBOR = "skyrl_train.entrypoints.main_base:BasePPOExp,config_dir skyrl_train.utils:validate_cfg "
HARBOR += "skyrl_train.utils.utils:initialize_ray"
TRAINER = "skyrl_train.trainer:RayPPOTrainer skyrl_train.generators.base:GeneratorOutput"
REGISTER = "skyrl_gym.envs:register"
GENERATORS = "skyrl_train.generators.base:GeneratorInterface,GeneratorInput,GeneratorOutput,TrajectoryID "
GENERATORS += "skyrl_train.generators.utils:get_rollout_metrics,get_response_ids_and_loss_mask_from_messages "
GENERATORS += "skyrl_train.inference_engines.base:ConversationType"
LIMITER = "skyrl_train.utils.rate_limiter:create_rate_limiter"
ENV = "skyrl_gym.envs.base_text_env:BaseTextEnv,BaseTextEnvStepOutput,ConversationType"
CLIENT = "skyrl_train.inference_engines.inference_engine_client:InferenceEngineClient"
MAINS = {
    "main_custom_adv_est": f"{BASE} skyrl_train.utils.ppo_utils:AdvantageEstimatorRegistry",
    "main_custom_policy_loss": f"{BASE} skyrl_train.config:SkyRLConfig skyrl_train.utils.ppo_utils:PolicyLossRegistry",
    "main_dapo": f"{BASE} {TRAINER}",
    "main_harbor": f"{HARBOR} {GENERATORS} {CLIENT} {LIMITER}",
    "main_harbor_generate": f"{HARBOR} {GENERATORS} {CLIENT} {LIMITER}",
    "main_llm_judge": f"{BASE} {REGISTER} {ENV}",
    "main_mini_swe": (
        f"{BASE} {GENERATORS} {CLIENT} skyrl_train.config:GeneratorConfig,SkyRLGymConfig "
        "skyrl_train.generators.skyrl_gym_generator:SkyRLGymGenerator,GeneratorOutput,GeneratorInput "
        "skyrl_train.generators.base:TrainingPhase,BatchMetadata "
        "skyrl_train.inference_engines.utils:get_sampling_params_for_backend"
    ),
    "main_multiply": f"{BASE} {REGISTER} {ENV}",
    "main_tis_dapo": f"{BASE} {TRAINER}",
    "modal/main": "",
    "main_openenv": f"{BASE} {REGISTER} {ENV}",
    "main_verifiers": f"{BASE} skyrl_train.config:SkyRLConfig,GeneratorConfig {CLIENT} {GENERATORS}",
}
LEFT_OUT = {
    "main_async": "skyrl_train.training_batch:TrainingInputBatch",
    "main_dapo_flashrl": "skyrl_train.inference_engines.base:InferenceEngineInterface",
    "main_fully_async": "skyrl_train.fully_async_trainer:FullyAsyncRayPPOTrainer",
    "main_on_policy_distill": "skyrl_train.training_batch:TrainingInputBatch",
}


def missing(imports: str) -> list[str]:
    found = []
    for text in imports.split():
        module, _, names = text.partition(":")
        try:
            there = import_module(module)
        except ModuleNotFoundError:
            found.append(text)
            continue
        found += [f"{module}:{name}" for name in names.split(",") if not hasattr(there, name)]
    return found


@pytest.mark.parametrize("main", MAINS)
def test_a_main_finds_all_that_it_imports(main):
    assert missing(MAINS[main]) == []


@pytest.mark.parametrize("main", LEFT_OUT)
def test_a_main_that_needs_internals_is_told_what_to_use(main):
    module, _, name = LEFT_OUT[main].partition(":")
    with pytest.raises(ImportError, match="is left out here: "):
        getattr(import_module(module), name)


def test_they_are_sixteen():
    assert len(MAINS) + len(LEFT_OUT) == 16
