"""Our settings in vLLM's words: the arguments of its engine, and of one request."""

from __future__ import annotations

import dataclasses
import logging
import os
from typing import Any

import vllm
from transformers import AutoConfig
from vllm.engine.arg_utils import AsyncEngineArgs
from vllm.platforms import current_platform
from vllm.sampling_params import RequestOutputKind

from skyrl_train.engine.base import SamplingParams
from skyrl_train.engine.vllm.settings import VllmSettings
from skyrl_train.engine.vllm.worker import BACKEND, SharedWeightsWorker

CPU_BLOCK = 32  # tokens. Only whole blocks of a prefix are kept, and vLLM's own 128 is longer than many a prompt


def arguments_of(settings: VllmSettings) -> AsyncEngineArgs:
    """Return the arguments of AsyncLLM, and set what vLLM's processes read from the environment."""
    known = {field.name for field in dataclasses.fields(AsyncEngineArgs)}
    if unknown := sorted(settings.engine_init_kwargs.keys() - known):
        raise ValueError(f"engine_init_kwargs.{unknown[0]} is no argument of vLLM {vllm.__version__}")
    _set_environment(settings)
    arguments: dict[str, Any] = {
        "model": str(settings.model),
        "dtype": settings.dtype,
        "load_format": "dummy",
        "max_logprobs": -1,  # of one request, the check of the sampler's
        "worker_extension_cls": f"{SharedWeightsWorker.__module__}.{SharedWeightsWorker.__qualname__}",
        "hf_overrides": dict(settings.model_config_kwargs),
        "weight_transfer_config": {"backend": BACKEND},
        "disable_log_stats": True,
    }
    for name in (
        "max_model_len", "max_num_seqs", "max_num_batched_tokens", "tensor_parallel_size", "gpu_memory_utilization",
        "enforce_eager", "enable_prefix_caching", "seed", "trust_remote_code", "enable_sleep_mode",
    ):  # fmt: skip
        arguments[name] = getattr(settings, name)
    if current_platform.is_cpu():
        arguments |= _on_cpu(settings)
    return AsyncEngineArgs(**(arguments | dict(settings.engine_init_kwargs)))


def _on_cpu(settings: VllmSettings) -> dict[str, Any]:
    """Return what differs on a CPU.

    A prompt is computed in one pass: after a part of one, vLLM 0.32 rewinds the generator of a request that has a seed,
    which a CPU's generator does not know ("CPU Generator does not use offset"), and dies.
    """
    config = AutoConfig.from_pretrained(
        settings.model, trust_remote_code=settings.trust_remote_code, **settings.model_config_kwargs
    )
    longest = settings.max_model_len or config.get_text_config().max_position_embeddings
    return {
        "kv_cache_memory_bytes": settings.kv_cache_bytes // settings.tensor_parallel_size,  # of each worker
        "block_size": CPU_BLOCK,
        "enable_chunked_prefill": False,
        "max_num_batched_tokens": max(settings.max_num_batched_tokens, longest),
    }


def _set_environment(settings: VllmSettings) -> None:
    """Set what the user has not set. On a CPU vLLM would bind every engine's threads to the same first cores."""
    logging.getLogger("vllm").setLevel(os.environ.setdefault("VLLM_LOGGING_LEVEL", "WARNING"))
    os.environ.setdefault("VLLM_NO_USAGE_STATS", "1")
    if current_platform.is_cpu():
        os.environ.setdefault("VLLM_CPU_OMP_THREADS_BIND", "nobind")
        os.environ["OMP_NUM_THREADS"] = str(settings.threads)
        if settings.enforce_eager:  # vLLM still compiles a few functions, which takes 15 seconds and a C++ compiler
            os.environ.setdefault("TORCHDYNAMO_DISABLE", "1")


def vllm_params(params: SamplingParams) -> vllm.SamplingParams:
    """Return a request's settings. vLLM lets a response end behind its min_tokens-th token, ours with it."""
    return vllm.SamplingParams(
        max_tokens=params.max_tokens,
        min_tokens=max(params.min_tokens - 1, 0),
        temperature=params.temperature,
        top_p=params.top_p,
        top_k=params.top_k,
        min_p=params.min_p,
        repetition_penalty=params.repetition_penalty,
        stop=list(params.stop),
        include_stop_str_in_output=True,
        skip_special_tokens=False,  # a stop string may name one
        seed=params.seed,
        logprobs=0,  # the sampled token's alone
        output_kind=RequestOutputKind.FINAL_ONLY,
    )


def proof_params() -> vllm.SamplingParams:
    """Return the settings of a request for the logprobs of its prompt: vLLM always samples a token behind it."""
    return vllm.SamplingParams(
        max_tokens=1, temperature=0.0, prompt_logprobs=0, detokenize=False, output_kind=RequestOutputKind.FINAL_ONLY
    )


def whole_distribution(temperature: float, **changes: Any) -> vllm.SamplingParams:
    """Return the settings of a request for the logprobs of every token behind its prompt."""
    return vllm.SamplingParams(
        max_tokens=1,
        temperature=temperature,
        seed=0,
        logprobs=-1,
        detokenize=False,
        output_kind=RequestOutputKind.FINAL_ONLY,
        **changes,
    )
