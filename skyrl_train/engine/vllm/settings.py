"""The settings of a vLLM engine, and what vLLM cannot do. Imports no vLLM: the driver reads this, the engine obeys."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from skyrl_train.config import SkyRLConfig
from skyrl_train.config.problems import ConfigError, Problem

LEAST_TEMPERATURE = 0.01  # vLLM raises all between 0 and this one to it
# Arguments of vLLM that our settings or the contract of the engine decide.
OURS = {
    "model", "tokenizer", "dtype", "load_format", "skip_tokenizer_init", "logprobs_mode", "max_logprobs",
    "worker_extension_cls", "weight_transfer_config", "tensor_parallel_size", "max_model_len", "max_num_seqs",
    "max_num_batched_tokens", "enforce_eager", "enable_prefix_caching", "gpu_memory_utilization", "seed",
    "enable_sleep_mode", "enable_lora", "quantization", "enable_chunked_prefill", "hf_overrides",
}  # fmt: skip


@dataclass(frozen=True, slots=True)
class VllmSettings:
    """Everything that an engine is made of but its weights, which come by `load_weights`.

    model: a folder with config.json and the tokenizer's files; weights in it are not read.
    max_model_len: None is the model's context.
    kv_cache_bytes: memory of all workers for keys and values on a CPU, where gpu_memory_utilization has no effect.
    threads: of one worker on a CPU. model_config_kwargs: what the learner's model has other than its config.json.
    engine_init_kwargs: further arguments of vLLM's AsyncEngineArgs.
    """

    model: str | Path
    dtype: str
    max_num_seqs: int
    max_num_batched_tokens: int
    max_model_len: int | None = None
    tensor_parallel_size: int = 1
    gpu_memory_utilization: float = 0.8
    enforce_eager: bool = True
    enable_prefix_caching: bool = True
    enable_sleep_mode: bool = False  # whether `sleep` gives memory back, on a GPU
    kv_cache_bytes: int = 1 << 30
    threads: int = 1
    seed: int = 0
    trust_remote_code: bool = False
    model_config_kwargs: Mapping[str, Any] = field(default_factory=dict)
    engine_init_kwargs: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if ours := sorted(OURS & self.engine_init_kwargs.keys()):
            raise ValueError(f"engine_init_kwargs.{ours[0]} cannot be set: the engine's own settings decide it")


def refuse_what_vllm_cannot(config: SkyRLConfig) -> None:
    """Raise ConfigError with every setting in which vLLM would not do what the torch engine does."""
    if problems := list(problems_of_vllm(config)):
        raise ConfigError(problems)


def problems_of_vllm(config: SkyRLConfig) -> Iterator[Problem]:
    if config.trainer.deterministic:
        yield Problem(
            "trainer.deterministic",
            True,
            "is not possible with vLLM: what is computed together changes the last bits; use generator.backend=torch",
        )
    for name in ("sampling_params", "eval_sampling_params"):
        temperature = getattr(config.generator, name).temperature
        if 0 < temperature < LEAST_TEMPERATURE:
            yield Problem(
                f"generator.{name}.temperature",
                temperature,
                f"would be {LEAST_TEMPERATURE} in vLLM; use that, 0 (greedy) or generator.backend=torch",
            )
