"""The searchcode environment: a word problem, a search tool and a Python tool."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from skyrl_gym.envs.base_text_env import BaseTextEnv, BaseTextEnvStepOutput
from skyrl_gym.envs.extras import numeric_ground_truth, turn_limit
from skyrl_gym.envs.gsm8k.answer import final_answer
from skyrl_gym.episode_metrics import INVALID_ACTIONS
from skyrl_gym.reply import first_tagged, printable, up_to_first_close
from skyrl_gym.tools import PythonCodeExecutorToolGroup, SearchToolGroup
from skyrl_gym.tools.python_process import require_wall
from skyrl_gym.tools.search import search_text

_CALL = re.compile(r"<(\w{1,50})>")


class SearchCodeEnv(BaseTextEnv):
    """Turns of `<tool><python>code</python></tool>` or `<tool><search>query</search></tool>`, then `<solution>`.

    Pays 1.0 if the number after the last `####` in the model's own replies equals `reward_spec.ground_truth`, else 0.0.
    The episode ends with a solution or the last turn. Output of the tools is never scored.
    """

    @classmethod
    def check_machine(cls) -> None:
        require_wall()

    def __init__(self, env_config: Mapping[str, Any], extras: Mapping[str, Any]) -> None:
        super().__init__()
        self.max_turns = turn_limit(extras, default=2)
        self.truth = numeric_ground_truth(extras)
        settings = ("search_url", "topk", "timeout", "log_requests")
        search = SearchToolGroup(**{key: env_config[key] for key in settings if key in env_config})
        self.init_tool_groups([search, PythonCodeExecutorToolGroup()])
        self.written: list[str] = []  # by the model

    def step(self, action: str) -> BaseTextEnvStepOutput:
        self.turns += 1
        text = up_to_first_close(printable(action), "tool", "solution")
        self.written.append(text)
        solved = first_tagged(text, "solution") is not None
        name, tool_input = _tool_call(text)
        is_readable = solved or name in self.tool_to_toolgroup or final_answer(text) is not None
        self.num_invalid_actions += not is_readable
        if solved or self.turns >= self.max_turns:
            right = final_answer("\n".join(self.written)) == self.truth
            return BaseTextEnvStepOutput(
                observations=[], reward=1.0 if right else 0.0, done=True, metadata={}, truncated=not solved
            )
        return BaseTextEnvStepOutput(
            observations=[{"role": "user", "content": self._answer(name, tool_input)}],
            reward=0.0,
            done=False,
            metadata={"tool_group": self.tool_to_toolgroup.get(name), "tool_name": name, "tool_input": tool_input},
            truncated=False,
        )

    def _answer(self, name: str, tool_input: str) -> str:
        tools = ", ".join(sorted(self.tool_to_toolgroup))
        if not name:
            return (
                f"Your previous action is invalid. Call a tool ({tools}) with <tool><name>input</name></tool>, "
                "or answer with <solution>#### number</solution>."
            )
        if name not in self.tool_to_toolgroup:
            return f"There is no tool {name!r}. The tools are: {tools}."
        result = self._execute_tool(self.tool_to_toolgroup[name], name, [tool_input])
        return printable(search_text(result) if name == "search" else result)

    def get_metrics(self) -> dict[str, Any]:
        return {"steps": self.turns, INVALID_ACTIONS: self.num_invalid_actions}

    @classmethod
    def example_extras(cls) -> list[dict[str, Any]]:
        return [{"reward_spec": {"method": "rule", "ground_truth": "42"}}]

    def gold_actions(self) -> list[str]:
        calls = ["<tool><python>print(17 + 25)</python></tool>", "<tool><search>seventeen</search></tool>"]
        return [*calls[: self.max_turns - 1], f"<solution>#### {self.truth}</solution>"]


def _tool_call(text: str) -> tuple[str, str]:
    """Return (name, input) of `<tool><name>input</name></tool>`, or two empty strings."""
    call = (first_tagged(text, "tool") or "").strip()
    opening = _CALL.match(call)
    if opening is None or not call.endswith(closing := f"</{opening[1]}>"):
        return "", ""
    return opening[1], call[opening.end() : len(call) - len(closing)]
