"""Several rewards by name: functions, the environment's own, their weights; what is refused and what fails."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest

from skyrl_gym.contract import WrongAnswer, checked_pay, checked_step
from skyrl_train.config import ConfigError, load_config
from skyrl_train.config.rewards import named_rewards
from skyrl_train.engine.base import SamplingParams
from skyrl_train.rollout.chat import ChatTemplate
from skyrl_train.rollout.collector import Collector
from skyrl_train.rollout.episode import EpisodeLimits
from skyrl_train.rollout.filters import zero_reward_on_non_stop
from skyrl_train.rollout.rewards import Rewards
from skyrl_train.rollout.round import EveryEpisodeFailed, Round
from skyrl_train.run.metrics import named_reward_metrics
from skyrl_train.types import EpisodeEnd, Prompt, Trajectory, Turn
from tests.fakes import CountdownEnv, ScriptedEngine
from tests.tiny_models import tiny_tokenizer

ASKED = [{"role": "user", "content": "count"}]
HERE = __name__


class ManyRewards(CountdownEnv):
    """Pays `right` for the right number and `short` for a reply of one letter, but never extras["leaves_out"]."""

    def __init__(self, env_config: Any, extras: dict[str, Any]) -> None:
        super().__init__(env_config, extras)
        self.extras = extras

    def step(self, action: str) -> Any:
        output = super().step(action)
        if "plain" in self.extras:
            return {**output, "reward": self.extras["plain"]}
        rewards = {"right": output["reward"], "short": 0.5 * (len(action) == 1), **self.extras.get("more", {})}
        return {**output, "reward": {k: v for k, v in rewards.items() if k != self.extras.get("leaves_out")}}

    def cut_short(self) -> Any:
        return {"right": -0.25}


class PaysAtTheEnd(CountdownEnv):
    """Pays a number in each turn, and `right` by name with the last one only."""

    def step(self, action: str) -> Any:
        output = super().step(action)
        return {**output, "reward": {"right": output["reward"]} if output["done"] else 0.0}

    def cut_short(self) -> Any:
        return 0.0


def twice(reply: str, reward: float) -> float:
    return 2.0 * reward + len(reply)


def brief(reply: str) -> float:
    return -float(len(reply))


def infinite(reply: str) -> float:
    return float("inf")


def play(rewards: dict[str, Any], env: str = f"{HERE}:ManyRewards", longest: int = 400, **row: Any) -> Trajectory:
    """Return the episode in which the policy says 2, 1, 0 to a countdown from 3."""
    tokenizer, replies = tiny_tokenizer(), iter(["2", "1 ", "0"])
    limits = EpisodeLimits(5, longest, 512, step_timeout_s=60, episode_timeout_s=300)
    engine = ScriptedEngine(tokenizer, lambda _: next(replies))
    prompt = Prompt("0", ASKED, env, {"start": 3, **row})
    found = Rewards.of(None, named_rewards(rewards))
    collector = Collector(engine, ChatTemplate(tokenizer), limits, env_configs={}, rewards=found, max_retries=0)
    try:
        [group] = asyncio.run(collector.collect(Round("train", 1, [prompt], 1, SamplingParams(max_tokens=20))))
    finally:
        collector.close()
    return group.trajectories[0]


def test_an_environment_may_pay_by_name_and_each_name_is_kept():
    trajectory = play({})
    assert [turn.reward for turn in trajectory.turns] == [1.5, 1.0, 1.5]
    assert [turn.rewards for turn in trajectory.turns] == [
        {"right": 1.0, "short": 0.5}, {"right": 1.0, "short": 0.0}, {"right": 1.0, "short": 0.5},
    ]  # fmt: skip
    assert trajectory.rewards == {"right": 3.0, "short": 1.0}


def test_the_configuration_weighs_what_an_environment_pays():
    trajectory = play({"right": 2, "short": -0.5})
    assert [turn.reward for turn in trajectory.turns] == [1.75, 2.0, 1.75]  # 2 * 1 - 0.5 * 0.5
    assert trajectory.rewards == {"right": 3.0, "short": 1.0}


def test_functions_and_the_environments_own_reward_add_up_with_their_weights():
    rewards = {
        "twice": {"function": f"{HERE}:twice", "weight": 0.5},
        "played": {"function": "environment", "weight": 10},
        "seen": {"function": f"{HERE}:brief", "weight": 0},
    }
    trajectory = play(rewards)
    # the environment pays 1.5, 1, 1.5 for 1, 2, 1 letters: twice is 4, 4, 4
    assert [turn.rewards for turn in trajectory.turns] == [
        {"twice": 4.0, "played": 1.5, "seen": -1.0},
        {"twice": 4.0, "played": 1.0, "seen": -2.0},
        {"twice": 4.0, "played": 1.5, "seen": -1.0},
    ]
    assert [turn.reward for turn in trajectory.turns] == [17.0, 12.0, 17.0]


def test_a_function_alone_replaces_the_environment_also_where_it_cuts_short():
    trajectory = play({"brief": f"{HERE}:brief"}, env="tests.fakes:CountdownEnv", longest=30)
    assert [turn.reward for turn in trajectory.turns] == [-1.0]
    assert trajectory.rewards == {"brief": -1.0}


def test_what_an_environment_takes_for_a_cut_goes_to_its_name_and_weight():
    trajectory = play({"right": 2, "short": 1}, longest=30)
    assert [(turn.reward, turn.rewards) for turn in trajectory.turns] == [(2.0, {"right": 0.75, "short": 0.5})]


def test_what_an_environment_pays_at_the_end_is_0_where_a_limit_cut_the_episode():
    trajectory = play({"right": 2}, env=f"{HERE}:PaysAtTheEnd", longest=30)
    assert (trajectory.end, trajectory.num_attempts, trajectory.reward) == (EpisodeEnd.OUT_OF_TOKENS, 1, 0.0)
    assert trajectory.rewards == {"right": 0.0}


@pytest.mark.parametrize(
    ("rewards", "row", "words"),
    [
        ({"right": 1}, {"plain": 0.5}, "it pays 0.5 without a name, and environment.rewards weighs right"),
        ({"right": 1, "short": 1}, {"leaves_out": "short"}, "it never paid short, which environment.rewards weighs"),
        ({"right": 1}, {}, "it pays short, which environment.rewards does not weigh; add it"),
        ({}, {"more": {"short": float("nan")}}, "reward short: reward must be a finite float, not nan"),
        ({}, {"more": {"short": "much"}}, "reward short: reward must be one finite float"),
        ({}, {"more": {"a b": 1.0}}, "a reward's name is a letter, then letters, digits"),
        ({"x": f"{HERE}:infinite"}, {}, "environment.rewards.x=.*infinite: reward must be a finite float, not inf"),
        ({"right": 1e6, "short": 0}, {"more": {"right": 1e6}}, "reward must lie within"),
    ],
)
def test_a_missing_or_unreadable_reward_is_a_failure_and_no_reward(rewards, row, words):
    with pytest.raises(EveryEpisodeFailed, match=words):
        play(rewards, **row)


def test_a_mapping_without_a_number_is_no_reward():
    assert checked_pay({"a": True, "b": 2}) == (3.0, {"a": 1.0, "b": 2.0})
    assert checked_step({"observations": [], "reward": 1, "done": True}).rewards == {}
    with pytest.raises(WrongAnswer, match="must name 1 to 32 rewards, not 0"):
        checked_pay({})


def test_an_episode_that_a_limit_cut_loses_its_named_rewards_too():
    turn = Turn([1], [2], [-0.5], 3.0, "x", "length", 0, rewards={"a": 3.0})
    episode = Trajectory(Prompt("0", ASKED, "e"), 0, 0, ASKED, [turn], EpisodeEnd.OUT_OF_TOKENS)
    assert zero_reward_on_non_stop(episode).rewards == {"a": 0.0}


def test_mean_and_spread_are_those_of_the_episodes_that_have_the_name():
    def episode(**rewards: float) -> Trajectory:
        turn = Turn([1], [2], [-0.5], 0.0, "x", "stop", 0, rewards=rewards)
        return Trajectory(Prompt("0", ASKED, "e"), 0, 0, ASKED, [turn], EpisodeEnd.FINISHED)

    # a: 1, 3, 5 -> mean 3, variance 8 / 3; b: 2 alone
    found = named_reward_metrics([episode(a=1, b=2), episode(a=3), episode(a=5)])
    assert found == pytest.approx(
        {"rewards/a/mean": 3.0, "rewards/a/std": (8 / 3) ** 0.5, "rewards/b/mean": 2.0, "rewards/b/std": 0.0}
    )


def test_the_command_line_and_yaml_say_the_same():
    config = load_config(
        [
            "environment.rewards.right=my_reward:right",
            "environment.rewards.brief={function: my_reward:brief, weight: 0.2}",
            "environment.rewards.good.function=judge",
            "environment.rewards.good.weight=2",
            "environment.rewards.good.base_url=http://127.0.0.1:8000/v1",
            "environment.rewards.good.model=m",
        ]
    )
    read = config.environment.named_rewards
    assert config.environment.env_class == "single_turn"
    assert config.environment.reward_weights == {"right": 1.0, "brief": 0.2, "good": 2.0}
    assert (read["right"].function, read["brief"].function) == ("my_reward:right", "my_reward:brief")
    assert read["good"].judge is not None
    assert read["good"].judge.model == "m"
    same = {"right": "my_reward:right", "brief": {"function": "my_reward:brief", "weight": 0.2}}
    assert named_rewards(same) == {name: read[name] for name in same}


@pytest.mark.parametrize(
    ("overrides", "words"),
    [
        (
            ["a={function: m:f, weight: heavy}"],
            "environment.rewards.a={.*} has weight=heavy, which is no finite number",
        ),
        (["a={function: m:f, weight: true}"], "has weight=True, which is no finite number"),
        (["a=.nan"], "environment.rewards.a=.*is no finite number|is no built-in|has function=.nan"),
        (["a={weight: 0.5}"], "has no function: my_module:my_function, environment or judge"),
        (["a=jugde"], "environment.rewards.a=jugde has function=jugde, which is no function"),
        (["a=my_reward.py"], "which is no function"),
        (["a={function: m:f, model: x}"], "has model, which is unknown beside function=m:f"),
        (["a=[1,2]"], "must be my_module:my_function"),
        (["a=0", "b={function: m:f, weight: 0}"], "environment.rewards all weigh 0"),
        (["a=environment", "b=1"], "environment.rewards.a=environment counts what the environment pays twice"),
        (["unnamed=m:f"], "must have a letter"),
        (["a={function: judge}"], "a judge needs base_url"),
        (["a={function: judge, base_url: ftp://x, model: m}"], "must begin with http"),
        (["a={function: judge, base_url: 'http://me:secret@x/v1', model: m}"], "may hold no user"),
        (
            ["a={function: judge, base_url: http://x, model: m, api_key_env: sk-12}"],
            "environment.rewards.a api_key_env",
        ),
        (["a={function: judge, base_url: http://x, model: m, body: {stream: true}}"], "body may not set stream"),
        (["a={function: judge, base_url: http://x, model: m, retries: many}"], "retries=many has the wrong type"),
    ],
)
def test_what_cannot_pay_is_refused_before_anything_is_loaded(overrides, words):
    with pytest.raises(ConfigError, match=words):
        load_config([f"environment.rewards.{override}" for override in overrides])


@pytest.mark.parametrize(
    ("overrides", "words"),
    [
        (["environment.reward=m:f", "environment.rewards.a=m:g"], "pays alone, so environment.rewards is never asked"),
        (
            ["generator.agent=a:b", "environment.rewards.a=m:g"],
            "environment.rewards.a is never called: generator.agent",
        ),
        (["environment.rewards.a=m:g", "trainer.algorithm.advantage_estimator=gdpo"], "and there is one; name more"),
        (
            ["trainer.algorithm.advantage_estimator=gdpo", "trainer.algorithm.zero_variance_filter=true"],
            "zero_variance_filter=true reads the sum of the rewards",
        ),
        (
            ["environment.rewards.a={function: judge, base_url: http://x, model: m}", "trainer.deterministic=true"],
            "environment.rewards.a asks a judge, whose answers no run can repeat",
        ),
    ],
)
def test_what_has_no_effect_beside_it_is_refused(overrides, words):
    with pytest.raises(ConfigError, match=words):
        load_config(overrides)


def test_a_name_that_is_no_function_is_told_with_its_key():
    with pytest.raises(ValueError, match=r"environment\.rewards\.a=tests.fakes:nothing cannot be imported: .*has no"):
        Rewards.of(None, named_rewards({"a": "tests.fakes:nothing"}))
