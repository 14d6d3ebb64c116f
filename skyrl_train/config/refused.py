"""Reasons why a key may only keep its default, one per key or section, and the settings to use instead.

They are SkyRL's keys (refused_rows.py). Whoever sets one reads a reason and not just "unknown".
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import Any

from skyrl_train.config.problems import NO_VALUE
from skyrl_train.config.refused_rows import ROWS

ONE_SEQUENCE = "is not possible: one learner rank computes a sequence alone; drop it"
REFERENCE_PLACE = "is not possible: the reference policy lies on the devices of the policy; drop it"
ONE_ENGINE = "is not possible yet: only tensor parallelism splits an engine; drop it, and set "
ONE_ENGINE += "generator.num_inference_engines or generator.inference_engine_tensor_parallel_size"
NO_SYNC = "has nothing to do: an engine reads the learner's weights, or copies them from shared memory; drop it"
SHARDED_SO = "is not possible: all ranks share the policy block by block, with float32 masters; drop it"
NO_SHARDING = "is not possible yet; drop it, and bound memory with trainer.max_tokens_per_microbatch and "
NO_SHARDING += "trainer.gradient_checkpointing=true"
NO_REF_LORA = "is not possible: the reference is the policy's base without adapters; drop it and use "
NO_REF_LORA += "trainer.policy.model.lora"
CRITIC_SO = "is not possible: the critic is sharded as the policy is, by trainer.policy.fsdp_config; drop it"
NO_MEGATRON = "is for Megatron, which this project does not have; drop it and use trainer.strategy=fsdp2"
NO_VLLM = "is for vLLM and is not read; drop it, and use generator.engine_init_kwargs for arguments of vLLM's own"
NO_REMOTE = "is not possible yet: no remote engine can be used; drop it, engines are started here"
NO_ASYNC = (
    "is not possible yet: generation and training take turns; drop it and start skyrl_train.entrypoints.main_base"
)
NO_TIS = "is an old name; use trainer.algorithm.off_policy_correction.tis_ratio_type=token and its "
NO_TIS += "token_tis_ratio_clip_high"
NO_PADDING = "has nothing to do: samples are always laid end to end without padding; drop it"
ROPE = "is not read; use trainer.policy.model_config_kwargs, which changes the model's own configuration"
PER_CALL = "is not a sampling parameter of the torch engine; those it has are listed by "
PER_CALL += "`python -m skyrl_train.config --search sampling_params`"
SEED = "is not read: every reply's seed derives from trainer.seed; use trainer.seed"

# Keys that only the newest SkyRL has.
NO_QUANTISATION = "is not possible: the policy is trained in its own dtype; drop it"
NO_IMAGES = "is not possible: models read text alone; drop it"
ONE_ADAPTER = "has nothing to do: a policy has one adapter, and the engine samples the merged weights; drop it"
NO_MTP = "is not possible: models are trained without multi-token prediction; drop it"
CHUNKS = "is not read: logits are computed in chunks of a fixed size; drop it"
PRINTED = "is not read: every episode is kept in the run's folder, and `skyrl view` shows it; drop it"
TORCH_PROFILER = "is not read; use trainer.profile, which writes where the time of each step went"
NEWEST: dict[str, str] = {
    "data.dataloader": "has nothing to do: rows are read once, before the first step; drop it",
    "trainer.use_expandable_segments": "is not read; use PYTORCH_CUDA_ALLOC_CONF in the environment",
    **{f"trainer.{part}.model.fake_int4_qat": NO_QUANTISATION for part in ("policy", "ref", "critic")},
    **{
        f"trainer.{part}.model.lora.{key}": ONE_ADAPTER
        for part in ("policy", "critic")
        for key in ("max_loras", "max_cpu_loras")
    },
    **{f"trainer.{part}.torch_profiler_config": TORCH_PROFILER for part in ("policy", "ref", "critic")},
    "trainer.policy.language_model_only": NO_IMAGES,
    "trainer.ref.language_model_only": NO_IMAGES,
    "generator.vision_language_generator": NO_IMAGES,
    "trainer.policy.inference_only_init": "is not read; use skyrl_train.entrypoints.main_generate",
    "trainer.algorithm.temperature": "is not read; use generator.sampling_params.temperature, for both are the same",
    "trainer.algorithm.zero_variance_filter_tol": "is not read: rewards are equal up to 1e-6 of their size; drop it",
    "trainer.algorithm.cispo.cispo_anchor": "is not read: the ratio is that to the policy before the update; use "
    "trainer.algorithm.policy_loss_type=rollout_is for the ratio to the engine's logprobs, or drop it",
    "trainer.algorithm.dppo.dppo_type": "is not read; use trainer.algorithm.dppo.dppo_divergence=tv or kl",
    "trainer.algorithm.dppo.delta_low": "is not read; use trainer.algorithm.dppo.dppo_max_divergence",
    "trainer.algorithm.dppo.delta_high": "is not read; use trainer.algorithm.dppo.dppo_max_divergence",
    "trainer.mtp": NO_MTP,
    "trainer.max_training_steps": "is not read; use trainer.epochs, or fewer rows in data.train_data",
    "trainer.recompute_old_logprobs_per_minibatch": "is not read: old_logprobs are those before the update; drop it",
    "trainer.enable_ray_gpu_monitor": "is not read; drop it",
    "trainer.tags": "is not read; use trainer.run_name",
    "trainer.print_example_interval": PRINTED,
    "trainer.num_logger_eval_samples": PRINTED,
    "trainer.num_logger_train_samples": PRINTED,
    "trainer.log_example_interval": PRINTED,
    "trainer.logprobs_chunk_size": CHUNKS,
    "trainer.vocab_entropy_chunk_size": CHUNKS,
    "trainer.vocab_entropy_chunk_memory_mb": CHUNKS,
    "trainer.fused_lm_head_logprob": CHUNKS,
    "trainer.fused_lm_head_logprob_backend": CHUNKS,
    "trainer.placement.reward_num_nodes": "is not read: rewards are computed in the driver, a judge elsewhere; drop it",
    "trainer.placement.reward_num_gpus_per_node": "is not read: rewards are computed in the driver; drop it",
    "generator.use_cache_salt": "is not read: a push of new weights empties the engine's caches; drop it",
    "generator.merge_stepwise_output": "is not read: turns that extend each other are always one sample; drop it",
}

REFUSED: dict[str, str] = {
    "trainer.placement.colocate_policy_ref": REFERENCE_PLACE,
    "trainer.sequence_parallel_backend": ONE_SEQUENCE,
    "trainer.policy.sequence_parallel_size": ONE_SEQUENCE,
    "trainer.policy.model.lora.lora_sync_path": NO_SYNC,
    "trainer.policy.optimizer_config.offload_after_step": NO_SHARDING,
    "trainer.policy.fsdp_config.reshard_after_forward": SHARDED_SO,
    "trainer.policy.fsdp_config.fsdp_size": SHARDED_SO,
    "trainer.policy.fsdp_config.mixed_precision": SHARDED_SO,
    "trainer.policy.fsdp_config.wrap_policy": SHARDED_SO,
    "trainer.policy.use_torch_compile": "is not possible yet; drop it",
    "trainer.policy.record_memory": "is not possible yet; drop it",
    "trainer.policy.megatron_config": NO_MEGATRON,
    "trainer.ref.sequence_parallel_size": ONE_SEQUENCE,
    "trainer.ref.model.lora": NO_REF_LORA,
    "trainer.ref.fsdp_config": NO_SHARDING,
    "trainer.ref.megatron_config": NO_MEGATRON,
    "trainer.critic.model.lora.lora_sync_path": NO_SYNC,
    "trainer.critic.optimizer_config.offload_after_step": NO_SHARDING,
    "trainer.critic.fsdp_config": CRITIC_SO,
    "trainer.critic.sequence_parallel_size": ONE_SEQUENCE,
    "trainer.algorithm.value_head_prefix": "is not read: the critic's head is called value_head; drop it",
    "trainer.algorithm.tis_imp_ratio_cap": NO_TIS,
    "trainer.algorithm.use_tis": NO_TIS,
    "trainer.fully_async": NO_ASYNC,
    "trainer.gradient_checkpointing_use_reentrant": "is not possible: torch's newer, non-reentrant form is always used",
    "trainer.log_path": "is not read: Ray keeps the logs of its workers, and a run's files lie in trainer.ckpt_path; "
    "drop it",
    "trainer.use_sample_packing": NO_PADDING,
    "trainer.flash_attn": "has nothing to do: torch's own attention takes its fastest kernel; drop it",
    "trainer.disable_fast_tokenizer": "has nothing to do: the tokenizer is the one transformers picks; drop it",
    "trainer.rope_scaling": ROPE,
    "trainer.rope_theta": ROPE,
    "generator.model_name": "is not read: the engine samples the policy; use trainer.policy.model.path",
    "generator.model_dtype": "is not read: the engine computes in the learner's dtype; use trainer.bf16",
    "generator.run_engines_locally": NO_REMOTE,
    "generator.weight_transfer_threshold_cuda_ipc_GB": NO_SYNC,
    "generator.override_existing_update_group": NO_SYNC,
    "generator.external_proxy_url": NO_REMOTE,
    "generator.external_server_urls": NO_REMOTE,
    "generator.remote_inference_engine_urls": NO_REMOTE,
    "generator.inference_engine_pipeline_parallel_size": ONE_ENGINE,
    "generator.inference_engine_expert_parallel_size": ONE_ENGINE,
    "generator.inference_engine_data_parallel_size": ONE_ENGINE,
    "generator.async_engine": "has nothing to do: every engine batches requests as they come; drop it",
    "generator.vllm_v1_disable_multiproc": NO_VLLM,
    "generator.enable_chunked_prefill": NO_VLLM,
    "generator.fully_sharded_loras": NO_VLLM,
    "generator.enable_ray_prometheus_stats": NO_VLLM,
    "generator.rope_scaling": ROPE,
    "generator.rope_theta": ROPE,
    "generator.sampling_params.additional_kwargs": PER_CALL,
    "generator.eval_sampling_params.additional_kwargs": PER_CALL,
    "generator.sampling_params.seed": SEED,
    "generator.eval_sampling_params.seed": SEED,
    "generator.inference_engine": NO_VLLM,
    "trainer.remove_microbatch_padding": NO_PADDING,
    **NEWEST,
    "hydra": "is a setting of Hydra itself, which only reads your overrides here; drop it",
}


# What to set in place of a refused setting, where it is another key: called with the refused value.
INSTEAD: dict[str, Callable[[Any], tuple[str, ...]]] = {
    "trainer.algorithm.use_tis": lambda value: ("trainer.algorithm.off_policy_correction.tis_ratio_type=token",),
    "trainer.algorithm.tis_imp_ratio_cap": lambda value: (
        "trainer.algorithm.off_policy_correction.tis_ratio_type=token",
        f"trainer.algorithm.off_policy_correction.token_tis_ratio_clip_high={value}",
    ),
}


def reason_against(key: str) -> str | None:
    """Return why this key, or the section it lies in, does nothing; None if it does something."""
    return next((reason for prefix, reason in REFUSED.items() if lies_in(key, prefix)), None)


def lies_in(key: str, prefix: str) -> bool:
    return key == prefix or key.startswith(f"{prefix}.")


def instead_of(key: str, value: Any) -> tuple[str, ...]:
    """Return the settings (key=value) that do what this refused one was meant to do."""
    return INSTEAD.get(key, lambda _: ())(value)


def default_of(key: str) -> Any:
    """Return the only value that a refused key can have, or NO_VALUE for a key that has no row."""
    return ROWS[key].default if key in ROWS else NO_VALUE


def moved(key: str, value: Any) -> Iterator[tuple[str, Any]]:
    """Return the refused keys, with their values, that would lose their default if `key` were set to `value`.

    A mapping for a section sets each of its keys. A default that follows another key ("${a.b}") is not compared,
    because only the whole tree knows it.
    """
    if is_section(key) and isinstance(value, Mapping):
        for name, item in value.items():
            yield from moved(f"{key}.{name}", item)
    elif is_section(key) and getattr(value, "section_key", None) == key:
        return
    elif not (key in ROWS and ("${" in str(default_of(key)) or value == default_of(key))):
        yield key, value


def row_of(key: str) -> str | None:
    """Return the row of the key, or the row in whose mapping it lies; None without one.

    generator.engine_init_kwargs.max_model_len -> generator.engine_init_kwargs
    """
    while key and key not in ROWS:
        key = key.rpartition(".")[0]
    return key or None


def rows_below(section: str) -> list[str]:
    return [key for key in ROWS if key.startswith(f"{section}.")]


def is_section(key: str) -> bool:
    """Return whether all keys of this section are refused, as those of trainer.placement are."""
    return reason_against(key) is not None and bool(rows_below(key))
