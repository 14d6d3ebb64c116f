"""Keys that act only beside another setting, and the check that every changed key has an effect."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from skyrl_train.config.algorithm import OWN_ESTIMATORS, OWN_LOSSES
from skyrl_train.config.problems import Problem, shown
from skyrl_train.config.refused import instead_of, lies_in, reason_against
from skyrl_train.config.section import Section
from skyrl_train.config.tree import defaults_of, leaves

LOSS = "trainer.algorithm.policy_loss_type"
ENDPOINT = "generator.enable_http_endpoint"
ESTIMATOR = "trainer.algorithm.advantage_estimator"
CORRECTION = "trainer.algorithm.off_policy_correction"
Condition = Mapping[str, tuple[Any, ...]]  # key -> values; it holds if any of these keys has any of its values
KL_ON: Condition = {"trainer.algorithm.use_kl_loss": (True,), "trainer.algorithm.use_kl_in_reward": (True,)}
VLLM_ALONE = (
    "inference_engine_tensor_parallel_size", "gpu_memory_utilization", "enforce_eager", "enable_prefix_caching",
    "engine_init_kwargs",
)  # fmt: skip

ACTS_ONLY_WITH: dict[str, Condition] = {
    **{f"generator.{key}": {"generator.backend": ("vllm",)} for key in VLLM_ALONE},
    "trainer.policy.fsdp_config": {"trainer.strategy": ("fsdp2", "fsdp")},
    "trainer.ref": {**KL_ON, ESTIMATOR: ("distillation",)},
    "trainer.algorithm.distillation": {ESTIMATOR: ("distillation",)},
    "trainer.update_ref_every_epoch": KL_ON,
    "trainer.algorithm.kl_estimator_type": KL_ON,
    "trainer.algorithm.kl_loss_coef": KL_ON,
    "trainer.algorithm.kl_ctrl": {"trainer.algorithm.use_kl_in_reward": (True,)},
    "trainer.algorithm.kl_ctrl.kl_target": {"trainer.algorithm.kl_ctrl.type": ("adaptive",)},
    "trainer.algorithm.kl_ctrl.horizon": {"trainer.algorithm.kl_ctrl.type": ("adaptive",)},
    "trainer.algorithm.entropy_loss_coef": {"trainer.algorithm.use_entropy_loss": (True,)},
    "trainer.algorithm.grpo_norm_by_std": {ESTIMATOR: ("grpo", "distillation")},
    "trainer.algorithm.gamma": {ESTIMATOR: ("reinforce++", "gae")},
    "trainer.algorithm.lambd": {ESTIMATOR: ("gae",)},
    "trainer.algorithm.value_clip": {ESTIMATOR: ("gae",)},
    "trainer.critic": {ESTIMATOR: ("gae",)},
    "trainer.critic_mini_batch_size": {ESTIMATOR: ("gae",)},
    "trainer.algorithm.eps_clip_low": {LOSS: ("regular", "dual_clip", "gspo", "gmpo", "clip_cov", "rollout_is")},
    "trainer.algorithm.eps_clip_high": {LOSS: ("regular", "dual_clip", "gspo", "gmpo", "clip_cov", "rollout_is")},
    "trainer.algorithm.clip_ratio_c": {LOSS: ("dual_clip",)},
    "trainer.algorithm.sapo": {LOSS: ("sapo",)},
    "trainer.algorithm.cispo": {LOSS: ("cispo",)},
    "trainer.algorithm.dppo": {LOSS: ("dppo",)},
    "trainer.algorithm.clip_cov": {LOSS: ("clip_cov",)},
    "trainer.algorithm.kl_cov": {LOSS: ("kl_cov",)},
    "generator.http_endpoint_host": {ENDPOINT: (True,)},
    "generator.http_endpoint_port": {ENDPOINT: (True,)},
    "trainer.algorithm.max_seq_len": {"trainer.algorithm.loss_reduction": ("seq_mean_token_sum_norm",)},
    f"{CORRECTION}.token_tis_ratio_clip_high": {f"{CORRECTION}.tis_ratio_type": ("token",)},
    f"{CORRECTION}.sequence_tis_ratio_clip_high": {f"{CORRECTION}.tis_ratio_type": ("sequence",)},
    f"{CORRECTION}.geo_mask_high": {f"{CORRECTION}.sequence_mask_metric": ("geometric",)},
    f"{CORRECTION}.geo_mask_low": {f"{CORRECTION}.sequence_mask_metric": ("geometric",)},
    f"{CORRECTION}.product_mask_high": {f"{CORRECTION}.sequence_mask_metric": ("product",)},
    f"{CORRECTION}.product_mask_low": {f"{CORRECTION}.sequence_mask_metric": ("product",)},
}
OURS = {LOSS: OWN_LOSSES, ESTIMATOR: OWN_ESTIMATORS}  # a user's own function may read any key,
MODELS = ("trainer.ref",)  # but which models are loaded is not for it to say


def keys_without_effect(config: Section) -> Iterator[Problem]:
    """Return a problem for each key that was changed from its default although nothing reads it."""
    defaults, values = defaults_of(config), dict(leaves(config))
    for key, value in values.items():
        if key not in defaults or value == defaults[key]:
            continue
        reason = reason_against(key)  # a subclass may have made a field of a refused key
        if reason is not None:
            yield Problem(key, value, reason, instead_of(key, value))
            continue
        for prefix, condition in ACTS_ONLY_WITH.items():
            if lies_in(key, prefix) and not holds(condition, values, with_users=prefix not in MODELS):
                yield Problem(key, value, missing(condition, values))
                break


def holds(condition: Condition, values: Mapping[str, Any], *, with_users: bool = True) -> bool:
    """Return whether the condition is met; `with_users`: a user's own function meets what ours would."""
    for key, accepted in condition.items():
        is_users_function = with_users and key in OURS and values[key] not in OURS[key]
        if values[key] in accepted or is_users_function:
            return True
    return False


def missing(condition: Condition, values: Mapping[str, Any]) -> str:
    now = " and ".join(f"{key}={shown(values[key])}" for key in condition)
    needed = " or ".join(f"{key}={'|'.join(shown(value) for value in accepted)}" for key, accepted in condition.items())
    return f"has no effect with {now}; drop it, or set {needed}"
