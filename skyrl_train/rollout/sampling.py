"""`generator.sampling_params` of the configuration as the engine's SamplingParams."""

from __future__ import annotations

from typing import Protocol

from skyrl_train.engine.base import SamplingParams


class SamplingSection(Protocol):
    max_generate_length: int
    min_tokens: int
    temperature: float
    top_p: float
    top_k: int
    min_p: float
    repetition_penalty: float
    stop: list[str] | None


def sampling_params(section: SamplingSection) -> SamplingParams:
    """Return the engine's SamplingParams with seed 0: every turn derives its own seed."""
    return SamplingParams(
        max_tokens=section.max_generate_length,
        min_tokens=min(section.min_tokens, section.max_generate_length),
        temperature=section.temperature,
        top_p=section.top_p,
        top_k=section.top_k,
        min_p=section.min_p,
        repetition_penalty=section.repetition_penalty,
        stop=tuple(section.stop or ()),
    )
