"""An environment with a limit of its own decides when an episode ends, unless the row or the run sets one."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from typing import Any

import pytest
from loguru import logger

import skyrl_gym
from skyrl_gym.envs import register
from skyrl_gym.envs.base_text_env import BaseTextEnv, BaseTextEnvStepOutput
from skyrl_train.config import load_config
from skyrl_train.engine.base import SamplingParams
from skyrl_train.prompts import DataError, row_prompt
from skyrl_train.rollout.chat import ChatTemplate
from skyrl_train.rollout.collector import Collector
from skyrl_train.rollout.episode import EpisodeLimits
from skyrl_train.rollout.round import Round
from skyrl_train.types import EpisodeEnd, Prompt, Trajectory
from tests.fakes import ScriptedEngine
from tests.tiny_models import tiny_tokenizer

MESSAGES = [{"role": "user", "content": "go"}]


class Patient(BaseTextEnv):
    """Goes on for four turns, or for as many as it is told, in one of the three ways in which SkyRL's users read it."""

    def __init__(self, env_config: Any, extras: dict[str, Any]) -> None:
        super().__init__()
        self.max_turns = {
            "in": lambda: extras["max_turns"] if "max_turns" in extras else 4,  # noqa: SIM401 - as users write it
            "get": lambda: extras.get("max_turns", 4),
            "always": lambda: extras["max_turns"],
        }[extras["reads"]]()

    def step(self, action: str) -> BaseTextEnvStepOutput:
        self.turns += 1
        done = self.turns == self.max_turns
        return {"observations": [{"role": "user", "content": "on"}], "reward": 1.0, "done": done, "metadata": {}}


class Stubborn(Patient):
    """Never listens to a limit: done after four turns."""

    def __init__(self, env_config: Any, extras: dict[str, Any]) -> None:
        super().__init__(env_config, {"reads": "get"})


@pytest.fixture(autouse=True)
def _environments() -> Iterator[None]:
    register("patient", Patient)
    register("stubborn", Stubborn)
    yield
    skyrl_gym.envs.deregister("patient")
    skyrl_gym.envs.deregister("stubborn")


@pytest.fixture
def warnings() -> Iterator[list[str]]:
    said: list[str] = []
    sink = logger.add(lambda message: said.append(message.record["message"]), level="WARNING")
    yield said
    logger.remove(sink)


def limits(max_turns: int | None, max_input_length: int = 400) -> EpisodeLimits:
    return EpisodeLimits(max_turns, max_input_length, max_context=512, step_timeout_s=60, episode_timeout_s=300)


def play(rows: list[dict[str, Any]], of_run: EpisodeLimits, env: str = "patient", rounds: int = 1) -> list[Trajectory]:
    tokenizer = tiny_tokenizer()
    engine = ScriptedEngine(tokenizer, lambda request: "x")
    collector = Collector(engine, ChatTemplate(tokenizer), of_run, env_configs={}, max_retries=0)
    prompts = [Prompt(str(i), MESSAGES, env, row) for i, row in enumerate(rows)]

    async def collect() -> list[Trajectory]:
        for step in range(rounds):
            groups = await collector.collect(Round("train", step, prompts, 1, SamplingParams(max_tokens=4)))
        return [group.trajectories[0] for group in groups]

    try:
        return asyncio.run(collect())
    finally:
        collector.close()


def test_the_default_sets_no_limit():
    assert load_config([]).generator.max_turns is None


@pytest.mark.parametrize(("reads", "turns"), [("in", 4), ("get", 4), ("always", 1)])
def test_without_a_limit_the_environments_own_decides(reads, turns, warnings):
    (trajectory,) = play([{"reads": reads}], limits(None))
    assert (len(trajectory.turns), trajectory.end) == (turns, EpisodeEnd.FINISHED)
    assert warnings == []


@pytest.mark.parametrize("reads", ["in", "get", "always"])
def test_the_runs_limit_reaches_the_environment_and_the_rows_own_wins(reads):
    rows = [{"reads": reads}, {"reads": reads, "max_turns": 2}, {"reads": reads, "max_turns": None}]
    rows.append({"reads": reads, "max_turns": 2.0})  # as pandas writes a column with holes
    assert [len(trajectory.turns) for trajectory in play(rows, limits(3))] == [3, 2, 3, 2]


def test_a_run_that_cuts_says_so_once_with_the_share(warnings):
    rows = [{"max_turns": 2}, {"max_turns": 4}, {"max_turns": 9}, {}]
    played = play(rows, limits(3), env="stubborn", rounds=3)
    assert [len(trajectory.turns) for trajectory in played] == [2, 4, 4, 3]
    [said] = warnings
    assert said.startswith("2 of 4 episodes (50%) of this round were cut at the turn limit (generator.max_turns")


def test_a_history_that_grew_too_long_is_said_once_too(warnings):
    one_turn = len(ChatTemplate(tiny_tokenizer()).start(MESSAGES).ids)
    played = play([{}, {}], limits(None, max_input_length=one_turn), env="stubborn", rounds=2)
    assert [trajectory.end for trajectory in played] == [EpisodeEnd.OUT_OF_TOKENS] * 2
    [said] = warnings
    assert said.startswith(
        f"2 of 2 episodes (100%) of this round were cut because their history was longer than {one_turn}"
    )


@pytest.mark.parametrize("wrong", [0, -1, 2.5, "many", True, float("inf")])
def test_a_rows_limit_that_is_none_is_refused_with_its_place(wrong):
    with pytest.raises(DataError, match=r"row 7: max_turns.* must be (a whole number|at least 1)"):
        row_prompt("row 7", {"prompt": MESSAGES, "max_turns": wrong}, "patient")
