"""The settings of a vLLM engine, and what vLLM cannot do. Imports no vLLM: the driver reads this, the engine obeys."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, Protocol, get_args

from skyrl_train.config import SkyRLConfig
from skyrl_train.config.problems import ConfigError, Problem

LogprobsMode = Literal["raw_logprobs", "processed_logprobs"]
# Arguments of vLLM that our settings or the contract of the engine decide.
OURS = {
    "model", "tokenizer", "dtype", "load_format", "skip_tokenizer_init", "logprobs_mode", "worker_extension_cls",
    "weight_transfer_config", "tensor_parallel_size", "max_model_len", "max_num_seqs", "max_num_batched_tokens",
    "enforce_eager", "enable_prefix_caching", "gpu_memory_utilization", "seed", "enable_lora", "quantization",
    "enable_chunked_prefill", "hf_overrides",
}  # fmt: skip


class Sampling(Protocol):
    """The settings that decide which logprobs vLLM returns, in SamplingParams and in the configuration alike."""

    @property
    def min_tokens(self) -> int: ...
    @property
    def temperature(self) -> float: ...
    @property
    def top_p(self) -> float: ...
    @property
    def top_k(self) -> int: ...
    @property
    def min_p(self) -> float: ...
    @property
    def repetition_penalty(self) -> float: ...


@dataclass(frozen=True, slots=True)
class VllmSettings:
    """Everything that an engine is made of but its weights, which come by `load_weights`.

    model: a folder with config.json and the tokenizer's files; weights in it are not read.
    logprobs_mode: see `logprobs_mode`. max_model_len: None is the model's context.
    kv_cache_bytes: memory for keys and values on a CPU, where gpu_memory_utilization has no effect.
    threads: of one worker on a CPU. model_config_kwargs: what the learner's model has other than its config.json.
    engine_init_kwargs: further arguments of vLLM's AsyncEngineArgs.
    """

    model: str | Path
    dtype: str
    max_num_seqs: int
    max_num_batched_tokens: int
    logprobs_mode: LogprobsMode = "raw_logprobs"
    max_model_len: int | None = None
    tensor_parallel_size: int = 1
    gpu_memory_utilization: float = 0.8
    enforce_eager: bool = True
    enable_prefix_caching: bool = True
    kv_cache_bytes: int = 1 << 30
    threads: int = 1
    seed: int = 0
    trust_remote_code: bool = False
    model_config_kwargs: Mapping[str, Any] = field(default_factory=dict)
    engine_init_kwargs: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if ours := sorted(OURS & self.engine_init_kwargs.keys()):
            raise ValueError(f"engine_init_kwargs.{ours[0]} cannot be set: the engine's own settings decide it")


def logprobs_mode(*sampling: Sampling) -> LogprobsMode:
    """Return the mode in which vLLM's logprobs are the learner's for all of these, softmax(logits / temperature).

    vLLM has one mode for all requests. Raw logprobs are those at temperature 1, before penalties and cuts; processed
    ones are those of the distribution that is left after them. ValueError if neither serves.
    """
    for mode in get_args(LogprobsMode):
        if all(fits(params, mode) for params in sampling):
            return mode
    other = next(params for params in sampling if not fits(params, "raw_logprobs"))
    cut = next(params for params in sampling if not fits(params, "processed_logprobs"))
    raise ValueError(
        f"vLLM returns logprobs either at temperature 1 or of what {_cuts(cut)} leaves, and the learner computes those "
        f"at temperature {other.temperature:g} without it; use temperature 1, or drop {_cuts(cut)}"
    )


def fits(params: Sampling, mode: LogprobsMode) -> bool:
    """Return whether the logprobs of this mode are the learner's. Greedy sampling has those of temperature 1."""
    return params.temperature in (0, 1) if mode == "raw_logprobs" else not _cuts(params)


def _cuts(params: Sampling) -> str:
    """Return the settings that change more than the temperature. vLLM itself drops the cuts of greedy sampling."""
    cuts = {} if params.temperature == 0 else {"top_p": (1,), "top_k": (-1,), "min_p": (0,)}
    neutral = {**cuts, "repetition_penalty": (1,), "min_tokens": (0, 1)}
    return ", ".join(
        f"{key}={getattr(params, key):g}" for key, off in neutral.items() if getattr(params, key) not in off
    )


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
    try:
        logprobs_mode(config.generator.sampling_params, config.generator.eval_sampling_params)
    except ValueError as error:
        yield Problem(
            "generator.backend", "vllm", f"cannot do what the sampling parameters ask for: {error}, or use torch"
        )
