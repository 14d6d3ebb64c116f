"""LiveCodeBench in one turn: write a program that passes hidden tests."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from skyrl_gym.envs.base_text_env import BaseTextEnv, BaseTextEnvStepOutput
from skyrl_gym.envs.extras import ground_truth
from skyrl_gym.envs.lcb.grading import ProgramTest, passes
from skyrl_gym.episode_metrics import INVALID_ACTIONS
from skyrl_gym.reply import last_fenced_code, printable
from skyrl_gym.tools.python_process import require_wall

_SECONDS_PER_TEST = 6.0


class LCBEnv(BaseTextEnv):
    """Pays 1.0 if the last fenced code block passes every test, else 0.0. NoWall: programs cannot be sandboxed here.

    `reward_spec.ground_truth`: the tests, as a list or as JSON (see ProgramTest.from_row).
    """

    @classmethod
    def check_machine(cls) -> None:
        require_wall()

    def __init__(self, env_config: Mapping[str, Any], extras: Mapping[str, Any]) -> None:
        super().__init__()
        require_wall()
        truth = ground_truth(extras)
        rows = json.loads(truth) if isinstance(truth, str) else truth
        self.tests = [ProgramTest.from_row(row) for row in rows]
        if not self.tests:
            raise ValueError("reward_spec.ground_truth holds no test: any program would pass")

    def step(self, action: str) -> BaseTextEnvStepOutput:
        self.turns += 1
        code = last_fenced_code(printable(action))
        self.num_invalid_actions += code is None
        right = code is not None and all(passes(code, test, timeout_s=_SECONDS_PER_TEST) for test in self.tests)
        return BaseTextEnvStepOutput(
            observations=[],
            reward=1.0 if right else 0.0,
            done=True,
            metadata={"parsed_code": code},
            truncated=False,
        )

    def get_metrics(self) -> dict[str, Any]:
        return {INVALID_ACTIONS: self.num_invalid_actions}

    @classmethod
    def example_extras(cls) -> list[dict[str, Any]]:
        tests = [{"input": "3\n", "output": "6\n", "testtype": "stdin"}]
        return [{"reward_spec": {"method": "rule", "ground_truth": json.dumps(tests)}}]

    def gold_actions(self) -> list[str] | None:
        """Return a solution for the tests of `example_extras`; None for other tests."""
        known = self.tests == [ProgramTest("3\n", "6\n", None)]
        return ["```python\nprint(2 * int(input()))\n```"] if known else None
