"""GSM8K with several attempts at one word problem."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from skyrl_gym.envs.base_text_env import BaseTextEnv, BaseTextEnvStepOutput
from skyrl_gym.envs.extras import numeric_ground_truth, turn_limit
from skyrl_gym.envs.gsm8k.answer import final_answer
from skyrl_gym.episode_metrics import INVALID_ACTIONS, default_aggregate_metrics

_THINK_ON = "Please think about it once more, step by step, and end with your answer in the form #### ANSWER."
_LAST_TURN = "This is your last turn. Write only your answer, in the form #### ANSWER."


class GSM8kMultiTurnEnv(BaseTextEnv):
    """Pays per turn: 1.0 for the right answer, which ends the episode; 0.2 / max_turns for another number; else 0.0."""

    def __init__(self, env_config: Mapping[str, Any], extras: Mapping[str, Any]) -> None:
        super().__init__()
        self.truth = numeric_ground_truth(extras)
        self.max_turns = turn_limit(extras, default=5)

    def step(self, action: str) -> BaseTextEnvStepOutput:
        self.turns += 1
        answer = final_answer(action)
        self.num_invalid_actions += answer is None
        right, last = answer == self.truth, self.turns >= self.max_turns
        formed = 0.0 if answer is None else 0.2 / self.max_turns
        ask = _LAST_TURN if self.turns == self.max_turns - 1 else _THINK_ON
        return BaseTextEnvStepOutput(
            observations=[] if right or last else [{"role": "user", "content": ask}],
            reward=1.0 if right else formed,
            done=right or last,
            metadata={},
            truncated=last and not right,
        )

    def get_metrics(self) -> dict[str, Any]:
        return {"steps": self.turns, INVALID_ACTIONS: self.num_invalid_actions}

    @staticmethod
    def aggregate_metrics(metrics: list[dict[str, Any]]) -> dict[str, Any]:
        return {f"avg_{key}": mean for key, mean in default_aggregate_metrics(metrics).items()}

    @classmethod
    def example_extras(cls) -> list[dict[str, Any]]:
        return [{"reward_spec": {"method": "rule", "ground_truth": "72"}}]

    def gold_actions(self) -> list[str]:
        return [f"It follows that\n#### {self.truth}"]
