"""SkyRL's keys that may only keep their default: one row each, and no field of any section.

Code that reads one, as SkyRL's examples do, gets the one value that it can have. The reasons are in refused.py.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True, slots=True)
class Key:
    """A key that may only keep its default: the default, what the key means in SkyRL, and its type."""

    default: Any
    meaning: str
    type: Any = None  # that of the default, where none is given

    def __post_init__(self) -> None:
        if self.type is None:
            object.__setattr__(self, "type", type(self.default))


MAPPING = dict[str, Any]
ADAPTERS = {
    "rank": Key(0, "rank of the adapters; 0 is full fine-tuning"),
    "alpha": Key(16, "the output of the adapters is multiplied by alpha / rank"),
    "dropout": Key(0.0, "dropout on the input of the adapters"),
    "lora_sync_path": Key("/tmp/skyrl_lora_sync", "folder through which adapters reach the engine"),
    "target_modules": Key("all-linear", "layers that get an adapter", Any),
    "exclude_modules": Key(None, "layers that get none", Any),
    "init_method": Key("kaiming", "how the adapters are initialised"),
}
SHARDING = {
    "cpu_offload": Key(False, "parameters and optimizer state rest in host memory"),
    "reshard_after_forward": Key(True, "free the gathered parameters after forward; true, false or a shard size", Any),
    "fsdp_size": Key(-1, "GPUs that share one copy; -1 is all"),
    "mixed_precision": Key(None, "dtypes of parameters, reductions and buffers", MAPPING | None),
    "wrap_policy": Key({}, "which layers are sharded as units", MAPPING),
}
ONE_SEQUENCE = Key(1, "GPUs that share one sequence")
OFFLOAD = Key(True, "optimizer state leaves the GPU between training phases")


def _under(section: str, rows: Mapping[str, Key]) -> dict[str, Key]:
    return {f"{section}.{name}": row for name, row in rows.items()}


ROWS: dict[str, Key] = {
    "trainer.placement.colocate_policy_ref": Key(True, "policy and reference share their devices"),
    "trainer.sequence_parallel_backend": Key("ulysses", "how one sequence is shared by GPUs"),
    "trainer.policy.model.lora.lora_sync_path": ADAPTERS["lora_sync_path"],
    "trainer.policy.optimizer_config.offload_after_step": OFFLOAD,
    **_under("trainer.policy.fsdp_config", {name: row for name, row in SHARDING.items() if name != "cpu_offload"}),
    "trainer.policy.sequence_parallel_size": ONE_SEQUENCE,
    "trainer.policy.use_torch_compile": Key(False, "compile the entropy computation"),
    "trainer.policy.record_memory": Key(False, "write CUDA memory snapshots"),
    **_under("trainer.ref.model.lora", ADAPTERS),
    "trainer.ref.sequence_parallel_size": ONE_SEQUENCE,
    **_under("trainer.ref.fsdp_config", SHARDING),
    "trainer.critic.model.lora.lora_sync_path": ADAPTERS["lora_sync_path"],
    "trainer.critic.optimizer_config.offload_after_step": OFFLOAD,
    **_under("trainer.critic.fsdp_config", SHARDING),
    "trainer.critic.sequence_parallel_size": ONE_SEQUENCE,
    "trainer.algorithm.value_head_prefix": Key("value_head", "name of the critic's linear head"),
    "trainer.algorithm.tis_imp_ratio_cap": Key(-1.0, "old name of off_policy_correction.token_tis_ratio_clip_high"),
    "trainer.algorithm.use_tis": Key(False, "old name of off_policy_correction.tis_ratio_type=token"),
    "trainer.fully_async.max_staleness_steps": Key(4, "how many steps ahead generation may run"),
    "trainer.fully_async.num_parallel_generation_workers": Key(768, "prompts that are played at once"),
    "trainer.gradient_checkpointing_use_reentrant": Key(False, "torch's older variant of gradient checkpointing"),
    "trainer.log_path": Key("/tmp/skyrl-logs", "log files of a cluster's workers"),
    "trainer.use_sample_packing": Key(True, "samples are laid end to end, without padding"),
    "trainer.flash_attn": Key(False, "the flash-attn package; torch's own attention serves without it"),
    "trainer.disable_fast_tokenizer": Key(False, "use the slow tokenizer"),
    "trainer.rope_scaling": Key(None, "RoPE scaling of the policy", MAPPING | None),
    "trainer.rope_theta": Key(None, "RoPE base of the policy", float | None),
    "generator.model_name": Key("${trainer.policy.model.path}", "model of the engine; follows the policy's path"),
    "generator.model_dtype": Key("auto", "dtype of the engine; auto: the learner's"),
    "generator.run_engines_locally": Key(True, "engines are started here"),
    "generator.weight_transfer_threshold_cuda_ipc_GB": Key(1.0, "GB per transfer between processes"),
    "generator.external_proxy_url": Key(None, "router of remote engines", str | None),
    "generator.external_server_urls": Key(None, "addresses of remote engines", list[str] | None),
    "generator.inference_engine_pipeline_parallel_size": Key(1, "GPUs that share the stack of layers"),
    "generator.inference_engine_expert_parallel_size": Key(1, "GPUs that share the experts"),
    "generator.inference_engine_data_parallel_size": Key(1, "copies inside one engine"),
    "generator.async_engine": Key(True, "requests of all episodes are batched as they come"),
    "generator.vllm_v1_disable_multiproc": Key(True, "vLLM in one process"),
    "generator.enable_chunked_prefill": Key(True, "vLLM: long prompts in pieces"),
    "generator.fully_sharded_loras": Key(False, "vLLM: adapters sharded"),
    "generator.enable_ray_prometheus_stats": Key(False, "vLLM: metrics through Ray"),
    "generator.remote_inference_engine_urls": Key(["127.0.0.1:8001"], "addresses of remote engines", list[str]),
    "generator.override_existing_update_group": Key("auto", "remote engines: replace an old weight group"),
    "generator.rope_scaling": Key(
        "${trainer.rope_scaling}", "RoPE scaling of the engine; follows the policy's", MAPPING | None
    ),
    "generator.rope_theta": Key("${trainer.rope_theta}", "RoPE base of the engine; follows the policy's", float | None),
}
