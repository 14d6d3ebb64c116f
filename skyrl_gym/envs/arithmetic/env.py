"""Arithmetic in one turn, such as "What is 17 + 25?"."""

from __future__ import annotations

from collections.abc import Mapping
from decimal import Decimal
from typing import Any

from skyrl_gym.envs.base_text_env import BaseTextEnv, BaseTextEnvStepOutput
from skyrl_gym.envs.extras import numeric_ground_truth
from skyrl_gym.episode_metrics import INVALID_ACTIONS
from skyrl_gym.reply import last_number, last_tagged


def score(reply: str, truth: Decimal) -> float:
    """Return the reward of a reply. It rises in steps, so that progress shows before the first right answer:

    1.0  the right number between the tags       "<answer>42</answer>", "<answer>17 + 25 = 42.0</answer>"
    0.3  the right number, but not between tags  "It is 42."
    0.1  a wrong number between the tags         "<answer>43</answer>"
    0.0  anything else

    The last pair of tags counts, and the last number in it; "1,042" and "42.0" are numbers.
    """
    given = answered_number(reply)
    if given is None:
        return 0.3 if last_tagged(reply, "answer") is None and last_number(reply) == truth else 0.0
    return 1.0 if given == truth else 0.1


def answered_number(reply: str) -> Decimal | None:
    """Return the last number between the last pair of tags, or None if there is none."""
    answer = last_tagged(reply, "answer")
    return None if answer is None else last_number(answer)


class ArithmeticEnv(BaseTextEnv):
    """One sum, difference or product. extras: `reward_spec.ground_truth`, a number; `rows` makes such rows."""

    def __init__(self, env_config: Mapping[str, Any], extras: Mapping[str, Any]) -> None:
        super().__init__()
        self.truth = numeric_ground_truth(extras)
        self.reward = 0.0

    def step(self, action: str) -> BaseTextEnvStepOutput:
        self.turns += 1
        self.reward = score(action, self.truth)
        self.num_invalid_actions += answered_number(action) is None
        return BaseTextEnvStepOutput(observations=[], reward=self.reward, done=True, metadata={}, truncated=False)

    def get_metrics(self) -> dict[str, Any]:
        return {"correct": self.reward == 1.0, INVALID_ACTIONS: self.num_invalid_actions}

    @classmethod
    def example_extras(cls) -> list[dict[str, Any]]:
        return [{"reward_spec": {"method": "rule", "ground_truth": truth}} for truth in ("42", "-7")]

    def gold_actions(self) -> list[str]:
        return [f"<answer>{self.truth}</answer>"]
