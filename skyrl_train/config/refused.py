"""The keys that may only keep their default, and why: one row each, and no field of any section.

They are SkyRL's keys. Whoever sets one reads a reason and not just "unknown", and whoever only reads one, as SkyRL's
examples do, gets the one value that it can have.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from skyrl_train.config.problems import NO_VALUE

ONE_DEVICE = "is not possible yet: one process trains on one device (trainer.device); drop it"
ONE_ENGINE = "is not possible yet: one engine runs inside this process; drop it"
NO_SYNC = "has nothing to do: the engine reads the learner's weights inside this process; drop it"
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
    "generator.step_wise_trajectories": "is not possible yet: turns that extend each other are one sample; drop it",
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


@dataclass(frozen=True, slots=True)
class Row:
    """A key that may only keep its default: the default, what the key means in SkyRL, and its type."""

    default: Any
    meaning: str
    type: Any = None  # that of the default, where none is given

    def __post_init__(self) -> None:
        if self.type is None:
            object.__setattr__(self, "type", type(self.default))


MAPPING = dict[str, Any]
ADAPTERS = {
    "rank": Row(0, "rank of the adapters; 0 is full fine-tuning"),
    "alpha": Row(16, "the output of the adapters is multiplied by alpha / rank"),
    "dropout": Row(0.0, "dropout on the input of the adapters"),
    "lora_sync_path": Row("/tmp/skyrl_lora_sync", "folder through which adapters reach the engine"),
    "target_modules": Row("all-linear", "layers that get an adapter", Any),
    "exclude_modules": Row(None, "layers that get none", Any),
    "init_method": Row("kaiming", "how the adapters are initialised"),
}
SHARDING = {
    "cpu_offload": Row(False, "parameters and optimizer state rest in host memory"),
    "reshard_after_forward": Row(True, "free the gathered parameters after forward; true, false or a shard size", Any),
    "fsdp_size": Row(-1, "GPUs that share one copy; -1 is all"),
    "mixed_precision": Row(None, "dtypes of parameters, reductions and buffers", MAPPING | None),
    "wrap_policy": Row({}, "which layers are sharded as units", MAPPING),
}
ONE_SEQUENCE = Row(1, "GPUs that share one sequence")
OFFLOAD = Row(True, "optimizer state leaves the GPU between training phases")


def _under(section: str, rows: Mapping[str, Row]) -> dict[str, Row]:
    return {f"{section}.{name}": row for name, row in rows.items()}


ROWS: dict[str, Row] = {
    "trainer.placement.colocate_all": Row(True, "all models and engines share the same devices"),
    "trainer.placement.colocate_policy_ref": Row(True, "policy and reference share their devices"),
    "trainer.placement.policy_num_nodes": Row(1, "machines of the policy"),
    "trainer.placement.policy_num_gpus_per_node": Row(1, "devices per machine of the policy"),
    "trainer.placement.critic_num_nodes": Row(1, "machines of the critic"),
    "trainer.placement.critic_num_gpus_per_node": Row(1, "devices per machine of the critic"),
    "trainer.placement.ref_num_nodes": Row(1, "machines of the reference"),
    "trainer.placement.ref_num_gpus_per_node": Row(1, "devices per machine of the reference"),
    "trainer.sequence_parallel_backend": Row("ulysses", "how one sequence is shared by GPUs"),
    "trainer.strategy": Row("single", "single: one process, one device"),
    "trainer.policy.model.lora.lora_sync_path": ADAPTERS["lora_sync_path"],
    "trainer.policy.optimizer_config.offload_after_step": OFFLOAD,
    **_under("trainer.policy.fsdp_config", SHARDING),
    "trainer.policy.sequence_parallel_size": ONE_SEQUENCE,
    "trainer.policy.use_torch_compile": Row(False, "compile the entropy computation"),
    "trainer.policy.record_memory": Row(False, "write CUDA memory snapshots"),
    **_under("trainer.ref.model.lora", ADAPTERS),
    "trainer.ref.sequence_parallel_size": ONE_SEQUENCE,
    **_under("trainer.ref.fsdp_config", SHARDING),
    "trainer.critic.model.path": Row(None, "base model of the critic; null means no critic", str | None),
    **_under("trainer.critic.model.lora", ADAPTERS),
    "trainer.critic.optimizer_config.lr": Row(5e-06, "peak learning rate"),
    "trainer.critic.optimizer_config.adam_betas": Row([0.9, 0.999], "decay of the two moments", list[float]),
    "trainer.critic.optimizer_config.weight_decay": Row(0.01, "decoupled weight decay"),
    "trainer.critic.optimizer_config.max_grad_norm": Row(
        1.0, "gradients are scaled down to this total norm; <= 0 is off"
    ),
    "trainer.critic.optimizer_config.offload_after_step": OFFLOAD,
    "trainer.critic.optimizer_config.num_warmup_steps": Row(0, "optimizer steps over which the rate rises from 0"),
    "trainer.critic.optimizer_config.scheduler": Row("constant_with_warmup", "a transformers schedule, by name"),
    **_under("trainer.critic.fsdp_config", SHARDING),
    "trainer.critic.sequence_parallel_size": ONE_SEQUENCE,
    "trainer.critic.model_config_kwargs": Row({}, "overrides of the Hugging Face model config", MAPPING),
    "trainer.algorithm.value_head_prefix": Row("value_head", "name of the critic's linear head"),
    "trainer.algorithm.lambd": Row(1.0, "GAE's lambda"),
    "trainer.algorithm.tis_imp_ratio_cap": Row(-1.0, "old name of off_policy_correction.token_tis_ratio_clip_high"),
    "trainer.algorithm.use_tis": Row(False, "old name of off_policy_correction.tis_ratio_type=token"),
    "trainer.algorithm.value_clip": Row(0.2, "how far the critic may move; null: plain squared error", float | None),
    "trainer.algorithm.dynamic_sampling.type": Row(None, "null, filter or replace", str | None),
    "trainer.algorithm.dynamic_sampling.max_sample_batches": Row(30, "stop after this many batches; <= 0 is no limit"),
    "trainer.algorithm.dynamic_sampling.min_replace_ratio": Row(0.3, "replace: share of good prompts needed"),
    "trainer.fully_async.max_staleness_steps": Row(4, "how many steps ahead generation may run"),
    "trainer.fully_async.num_parallel_generation_workers": Row(768, "prompts that are played at once"),
    "trainer.gradient_checkpointing_use_reentrant": Row(False, "torch's older variant of gradient checkpointing"),
    "trainer.log_path": Row("/tmp/skyrl-logs", "log files of a cluster's workers"),
    "trainer.critic_mini_batch_size": Row(256, "prompts per optimizer step of the critic"),
    "trainer.use_sample_packing": Row(True, "samples are laid end to end, without padding"),
    "trainer.flash_attn": Row(False, "the flash-attn package; torch's own attention serves without it"),
    "trainer.disable_fast_tokenizer": Row(False, "use the slow tokenizer"),
    "trainer.dump_data_batch": Row(False, "pickle every training batch"),
    "trainer.rope_scaling": Row(None, "RoPE scaling of the policy", MAPPING | None),
    "trainer.rope_theta": Row(None, "RoPE base of the policy", float | None),
    "generator.model_name": Row("${trainer.policy.model.path}", "model of the engine; follows the policy's path"),
    "generator.model_dtype": Row("auto", "dtype of the engine; auto: the learner's"),
    "generator.run_engines_locally": Row(True, "engines are started here"),
    "generator.num_inference_engines": Row(1, "copies of the engine"),
    "generator.backend": Row("torch", "torch: the engine inside this process"),
    "generator.weight_sync_backend": Row("nccl", "how new weights travel to other processes"),
    "generator.weight_transfer_threshold_cuda_ipc_GB": Row(1.0, "GB per transfer between processes"),
    "generator.external_proxy_url": Row(None, "router of remote engines", str | None),
    "generator.external_server_urls": Row(None, "addresses of remote engines", list[str] | None),
    "generator.inference_engine_tensor_parallel_size": Row(1, "GPUs that share each layer"),
    "generator.inference_engine_pipeline_parallel_size": Row(1, "GPUs that share the stack of layers"),
    "generator.inference_engine_expert_parallel_size": Row(1, "GPUs that share the experts"),
    "generator.inference_engine_data_parallel_size": Row(1, "copies inside one engine"),
    "generator.async_engine": Row(True, "requests of all episodes are batched as they come"),
    "generator.vllm_v1_disable_multiproc": Row(True, "vLLM in one process"),
    "generator.enable_prefix_caching": Row(True, "keep the KV of shared prompts and earlier turns"),
    "generator.enable_chunked_prefill": Row(True, "vLLM: long prompts in pieces"),
    "generator.enforce_eager": Row(True, "vLLM without CUDA graphs"),
    "generator.fully_sharded_loras": Row(False, "vLLM: adapters sharded"),
    "generator.enable_ray_prometheus_stats": Row(False, "vLLM: metrics through Ray"),
    "generator.gpu_memory_utilization": Row(0.8, "vLLM: share of GPU memory"),
    "generator.remote_inference_engine_urls": Row(["127.0.0.1:8001"], "addresses of remote engines", list[str]),
    "generator.enable_http_endpoint": Row(False, "serve the engine over HTTP"),
    "generator.http_endpoint_host": Row("127.0.0.1", "host of the HTTP endpoint"),
    "generator.http_endpoint_port": Row(8000, "port of the HTTP endpoint"),
    "generator.served_model_name": Row(None, "model name at the HTTP endpoint", str | None),
    "generator.engine_init_kwargs": Row({}, "arguments of the engine's constructor", MAPPING),
    "generator.override_existing_update_group": Row("auto", "remote engines: replace an old weight group"),
    "generator.rope_scaling": Row(
        "${trainer.rope_scaling}", "RoPE scaling of the engine; follows the policy's", MAPPING | None
    ),
    "generator.rope_theta": Row("${trainer.rope_theta}", "RoPE base of the engine; follows the policy's", float | None),
    "generator.step_wise_trajectories": Row(False, "each turn becomes a sample of its own"),
}


def reason_against(key: str) -> str | None:
    """Why this key, or the section it lies in, does nothing."""
    return next((reason for prefix, reason in REFUSED.items() if lies_in(key, prefix)), None)


def lies_in(key: str, prefix: str) -> bool:
    return key == prefix or key.startswith(f"{prefix}.")


def instead_of(key: str, value: Any) -> tuple[str, ...]:
    """The settings (key=value) that do what this refused one was meant to do."""
    return INSTEAD.get(key, lambda _: ())(value)


def default_of(key: str) -> Any:
    """The only value that a refused key can have; NO_VALUE for a key that has no row."""
    return ROWS[key].default if key in ROWS else NO_VALUE


def moved(key: str, value: Any) -> Iterator[tuple[str, Any]]:
    """The refused keys that would lose their default if `key` were set; each key of a mapping given for a section.

    A default that follows another key ("${a.b}") is not compared: only the whole tree knows it.
    """
    if is_section(key) and isinstance(value, Mapping):
        for name, item in value.items():
            yield from moved(f"{key}.{name}", item)
    elif is_section(key) and getattr(value, "section_key", None) == key:
        return
    elif not (key in ROWS and ("${" in str(default_of(key)) or value == default_of(key))):
        yield key, value


def row_of(key: str) -> str | None:
    """The row that the key is, or in whose mapping it lies.

    generator.engine_init_kwargs.max_model_len -> generator.engine_init_kwargs
    """
    while key and key not in ROWS:
        key = key.rpartition(".")[0]
    return key or None


def rows_below(section: str) -> list[str]:
    return [key for key in ROWS if key.startswith(f"{section}.")]


def is_section(key: str) -> bool:
    """Whether this is a section all of whose keys are refused, such as trainer.placement."""
    return reason_against(key) is not None and bool(rows_below(key))
