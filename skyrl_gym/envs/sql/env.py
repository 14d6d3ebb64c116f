"""The text2sql environment: explore a database with queries, then submit the one that answers the question."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from skyrl_gym.core import EnvFailure
from skyrl_gym.envs.base_text_env import BaseTextEnv, BaseTextEnvStepOutput
from skyrl_gym.envs.extras import ground_truth, turn_limit
from skyrl_gym.episode_metrics import INVALID_ACTIONS
from skyrl_gym.reply import first_tagged, printable, up_to_first_close
from skyrl_gym.tools.sql import QueryError, SQLCodeExecutorToolGroup, database_path, query

_FOLDERS = {
    "synsql": "SynSQL-2.5M/databases",
    "spider": "spider/database",
    "bird": "bird/train/train_databases",
}  # of each data set, relative to db_path
_MAX_ROWS = 1_000_000  # of the ground truth's result


class SQLEnv(BaseTextEnv):
    """Turns of `<think>` and `<sql>`, at the end `<solution>`.

    Pays -1.0 if the form is broken (see `well_formed`); 1.0 if the solution returns the same rows, equally often but in
    any order, as `reward_spec.ground_truth`; else 0.0. Queries can only read.
    env_config: db_path, the folder of the databases. extras: db_id; data, one of synsql, spider, bird.
    """

    def __init__(self, env_config: Mapping[str, Any], extras: Mapping[str, Any]) -> None:
        super().__init__()
        if extras.get("data") not in _FOLDERS:
            raise ValueError(f"the row's data={extras.get('data')!r} must be one of {sorted(_FOLDERS)}")
        if extras.get("db_id") is None or not env_config.get("db_path"):
            raise ValueError("text2sql needs the row's db_id and environment.skyrl_gym.text2sql.db_path")
        self.max_turns = turn_limit(extras, default=5)
        self.truth = str(ground_truth(extras))
        self.db_id = str(extras["db_id"])
        self.db_path = str(Path(env_config["db_path"]) / _FOLDERS[extras["data"]])
        database_path(self.db_path, self.db_id)
        self.tool_group = SQLCodeExecutorToolGroup(db_file_path=self.db_path)
        self.init_tool_groups([self.tool_group])
        self.written: list[str] = []  # by the model

    def step(self, action: str) -> BaseTextEnvStepOutput:
        self.turns += 1
        text = up_to_first_close(printable(action), "sql", "solution")
        self.written.append(text)
        solution, sql = first_tagged(text, "solution"), first_tagged(text, "sql")
        self.num_invalid_actions += solution is None and sql is None
        if solution is not None or self.turns >= self.max_turns:
            return BaseTextEnvStepOutput(
                observations=[],
                reward=self._reward(solution),
                done=True,
                metadata={},
                truncated=solution is None,
            )
        tool_input = (self.db_id, sql, self.max_turns - self.turns)
        observation = self._execute_tool(self.tool_group.get_name(), "sql", tool_input)
        return BaseTextEnvStepOutput(
            observations=[{"role": "user", "content": observation}],
            reward=0.0,
            done=False,
            metadata={"tool_group": self.tool_group.get_name(), "tool_name": "sql", "tool_input": tool_input},
            truncated=False,
        )

    def _reward(self, solution: str | None) -> float:
        if solution is None or not well_formed(self.written):
            return -1.0
        database = database_path(self.db_path, self.db_id)
        try:
            truth = query(database, self.truth, timeout_s=30, max_rows=_MAX_ROWS)
        except QueryError as wrong:
            raise EnvFailure(f"the row's own query fails on {self.db_id}: {wrong}") from wrong
        try:
            rows = query(database, solution.strip(), max_rows=len(truth.rows) + 1)
        except QueryError:
            return 0.0
        same = len(rows.columns) == len(truth.columns) and Counter(rows.rows) == Counter(truth.rows)
        return 1.0 if same else 0.0

    def get_metrics(self) -> dict[str, Any]:
        return {"steps": self.turns, INVALID_ACTIONS: self.num_invalid_actions}

    @classmethod
    def example_extras(cls) -> list[dict[str, Any]]:
        """Return a row for spider/database/example/example.sqlite below db_path, with a table `pets(name, age)`."""
        return [{"db_id": "example", "data": "spider", "reward_spec": {"ground_truth": "SELECT name FROM pets"}}]

    def gold_actions(self) -> list[str]:
        look = "<think>What is there?</think><sql>SELECT * FROM sqlite_master</sql>"
        return [look] * (self.max_turns > 1) + [f"<think>So.</think><solution>{self.truth}</solution>"]


def well_formed(replies: list[str]) -> bool:
    """Return whether the replies hold one solution, without other tags in it, and thinking after every observation.

    The environment answers every reply but the last with an observation. An observation that the model makes up counts
    too.
    """
    text = "\n".join(replies)
    if text.count("<solution>") != 1 or text.count("</solution>") != 1 or first_tagged(text, "think") is None:
        return False
    solution = first_tagged(text, "solution") or ""
    if any(tag in solution for name in ("think", "sql", "observation") for tag in (f"<{name}>", f"</{name}>")):
        return False
    after_observations = [*replies[1:], *text.split("</observation>")[1:]]
    return all(after.lstrip().startswith("<think>") and "</think>" in after for after in after_observations)
