"""Trajectories made by hand, with the tiny byte-level tokenizer: one token per byte."""

from __future__ import annotations

from typing import Any

import skyrl_gym
from skyrl_gym.envs.base_text_env import BaseTextEnv
from skyrl_gym.envs.registration import registry
from skyrl_train.types import EpisodeEnd, Group, Prompt, Trajectory, Turn
from tests.fakes import varied_logprobs
from tests.tiny_models import tiny_tokenizer

TOKENIZER = tiny_tokenizer()


class PlainEnv(BaseTextEnv):
    """Registered as records_a and records_b: keys of both may be the same."""


for env_id in ("records_a", "records_b"):
    if env_id not in registry:
        skyrl_gym.register(id=env_id, entry_point=PlainEnv)


def ids(text: str) -> list[int]:
    return TOKENIZER.encode(text, add_special_tokens=False)


def prompt(uid: str = "0", source: str = "unknown", env_class: str = "records_a") -> Prompt:
    return Prompt(uid, [{"role": "user", "content": "say hi"}], env_class, {"data_source": source})


def trajectory(
    replies: list[str],
    rewards: list[float],
    *,
    of: Prompt | None = None,
    repetition: int = 0,
    end: EpisodeEnd = EpisodeEnd.FINISHED,
    question: str = "say hi>",
    observation: str = "[no]>",
    **fields: Any,
) -> Trajectory:
    """Every turn's prompt continues what came before: the question, the replies, the observation after each."""
    turns, history = [], ids(question)
    for i, (reply, reward) in enumerate(zip(replies, rewards, strict=True)):
        response = ids(reply)
        heard = [{"role": "user", "content": observation}] if i + 1 < len(replies) else []
        logprobs = varied_logprobs(response, before=len(history))
        turns.append(Turn(history, response, logprobs, reward, reply, "stop", 3, heard))
        history = history + response + ids(observation)
    of = of or prompt()
    return Trajectory(of, repetition, 11, of.messages, turns, end, **fields)


def group(*trajectories: Trajectory) -> Group:
    return Group(trajectories[0].prompt, list(trajectories))
