"""Environments that take no time but what their docstrings say, so that a benchmark measures the trainer."""

from __future__ import annotations

import time
from collections.abc import Mapping
from typing import Any

from skyrl_gym.envs.base_text_env import BaseTextEnv, BaseTextEnvStepOutput
from skyrl_gym.envs.registration import register, registry

ANSWER_S = 0.05


def share_of_vowels(text: str) -> float:
    """Return the share of vowels, a reward that differs between the samples of a group."""
    return sum(letter in "aeiou" for letter in text.lower()) / max(len(text), 1)


class VowelsEnv(BaseTextEnv):
    """Environment of one turn, which pays the reply's share of vowels."""

    def __init__(self, env_config: Mapping[str, Any], extras: Mapping[str, Any]) -> None:
        super().__init__()

    def step(self, action: str) -> BaseTextEnvStepOutput:
        return BaseTextEnvStepOutput(observations=[], reward=share_of_vowels(action), done=True, metadata={})


class PatientEnv(BaseTextEnv):
    """Environment that answers every turn with a message after 50 ms, until the turns run out."""

    def __init__(self, env_config: Mapping[str, Any], extras: Mapping[str, Any]) -> None:
        super().__init__()
        self.max_turns = int(extras["max_turns"])

    def step(self, action: str) -> BaseTextEnvStepOutput:
        time.sleep(ANSWER_S)
        self.turns += 1
        text = f"You are in room {self.turns} now. It has a door to the north and one to the east. Go on."
        over = self.turns >= self.max_turns
        return BaseTextEnvStepOutput(
            observations=[] if over else [{"role": "user", "content": text}], reward=0.0, done=over, metadata={}
        )


def register_environments() -> None:
    """Register the environments as benchmark_vowels and benchmark_patient, unless they are registered."""
    for name, environment in (("benchmark_vowels", VowelsEnv), ("benchmark_patient", PatientEnv)):
        if name not in registry:
            register(name, environment)
