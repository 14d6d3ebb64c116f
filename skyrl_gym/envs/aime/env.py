"""AIME in one turn: a competition problem, whose answer is right or wrong."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from skyrl_gym.envs.aime.answer import last_answer, normal_form
from skyrl_gym.envs.aime.value import same_value
from skyrl_gym.envs.base_text_env import BaseTextEnv, BaseTextEnvStepOutput
from skyrl_gym.envs.extras import ground_truth
from skyrl_gym.episode_metrics import INVALID_ACTIONS
from skyrl_gym.reply import printable


class AIMEEnv(BaseTextEnv):
    """Pays 1.0 if the text after the last "Answer:" equals the ground truth in value, else -1.0.

    extras: `reward_spec.ground_truth` or `reward_model.ground_truth`.
    """

    def __init__(self, env_config: Mapping[str, Any], extras: Mapping[str, Any]) -> None:
        super().__init__()
        self.truth = normal_form(str(ground_truth(extras)))

    def step(self, action: str) -> BaseTextEnvStepOutput:
        self.turns += 1
        answer = last_answer(printable(action))
        self.num_invalid_actions += answer is None
        prediction = None if answer is None else normal_form(answer)
        right = bool(prediction) and same_value(prediction, self.truth)
        return BaseTextEnvStepOutput(
            observations=[],
            reward=1.0 if right else -1.0,
            done=True,
            metadata={"acc": right, "pred": prediction},
            truncated=False,
        )

    def get_metrics(self) -> dict[str, Any]:
        return {INVALID_ACTIONS: self.num_invalid_actions}

    @classmethod
    def example_extras(cls) -> list[dict[str, Any]]:
        return [
            {"reward_model": {"ground_truth": "204"}},
            {"reward_spec": {"ground_truth": 33}},
            {"reward_spec": {"ground_truth": r"\frac12"}},
        ]

    def gold_actions(self) -> list[str]:
        return [f"Hence\nAnswer: {self.truth}"]
