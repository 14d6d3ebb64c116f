"""What the sixteen example mains of the last old SkyRL import is there; three need what is left out on purpose."""

from __future__ import annotations

from importlib import import_module

import pytest

BASE = "skyrl_train.entrypoints.main_base:BasePPOExp,config_dir,validate_cfg skyrl_train.utils:initialize_ray"
HARBOR = "skyrl_train.entrypoints.main_base:BasePPOExp,config_dir skyrl_train.utils:validate_cfg "
HARBOR += "skyrl_train.utils.utils:initialize_ray"
TRAINER = "skyrl_train.trainer:RayPPOTrainer skyrl_train.generators.base:GeneratorOutput"
REGISTER = "skyrl_gym.envs:register"
CLIENT = "skyrl_train.inference_engines.inference_engine_client:InferenceEngineClient"
MAINS = {
    "main_custom_adv_est": f"{BASE} skyrl_train.utils.ppo_utils:AdvantageEstimatorRegistry",
    "main_custom_policy_loss": f"{BASE} skyrl_train.config:SkyRLConfig skyrl_train.utils.ppo_utils:PolicyLossRegistry",
    "main_dapo": f"{BASE} {TRAINER}",
    "main_async": BASE,
    "main_harbor": HARBOR,
    "main_harbor_generate": f"{HARBOR} skyrl_train.generators.base:GeneratorInput,TrajectoryID",
    "main_llm_judge": f"{BASE} {REGISTER}",
    "main_mini_swe": BASE,
    "main_multiply": f"{BASE} {REGISTER}",
    "main_tis_dapo": f"{BASE} {TRAINER}",
    "modal/main": "",
    "main_openenv": f"{BASE} {REGISTER}",
    "main_verifiers": f"{BASE} skyrl_train.config:SkyRLConfig {CLIENT}",
}
LEFT_OUT = {
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
def test_a_main_that_needs_internals_does_not(main):
    assert missing(LEFT_OUT[main]) == [LEFT_OUT[main]]


def test_they_are_sixteen():
    assert len(MAINS) + len(LEFT_OUT) == 16
