"""Any prompt with one reply. It pays nothing itself: the reward comes from `environment.reward`."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

from skyrl_gym.envs.base_text_env import BaseTextEnv, BaseTextEnvStepOutput


class SingleTurnEnv(BaseTextEnv):
    """One reply to one prompt. The row may have any columns."""

    max_reward: ClassVar[float] = 0.0

    def __init__(self, env_config: Mapping[str, Any], extras: Mapping[str, Any]) -> None:
        super().__init__()

    def step(self, action: str) -> BaseTextEnvStepOutput:
        self.turns += 1
        return BaseTextEnvStepOutput(observations=[], reward=0.0, done=True, metadata={}, truncated=False)

    @classmethod
    def example_extras(cls) -> list[dict[str, Any]]:
        return [{}, {"question": "What is 17 + 25?", "answer": "42"}]

    def gold_actions(self) -> list[str]:
        return [""]
