"""Helpers for generators: messages to tokens and masks, the input of a batch, and its metrics."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

from skyrl_gym.metrics import aggregate_for_environment
from skyrl_train.generators.base import BatchMetadata, GeneratorInput, TrainingPhase, TrajectoryID
from skyrl_train.left_out import getter_of

__getattr__ = getter_of(__name__)

# What stands before a message while it is encoded; its tokens are cut off again.
_BEFORE = [
    {"role": "system", "content": "You are a helpful assistant."},
    {"role": "user", "content": "I am a user."},
]


def get_response_ids_and_loss_mask_from_messages(
    messages: Sequence[dict[str, str]],
    tokenizer: Any,
    assistant_logprobs: Sequence[list[float]] | None = None,
    chat_template: str | None = None,
) -> tuple[list[int], list[int], list[float] | None]:
    """(response ids, loss mask, logprobs) of the messages behind a prompt.

    The policy is trained on an assistant's content and the end-of-sequence token that closes it (mask 1), not on the
    generation prompt before it, on what the template puts behind it, or on a user's message. `assistant_logprobs` holds
    a list per assistant message, one number per trained token. Text is encoded here, so the tokens may differ from
    those that were sampled: a generator that has the engine's ids should return those.
    """
    assert messages, "messages is empty: a response needs at least one"
    encode = _Encoder(tokenizer, chat_template)
    given = list(assistant_logprobs) if assistant_logprobs is not None else None
    num_replies = sum(message["role"] == "assistant" for message in messages)
    if given is not None and len(given) != num_replies:
        raise ValueError(f"{len(given)} lists of assistant_logprobs for {num_replies} assistant messages")
    ids: list[int] = []
    mask: list[int] = []
    logprobs: list[float] = []
    for message in messages:
        own, own_mask = encode.message(message)
        reply = given.pop(0) if given is not None and message["role"] == "assistant" else []
        if given is not None and len(reply) != sum(own_mask):
            raise ValueError(f"an assistant message has {sum(own_mask)} trained tokens but {len(reply)} logprobs")
        numbers = iter(reply)
        logprobs += [next(numbers) if bit and given is not None else 0.0 for bit in own_mask]
        ids += own
        mask += own_mask
    return ids, mask, None if given is None else logprobs


class _Encoder:
    """One message at a time, as the chat template writes it behind others."""

    def __init__(self, tokenizer: Any, chat_template: str | None) -> None:
        self.tokenizer, self.template = tokenizer, chat_template
        self.before = self._ids(_BEFORE, add_generation_prompt=False)
        self.generation_prompt = self._ids(_BEFORE, add_generation_prompt=True)[len(self.before) :]

    def message(self, message: dict[str, str]) -> tuple[list[int], list[int]]:
        """(ids, mask) of one message."""
        if message["role"] not in ("user", "assistant"):
            raise ValueError(f"a response holds user and assistant messages, not role {message['role']!r}")
        ids = self._ids([*_BEFORE, message], add_generation_prompt=False)[len(self.before) :]
        if message["role"] == "user":
            return ids, [0] * len(ids)
        start, eos = len(self.generation_prompt), self.tokenizer.eos_token_id
        if ids[:start] != self.generation_prompt:
            raise ValueError("the chat template does not begin an assistant's message with its generation prompt")
        end = len(ids) - ids[::-1].index(eos) if eos in ids[start:] else len(ids)
        return ids, [int(start <= i < end) for i in range(len(ids))]

    def _ids(self, messages: list[dict[str, str]], *, add_generation_prompt: bool) -> list[int]:
        extra = {} if self.template is None else {"chat_template": self.template}
        return self.tokenizer.apply_chat_template(
            messages, add_generation_prompt=add_generation_prompt, tokenize=True, return_dict=False, **extra
        )


def prepare_generator_input(
    prompts: Sequence[dict[str, Any]],
    n_samples_per_prompt: int,
    sampling_params: dict[str, Any],
    default_env_class: str,
    training_phase: TrainingPhase,
    global_step: int,
) -> tuple[GeneratorInput, list[str]]:
    """(input, uid of each episode) of prompts {prompt, env_class, env_extras, uid}, each repeated in a row."""
    episodes = [(prompt, i) for prompt in prompts for i in range(n_samples_per_prompt)]
    uids = [str(prompt["uid"]) for prompt, _ in episodes]
    return {
        "prompts": [prompt["prompt"] for prompt, _ in episodes],
        "env_classes": [prompt.get("env_class") or default_env_class for prompt, _ in episodes],
        "env_extras": [dict(prompt.get("env_extras") or {}) for prompt, _ in episodes],
        "sampling_params": sampling_params,
        "trajectory_ids": [TrajectoryID(uid, i) for uid, (_, i) in zip(uids, episodes, strict=True)],
        "batch_metadata": BatchMetadata(global_step, training_phase),
    }, uids


def get_rollout_metrics(
    responses: Sequence[Sequence[int]],
    rewards: Sequence[float] | Sequence[Sequence[float]],
    env_metrics: Sequence[dict[str, Any]] | None = None,
    env_classes: Sequence[str] | None = None,
) -> dict[str, float]:
    """`generate/` lengths of the responses, apart for paid and unpaid ones, and `environment/` means."""
    lengths = [float(len(response)) for response in responses]
    scores = [sum(reward) if isinstance(reward, Sequence) else reward for reward in rewards]
    mean = _mean(lengths)
    found = {
        "generate/min_num_tokens": min(lengths, default=0.0),
        "generate/max_num_tokens": max(lengths, default=0.0),
        "generate/avg_num_tokens": mean,
        "generate/std_num_tokens": math.sqrt(_mean([(length - mean) ** 2 for length in lengths])),
        "generate/avg_tokens_non_zero_rewards": _mean(
            [n for n, score in zip(lengths, scores, strict=True) if score > 0]
        ),
        "generate/avg_tokens_zero_rewards": _mean([n for n, score in zip(lengths, scores, strict=True) if score == 0]),
    }
    by_env: dict[str, list[dict[str, Any]]] = {}
    for env_class, metrics in zip(env_classes or (), env_metrics or (), strict=True):
        by_env.setdefault(env_class, []).append(metrics)
    for env_class, members in by_env.items():
        prefix = "environment" if len(by_env) == 1 else f"environment/{env_class}"
        found |= {f"{prefix}/{name}": value for name, value in aggregate_for_environment(env_class, members).items()}
    return found


def _mean(values: list[float]) -> float:
    return sum(values) / len(values) if values else 0.0
