"""GSM8K in one turn: a word problem, answered with a number after ####."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from skyrl_gym.envs.base_text_env import BaseTextEnv, BaseTextEnvStepOutput
from skyrl_gym.envs.extras import numeric_ground_truth
from skyrl_gym.envs.gsm8k.answer import final_answer
from skyrl_gym.episode_metrics import INVALID_ACTIONS


class GSM8kEnv(BaseTextEnv):
    """Pays 1.0 if the number after the last `####` equals `reward_spec.ground_truth`, else 0.0."""

    def __init__(self, env_config: Mapping[str, Any], extras: Mapping[str, Any]) -> None:
        super().__init__()
        self.truth = numeric_ground_truth(extras)

    def step(self, action: str) -> BaseTextEnvStepOutput:
        self.turns += 1
        answer = final_answer(action)
        self.num_invalid_actions += answer is None
        reward = 1.0 if answer == self.truth else 0.0
        return BaseTextEnvStepOutput(observations=[], reward=reward, done=True, metadata={}, truncated=False)

    def get_metrics(self) -> dict[str, Any]:
        return {INVALID_ACTIONS: self.num_invalid_actions}

    @classmethod
    def example_extras(cls) -> list[dict[str, Any]]:
        return [{"reward_spec": {"method": "rule", "ground_truth": truth}} for truth in ("72", "1,080", "-3.5")]

    def gold_actions(self) -> list[str]:
        return [f"It follows that\n#### {self.truth}"]
