"""Keys that would do nothing, and why: one table for keys without effect, one for keys that need another key.

A key of the first table may only keep its default. SkyRL's keys that this tree does not have stand there too, so that
whoever sets one reads a reason and not just "unknown".
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import Any

from skyrl_train.config.algorithm import OWN_ESTIMATORS, OWN_LOSSES
from skyrl_train.config.section import Problem, Section, shown
from skyrl_train.config.tree import defaults_of, leaves

ONE_DEVICE = "is not possible yet: one process trains on one device (trainer.device); drop it"
ONE_ENGINE = "is not possible yet: one engine runs inside this process; drop it"
NO_SYNC = "has nothing to do: the engine reads the learner's weights; drop it"
NO_SHARDING = "has nothing to do: on one device no model is sharded; drop it, and bound memory with "
NO_SHARDING += "trainer.max_tokens_per_microbatch and trainer.gradient_checkpointing=true"
NO_REF_LORA = "is not possible: the reference is the policy's base without adapters; drop it and use "
NO_REF_LORA += "trainer.policy.model.lora"
NO_CRITIC = "is not possible yet: there is no critic; use trainer.algorithm.advantage_estimator=grpo, which needs none"
NO_MEGATRON = "is for Megatron, which this project does not have; drop it and use trainer.strategy=single"
NO_VLLM = "is for vLLM, which is not supported yet; drop it (the torch engine has generator.max_num_seqs "
NO_VLLM += "and generator.max_num_batched_tokens)"
NO_REMOTE = "is not possible yet: no remote engine can be used; drop it, generator.backend=torch runs in this process"
NO_HTTP = "is not possible yet: the engine is not served over HTTP; use generator.enable_http_endpoint=false"
NO_ASYNC = (
    "is not possible yet: generation and training take turns; drop it and start skyrl_train.entrypoints.main_base"
)
NO_DYNAMIC = "is not possible yet; use trainer.algorithm.dynamic_sampling.type=null, and "
NO_DYNAMIC += "trainer.algorithm.zero_variance_filter=true to leave groups of equal rewards out of the loss"
NO_TIS = "is an old name; use trainer.algorithm.off_policy_correction.tis_ratio_type=token and its "
NO_TIS += "token_tis_ratio_clip_high"
NO_PADDING = "has nothing to do: samples are always laid end to end without padding; drop it"
ROPE = "is not read; use trainer.policy.model_config_kwargs, which changes the model's own configuration"
PER_CALL = "is not a sampling parameter of the torch engine; those it has are listed by "
PER_CALL += "`python -m skyrl_train.config --search sampling_params`"
SEED = "is not read: every reply's seed derives from trainer.seed; use trainer.seed"

REFUSED: dict[str, str] = {
    "trainer.placement": ONE_DEVICE,
    "trainer.strategy": "is not possible yet: one process trains on one device; use trainer.strategy=single",
    "trainer.sequence_parallel_backend": ONE_DEVICE,
    "trainer.policy.sequence_parallel_size": ONE_DEVICE,
    "trainer.policy.model.lora.lora_sync_path": NO_SYNC,
    "trainer.policy.optimizer_config.offload_after_step": NO_SHARDING,
    "trainer.policy.fsdp_config": NO_SHARDING,
    "trainer.policy.use_torch_compile": "is not possible yet; drop it",
    "trainer.policy.record_memory": "is not possible yet; drop it",
    "trainer.policy.megatron_config": NO_MEGATRON,
    "trainer.ref.sequence_parallel_size": ONE_DEVICE,
    "trainer.ref.model.lora": NO_REF_LORA,
    "trainer.ref.fsdp_config": NO_SHARDING,
    "trainer.ref.megatron_config": NO_MEGATRON,
    "trainer.critic": NO_CRITIC,
    "trainer.critic_mini_batch_size": NO_CRITIC,
    "trainer.algorithm.value_head_prefix": NO_CRITIC,
    "trainer.algorithm.value_clip": NO_CRITIC,
    "trainer.algorithm.lambd": NO_CRITIC,
    "trainer.algorithm.tis_imp_ratio_cap": NO_TIS,
    "trainer.algorithm.use_tis": NO_TIS,
    "trainer.algorithm.dynamic_sampling": NO_DYNAMIC,
    "trainer.fully_async": NO_ASYNC,
    "trainer.gradient_checkpointing_use_reentrant": "is not possible: torch's newer, non-reentrant form is always used",
    "trainer.log_path": "has nothing to do: there is no cluster; a run's files lie in trainer.ckpt_path; drop it",
    "trainer.use_sample_packing": NO_PADDING,
    "trainer.flash_attn": "has nothing to do: torch's own attention takes its fastest kernel; drop it",
    "trainer.disable_fast_tokenizer": "has nothing to do: the tokenizer is the one transformers picks; drop it",
    "trainer.dump_data_batch": "has nothing to do: every trajectory is kept in the run folder anyway; drop it",
    "trainer.rope_scaling": ROPE,
    "trainer.rope_theta": ROPE,
    "generator.model_name": "is not read: the engine samples the policy; use trainer.policy.model.path",
    "generator.model_dtype": "is not read: the engine computes in the learner's dtype; use trainer.bf16",
    "generator.run_engines_locally": NO_REMOTE,
    "generator.num_inference_engines": ONE_ENGINE,
    "generator.backend": "is not possible yet; use generator.backend=torch, the engine inside this process",
    "generator.weight_sync_backend": NO_SYNC,
    "generator.weight_transfer_threshold_cuda_ipc_GB": NO_SYNC,
    "generator.override_existing_update_group": NO_SYNC,
    "generator.external_proxy_url": NO_REMOTE,
    "generator.external_server_urls": NO_REMOTE,
    "generator.remote_inference_engine_urls": NO_REMOTE,
    "generator.inference_engine_tensor_parallel_size": ONE_ENGINE,
    "generator.inference_engine_pipeline_parallel_size": ONE_ENGINE,
    "generator.inference_engine_expert_parallel_size": ONE_ENGINE,
    "generator.inference_engine_data_parallel_size": ONE_ENGINE,
    "generator.async_engine": "has nothing to do: the torch engine always batches requests as they come; drop it",
    "generator.vllm_v1_disable_multiproc": NO_VLLM,
    "generator.enable_prefix_caching": "has nothing to do: a shared prefix is always computed once; drop it",
    "generator.enable_chunked_prefill": NO_VLLM,
    "generator.enforce_eager": NO_VLLM,
    "generator.fully_sharded_loras": NO_VLLM,
    "generator.enable_ray_prometheus_stats": NO_VLLM,
    "generator.gpu_memory_utilization": NO_VLLM,
    "generator.engine_init_kwargs": NO_VLLM,
    "generator.enable_http_endpoint": NO_HTTP,
    "generator.http_endpoint_host": NO_HTTP,
    "generator.http_endpoint_port": NO_HTTP,
    "generator.served_model_name": NO_HTTP,
    "generator.rope_scaling": ROPE,
    "generator.rope_theta": ROPE,
    "generator.step_wise_trajectories": "is not possible yet; one trajectory is one sample, drop it",
    "generator.sampling_params.additional_kwargs": PER_CALL,
    "generator.eval_sampling_params.additional_kwargs": PER_CALL,
    "generator.sampling_params.seed": SEED,
    "generator.eval_sampling_params.seed": SEED,
    "generator.inference_engine": NO_VLLM,
    "trainer.remove_microbatch_padding": NO_PADDING,
    "hydra": "is a setting of Hydra itself, which only reads your overrides here; drop it",
}

# What to set in place of a refused setting, where it is another key: called with the refused value.
INSTEAD: dict[str, Callable[[Any], tuple[str, ...]]] = {
    "trainer.algorithm.use_tis": lambda value: ("trainer.algorithm.off_policy_correction.tis_ratio_type=token",),
    "trainer.algorithm.tis_imp_ratio_cap": lambda value: (
        "trainer.algorithm.off_policy_correction.tis_ratio_type=token",
        f"trainer.algorithm.off_policy_correction.token_tis_ratio_clip_high={value}",
    ),
    "trainer.algorithm.dynamic_sampling.type": lambda value: ("trainer.algorithm.zero_variance_filter=true",),
}

LOSS = "trainer.algorithm.policy_loss_type"
ESTIMATOR = "trainer.algorithm.advantage_estimator"
CORRECTION = "trainer.algorithm.off_policy_correction"
Condition = Mapping[str, tuple[Any, ...]]  # key -> values; it holds if any of these keys has any of its values
KL_ON: Condition = {"trainer.algorithm.use_kl_loss": (True,), "trainer.algorithm.use_kl_in_reward": (True,)}

ACTS_ONLY_WITH: dict[str, Condition] = {
    "trainer.ref": KL_ON,
    "trainer.update_ref_every_epoch": KL_ON,
    "trainer.algorithm.kl_estimator_type": KL_ON,
    "trainer.algorithm.kl_loss_coef": KL_ON,
    "trainer.algorithm.kl_ctrl": {"trainer.algorithm.use_kl_in_reward": (True,)},
    "trainer.algorithm.kl_ctrl.kl_target": {"trainer.algorithm.kl_ctrl.type": ("adaptive",)},
    "trainer.algorithm.kl_ctrl.horizon": {"trainer.algorithm.kl_ctrl.type": ("adaptive",)},
    "trainer.algorithm.entropy_loss_coef": {"trainer.algorithm.use_entropy_loss": (True,)},
    "trainer.algorithm.grpo_norm_by_std": {ESTIMATOR: ("grpo",)},
    "trainer.algorithm.gamma": {ESTIMATOR: ("reinforce++",)},
    "trainer.algorithm.eps_clip_low": {LOSS: ("regular", "dual_clip", "gspo", "clip_cov")},
    "trainer.algorithm.eps_clip_high": {LOSS: ("regular", "dual_clip", "gspo", "clip_cov")},
    "trainer.algorithm.clip_ratio_c": {LOSS: ("dual_clip",)},
    "trainer.algorithm.sapo": {LOSS: ("sapo",)},
    "trainer.algorithm.cispo": {LOSS: ("cispo",)},
    "trainer.algorithm.clip_cov": {LOSS: ("clip_cov",)},
    "trainer.algorithm.kl_cov": {LOSS: ("kl_cov",)},
    "trainer.algorithm.max_seq_len": {"trainer.algorithm.loss_reduction": ("seq_mean_token_sum_norm",)},
    f"{CORRECTION}.token_tis_ratio_clip_high": {f"{CORRECTION}.tis_ratio_type": ("token",)},
    f"{CORRECTION}.sequence_tis_ratio_clip_high": {f"{CORRECTION}.tis_ratio_type": ("sequence",)},
    f"{CORRECTION}.geo_mask_high": {f"{CORRECTION}.sequence_mask_metric": ("geometric",)},
    f"{CORRECTION}.geo_mask_low": {f"{CORRECTION}.sequence_mask_metric": ("geometric",)},
    f"{CORRECTION}.product_mask_high": {f"{CORRECTION}.sequence_mask_metric": ("product",)},
    f"{CORRECTION}.product_mask_low": {f"{CORRECTION}.sequence_mask_metric": ("product",)},
}
OURS = {LOSS: OWN_LOSSES, ESTIMATOR: OWN_ESTIMATORS}  # a user's own function may read any key


def reason_against(key: str) -> str | None:
    """Why this key, or the section it lies in, does nothing."""
    return next((reason for prefix, reason in REFUSED.items() if lies_in(key, prefix)), None)


def lies_in(key: str, prefix: str) -> bool:
    return key == prefix or key.startswith(f"{prefix}.")


def keys_without_effect(config: Section) -> Iterator[Problem]:
    """The keys that were moved away from their default although nothing reads them."""
    defaults, values = defaults_of(config), dict(leaves(config))
    for key, value in values.items():
        if key not in defaults or value == defaults[key]:
            continue
        reason = reason_against(key)
        if reason is not None:
            yield Problem(key, value, reason, INSTEAD.get(key, lambda _: ())(value))
            continue
        for prefix, condition in ACTS_ONLY_WITH.items():
            if lies_in(key, prefix) and not holds(condition, values):
                yield Problem(key, value, missing(condition, values))
                break


def holds(condition: Condition, values: Mapping[str, Any]) -> bool:
    for key, accepted in condition.items():
        is_users_function = key in OURS and values[key] not in OURS[key]
        if values[key] in accepted or is_users_function:
            return True
    return False


def missing(condition: Condition, values: Mapping[str, Any]) -> str:
    now = " and ".join(f"{key}={shown(values[key])}" for key in condition)
    needed = " or ".join(f"{key}={'|'.join(shown(value) for value in accepted)}" for key, accepted in condition.items())
    return f"has no effect with {now}; drop it, or set {needed}"
