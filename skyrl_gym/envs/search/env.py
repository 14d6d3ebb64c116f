"""The search environment: answer a question after a few searches."""

from __future__ import annotations

import re
import string
from collections.abc import Mapping
from typing import Any

from skyrl_gym.envs.base_text_env import BaseTextEnv, BaseTextEnvStepOutput
from skyrl_gym.envs.extras import ground_truth, turn_limit
from skyrl_gym.episode_metrics import INVALID_ACTIONS
from skyrl_gym.reply import first_tagged, printable, up_to_first_close
from skyrl_gym.tools.search import SearchToolGroup, search_text

_INVALID = (
    "\nYour previous action is invalid. To search, write <search>query</search>. "
    "To answer, write <answer>answer</answer>.\n"
)
_ARTICLES = re.compile(r"\b(?:a|an|the)\b")
_NO_PUNCTUATION = str.maketrans("", "", string.punctuation)


def normalized(answer: str) -> str:
    """Return the answer in lower case, without punctuation, articles and extra spaces, as QA's exact match compares."""
    return " ".join(_ARTICLES.sub(" ", answer.lower().translate(_NO_PUNCTUATION)).split())


class SearchEnv(BaseTextEnv):
    """Pays 1.0 if the model's `<answer>` equals one of `reward_spec.ground_truth.target`, else 0.0.

    Retrieved passages are never scored. A reply is read up to its first `</search>` or `</answer>`. A search server
    that is down is an EnvFailure.
    env_config: search_url, topk, timeout, log_requests, as in SearchToolGroup.
    """

    def __init__(self, env_config: Mapping[str, Any], extras: Mapping[str, Any]) -> None:
        super().__init__()
        self.max_turns = turn_limit(extras, default=2)
        self.targets = [normalized(target) for target in _targets(ground_truth(extras))]
        self.gold = _targets(ground_truth(extras))[0]
        settings = ("search_url", "topk", "timeout", "log_requests")
        self.tool_group = SearchToolGroup(**{key: env_config[key] for key in settings if key in env_config})
        self.init_tool_groups([self.tool_group])
        self.num_searches = 0

    def step(self, action: str) -> BaseTextEnvStepOutput:
        self.turns += 1
        text = up_to_first_close(printable(action), "search", "answer")
        answer, query = first_tagged(text, "answer"), first_tagged(text, "search")
        self.num_invalid_actions += answer is None and query is None
        if answer is not None or self.turns >= self.max_turns:
            right = answer is not None and normalized(answer) in self.targets
            return BaseTextEnvStepOutput(
                observations=[],
                reward=1.0 if right else 0.0,
                done=True,
                metadata={},
                truncated=answer is None,
            )
        content = _INVALID if query is None else self._search(query)
        return BaseTextEnvStepOutput(
            observations=[{"role": "user", "content": content}],
            reward=0.0,
            done=False,
            metadata={"tool_group": self.tool_group.get_name(), "tool_name": "search", "tool_input": query},
            truncated=False,
        )

    def _search(self, query: str) -> str:
        self.num_searches += 1
        found = search_text(self._execute_tool(self.tool_group.get_name(), "search", [query]))
        return f"\n<information>{found}</information>\n"

    def get_metrics(self) -> dict[str, Any]:
        return {"searches": self.num_searches, INVALID_ACTIONS: self.num_invalid_actions}

    @classmethod
    def example_extras(cls) -> list[dict[str, Any]]:
        return [{"reward_spec": {"method": "rule", "ground_truth": {"target": ["The Seine", "River Seine"]}}}]

    def gold_actions(self) -> list[str]:
        return ["<search>river through Paris</search>"] * (self.max_turns > 1) + [f"<answer>{self.gold}</answer>"]


def _targets(truth: Any) -> list[str]:
    target = truth.get("target") if isinstance(truth, Mapping) else None
    targets = [target] if isinstance(target, str | int | float) else list(target if target is not None else ())
    if not targets:
        raise ValueError(f"reward_spec.ground_truth needs target, an answer or a list of answers; it is {truth!r}")
    return [str(answer) for answer in targets]
