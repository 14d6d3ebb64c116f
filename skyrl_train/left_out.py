"""Import paths of SkyRL's that are left out: importing one says why, and what to use instead."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from types import ModuleType
from typing import Any

ENGINE = "override get_engine(policy) of the experiment, or return a GeneratorInterface from get_generator"
LOOP = "the loop is not to be replaced; use postprocess_generator_output, get_callbacks() or shape_rewards(groups)"
RANKS = "trainer.strategy=fsdp2 and trainer.placement.* start ranks; override get_learner(policy) for another learner"
RAY = "initialize_ray(cfg) starts Ray, and the placement of a run follows from trainer.placement.*"
# Modules; a package stands for all that it holds.
MODULES: Mapping[str, str] = {
    "skyrl_train.training_batch": "change episodes in postprocess_generator_output or shape_rewards(groups), and write "
    "what computes on tensors as an advantage estimator or a policy loss; on-policy distillation is "
    "trainer.algorithm.advantage_estimator=distillation",
    "skyrl_train.fully_async_trainer": "each step waits for its episodes; " + LOOP,
    "skyrl_train.distributed": RANKS,
    "skyrl_train.workers": RANKS,
    "skyrl_train.weight_sync": "weights go to the engines by themselves",
    "skyrl_train.model_wrapper": "override get_policy() of the experiment",
    "skyrl_train.env_vars": "its variables have no effect here; the settings of a run are its keys",
    "skyrl_train.patches": "models are loaded as transformers writes them",
    "skyrl_train.inference_servers": ENGINE,
    "skyrl_train.inference_engines.vllm": "generator.backend=vllm starts vLLM; " + ENGINE,
    "skyrl_train.inference_engines.sglang": ENGINE,
    "skyrl_train.inference_engines.ray_wrapped_inference_engine": ENGINE,
    "skyrl_train.inference_engines.remote_inference_engine": ENGINE,
    "skyrl_train.inference_engines.inference_engine_client_http_endpoint": "generator.enable_http_endpoint=true serves "
    "the policy",
    "skyrl_train.utils.profiler": "trainer.logger and the run's report hold the times of each stage",
    "skyrl_train.utils.torch_utils": "logprobs and entropies are given to losses and estimators",
}
ESTIMATOR = "compute_advantages_and_returns(..., adv_estimator=NAME) calls it"
LOSS = "PolicyLossRegistry.get(NAME) is the loss, of flat tensors and one number per token"
TEMPLATE = "generator.chat_template.source=file with generator.chat_template.name_or_path=FILE takes any template"
MESSAGES = "get_response_ids_and_loss_mask_from_messages encodes messages"
VALIDATE = "validate_cfg(cfg) checks everything"
# Names of modules that are here.
NAMES: Mapping[str, Mapping[str, str]] = {
    "skyrl_train.utils": {
        "get_ray_pg_ready_with_timeout": RAY,
        "ray_noset_visible_devices": RAY,
        "get_all_env_variables": RAY,
        "prepare_runtime_environment": RAY,
        "validate_batch_sizes": VALIDATE,
        "validate_generator_cfg": VALIDATE,
    },
    "skyrl_train.utils.ppo_utils": {
        "normalize_advantages_dict": "trainer.algorithm.advantage_batch_normalize=true does it",
        "masked_whiten": "trainer.algorithm.advantage_batch_normalize=true does it",
        "AdaptiveKLController": "trainer.algorithm.kl_ctrl.type=adaptive does it",
        "FixedKLController": "trainer.algorithm.kl_ctrl.type=fixed does it",
        "get_kl_controller": "trainer.algorithm.kl_ctrl.type chooses it",
        "repopulate_all_registries": "a registry keeps its own functions; unregister(NAME) takes one of yours out",
        "compute_gae_advantage_return": ESTIMATOR,
        "compute_grpo_outcome_advantage": ESTIMATOR,
        "compute_reinforce_plus_plus_outcome_advantage": ESTIMATOR,
        "compute_rloo_outcome_advantage": ESTIMATOR,
        "compute_policy_loss_cispo": LOSS,
        "compute_policy_loss_clip_cov": LOSS,
        "compute_policy_loss_kl_cov": LOSS,
        "cross_entropy_loss": LOSS,
        "gspo_policy_loss": LOSS,
        "importance_sampling_loss": LOSS,
        "ppo_policy_loss": LOSS,
        "sapo_policy_loss": LOSS,
    },
    "skyrl_train.generators.utils": {
        "CUSTOM_CHAT_TEMPLATES": TEMPLATE,
        "get_custom_chat_template": TEMPLATE,
        "encode_messages_subset": MESSAGES,
        "get_generation_prompt_ids": MESSAGES,
        "apply_overlong_filtering": "generator.apply_overlong_filtering=true does it",
        "concatenate_generator_outputs": "join the lists of the outputs",
        "get_metrics_from_generator_output": "rewards and pass rates are logged with every step",
    },
    "skyrl_train.inference_engines.base": {"InferenceEngineInterface": ENGINE},
    "skyrl_train.evaluate": {
        "evaluate": "trainer.eval_interval evaluates while training, EvalOnlyEntrypoint without it",
        "evaluate_step_wise": "trainer.eval_interval evaluates while training, EvalOnlyEntrypoint without it",
    },
}


class LeftOut:
    """The last finder of modules: it is asked for a module of this package that no file holds."""

    @staticmethod
    def find_spec(name: str, path: Sequence[str] | None = None, target: ModuleType | None = None) -> None:
        """Raise ModuleNotFoundError with what to use instead, if `name` is one of SkyRL's that is left out."""
        if name in MODULES:
            raise ModuleNotFoundError(f"SkyRL's {name} is left out here: {MODULES[name]}", name=name)


def getter_of(module: str) -> Callable[[str], Any]:
    """Return a module's `__getattr__`, which says of a left-out name what to use instead."""

    def get(name: str) -> Any:
        instead = NAMES[module].get(name)
        if instead is None:
            raise AttributeError(f"module {module!r} has no attribute {name!r}")
        raise ImportError(f"SkyRL's {module}.{name} is left out here: {instead}", name=module)

    return get
