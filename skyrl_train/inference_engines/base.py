"""The input and the output of SkyRL's engines."""

from __future__ import annotations

from typing import Any, NotRequired, TypedDict

from skyrl_train.left_out import getter_of

__all__ = ["ConversationType", "InferenceEngineInput", "InferenceEngineOutput", "MessageType"]

__getattr__ = getter_of(__name__)

MessageType = dict[str, str]
ConversationType = list[MessageType]


class InferenceEngineInput(TypedDict):
    """Exactly one of `prompts` and `prompt_token_ids`; one session id per prompt keeps an episode's cache."""

    prompts: NotRequired[list[ConversationType] | None]
    prompt_token_ids: NotRequired[list[list[int]] | None]
    sampling_params: NotRequired[dict[str, Any] | None]
    session_ids: NotRequired[list[Any] | None]


class InferenceEngineOutput(TypedDict):
    """One entry per prompt."""

    responses: list[str]  # decoded without special tokens
    response_ids: list[list[int]]
    stop_reasons: list[str]  # stop, length or abort
    response_logprobs: list[list[float]] | None
