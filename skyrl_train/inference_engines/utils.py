"""Sampling parameters as SkyRL hands them to engines, and back."""

from __future__ import annotations

from typing import Any

from skyrl_train.engine.base import SamplingParams

LENGTHS = ("max_tokens", "max_generate_length", "max_new_tokens", "max_completion_tokens")
NUMBERS = ("min_tokens", "temperature", "top_p", "top_k", "min_p", "repetition_penalty")
ALWAYS_SO = ("logprobs", "skip_special_tokens", "include_stop_str_in_output", "no_stop_trim", "n", "seed")


def get_sampling_params_for_backend(backend: str, sampling_params: Any) -> dict[str, Any]:
    """`generator.sampling_params` under vLLM's names."""
    if backend not in ("torch", "vllm"):
        raise ValueError(f"backend={backend!r} is unknown; use torch or vllm")
    named = {name: getattr(sampling_params, name) for name in NUMBERS if name != "min_tokens"}
    return {
        "max_tokens": sampling_params.max_generate_length,
        "min_tokens": getattr(sampling_params, "min_tokens", 1),
        **named,
        "logprobs": sampling_params.logprobs,
        "stop": list(sampling_params.stop) if sampling_params.stop else None,
        "skip_special_tokens": True,
        "include_stop_str_in_output": True,
    }


def sampling_dict(sampling: SamplingParams) -> dict[str, Any]:
    """An engine's parameters under vLLM's names; the seed is not among them, each request has its own."""
    return {
        "max_tokens": sampling.max_tokens,
        **{name: getattr(sampling, name) for name in NUMBERS},
        "logprobs": 1,
        "stop": list(sampling.stop) or None,
        "skip_special_tokens": True,
        "include_stop_str_in_output": True,
    }


def read_sampling(given: dict[str, Any], defaults: SamplingParams, *, room: int, seed: int) -> SamplingParams:
    """Return what a request asks for, at most `room` tokens. ValueError for a parameter that no engine has."""
    unknown = sorted(given.keys() - {*LENGTHS, *NUMBERS, *ALWAYS_SO, "stop"})
    if unknown:
        known = ", ".join([LENGTHS[0], *NUMBERS, "stop"])
        raise ValueError(f"sampling_params {', '.join(unknown)} are unknown to the engine; it has {known}")
    length = next((given[name] for name in LENGTHS if given.get(name) is not None), defaults.max_tokens)
    values = {name: given[name] if given.get(name) is not None else getattr(defaults, name) for name in NUMBERS}
    stop = given.get("stop", defaults.stop) or ()
    max_tokens = min(int(length), room)
    values["min_tokens"] = min(values["min_tokens"], max_tokens)
    return SamplingParams(
        max_tokens=max_tokens, **values, stop=(stop,) if isinstance(stop, str) else tuple(stop), seed=seed
    )
