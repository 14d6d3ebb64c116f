"""A reward function of the user's pays the turns in the place of the environment."""

from __future__ import annotations

import asyncio
import functools
import time
from typing import Any

import pytest

from skyrl_train.engine.base import SamplingParams
from skyrl_train.rollout.chat import ChatTemplate
from skyrl_train.rollout.collector import Collector
from skyrl_train.rollout.episode import EpisodeLimits
from skyrl_train.rollout.reward import RewardFunction
from skyrl_train.rollout.rewards import Rewards
from skyrl_train.rollout.round import EveryEpisodeFailed, Round
from skyrl_train.types import Prompt
from tests.fakes import ScriptedEngine
from tests.tiny_models import tiny_tokenizer

ASKED = [{"role": "user", "content": "count"}]
COUNTDOWN = Prompt("0", ASKED, "tests.fakes:CountdownEnv", {"start": 3, "answer": "2"})


def play(function: Any, prompt: Prompt = COUNTDOWN, max_input_length: int = 400) -> Any:
    """Play one episode in which the policy says 2, 1, 0; returns its trajectory."""
    tokenizer = tiny_tokenizer()
    replies = iter("210")
    limits = EpisodeLimits(5, max_input_length, 512, step_timeout_s=60, episode_timeout_s=300)
    engine = ScriptedEngine(tokenizer, lambda _: next(replies))
    rewards = None if function is None else Rewards(alone=RewardFunction("m:f", function))
    collector = Collector(engine, ChatTemplate(tokenizer), limits, env_configs={}, rewards=rewards)
    try:
        [group] = asyncio.run(collector.collect(Round("train", 1, [prompt], 1, SamplingParams(max_tokens=20))))
    finally:
        collector.close()
    return group.trajectories[0]


def paid(trajectory: Any) -> list[float]:
    return [turn.reward for turn in trajectory.turns]


def test_the_function_pays_each_turn_and_sees_what_it_names():
    seen: list[Any] = []

    def score(reply, prompt, answer, row, turn, done, reward, observations, metadata):
        seen.append((reply, answer, row["start"], turn, done, reward, [m["content"] for m in observations], metadata))
        prompt.clear()
        row.clear()  # what one call does to them, no other sees
        return turn * 0.25

    assert paid(play(None)) == [1.0, 1.0, 1.0]  # what the environment pays
    assert paid(play(score)) == [0.25, 0.5, 0.75]
    assert seen == [
        ("2", "2", 3, 1, False, 1.0, ["2 left"], {}),
        ("1", "2", 3, 2, False, 1.0, ["1 left"], {}),
        ("0", "2", 3, 3, True, 1.0, [], {}),
    ]
    assert COUNTDOWN.env_extras == {"start": 3, "answer": "2"}


def test_an_async_function_is_awaited_and_a_bool_counts():
    async def judge(reply: str, **others: Any) -> bool:
        await asyncio.sleep(0)
        return reply == others["answer"]

    assert paid(play(judge)) == [1.0, 0.0, 0.0]


def test_an_episode_that_is_cut_short_pays_nothing_of_the_environments():
    # CountdownEnv.cut_short takes 0.25 where no tokens are left for another turn
    assert paid(play(None, max_input_length=30)) == [0.75]
    assert paid(play(lambda reply: 2.0, max_input_length=30)) == [2.0]


@pytest.mark.parametrize(
    ("function", "words"),
    [
        (lambda answer: answer["x"], r"environment.reward=m:f raised TypeError"),
        (lambda reply: "much", r"wrong answer of environment.reward=m:f: reward must be one finite float, not"),
        (lambda reply: float("nan"), r"environment.reward=m:f: reward must be a finite float"),
    ],
)
def test_a_function_that_fails_is_a_failure_and_no_reward(function, words):
    with pytest.raises(EveryEpisodeFailed, match=words):
        play(function)


class Scorer:
    def __call__(self, reply: str) -> float:
        return 2.0 * (reply == "2")

    async def later(self, reply: str) -> float:
        await asyncio.sleep(0)
        return self(reply)


class AsyncScorer:
    async def __call__(self, reply: str) -> float:
        await asyncio.sleep(0)
        return 2.0 * (reply == "2")


def scaled(scale: float, reply: str) -> float:
    return scale * (reply == "2")


@pytest.mark.parametrize(
    "function",
    [
        lambda reply: 2.0 * (reply == "2"),
        functools.partial(scaled, 2.0),
        Scorer(),
        Scorer().later,
        functools.partial(Scorer().later),
        AsyncScorer(),
    ],
)
def test_it_may_be_any_callable(function):
    RewardFunction("m:f", function).check([COUNTDOWN], within_s=60)
    assert paid(play(function)) == [2.0, 0.0, 0.0]


async def nobody(reply: str) -> float:
    return 0.0


def yields(reply: str) -> Any:
    yield 1.0


async def yields_async(reply: str) -> Any:
    yield 1.0


@pytest.mark.parametrize(
    ("function", "words"),
    [
        (lambda reply: nobody(reply), "not a coroutine, which nobody awaits: write `async def`"),
        (yields, "is a generator function; it must return its answer"),
        (yields_async, "is a generator function"),
        (Scorer, "reward must be one finite float, not .*Scorer"),
        (max, "environment.reward=m:f has no parameters that can be read"),
        (len, "takes obj by position; drop the / from it"),
    ],
)
def test_what_cannot_be_called_as_it_is_is_refused(function, words):
    with pytest.raises(ValueError, match=words):
        RewardFunction("m:f", function).check([COUNTDOWN], within_s=60)


def test_the_ground_truth_is_offered_by_name():
    row = {"start": 3, "reward_spec": {"method": "rule", "ground_truth": "1"}}
    prompt = Prompt("0", ASKED, "tests.fakes:CountdownEnv", row)
    assert paid(play(lambda reply, ground_truth: reply == ground_truth, prompt)) == [0.0, 1.0, 0.0]


def test_it_is_checked_before_a_model_is_loaded():
    def checked(function: Any, *rows: dict[str, Any], within_s: float = 60.0) -> None:
        prompts = [Prompt(str(i), ASKED, "single_turn", row) for i, row in enumerate(rows)]
        RewardFunction("m:f", function).check(prompts, within_s=within_s)

    row = {"answer": "42"}
    checked(lambda reply, answer: answer in reply, row)
    checked(lambda reply, hint=None: 0, row)
    checked(lambda metadata: metadata["observation"]["stdout"], row)  # only an environment knows
    with pytest.raises(ValueError, match=r"m:f needs answer, which prompt 1 lacks; offered are reply, .*question"):
        checked(lambda answer: 0, row, {"question": "?"})
    with pytest.raises(ValueError, match=r"fails on prompt 0 with the reply '': IndexError"):
        checked(lambda reply: float(reply.split()[0] == "4"), row)
    with pytest.raises(ValueError, match=r"with the reply 'I do not know.': .*reward must be one finite float"):
        checked(lambda reply: None, row)
    with pytest.raises(ValueError, match=r"took longer than 0.2 s"):
        checked(lambda reply: time.sleep(1), row, within_s=0.2)

    async def costs_money(reply: str) -> float:
        raise AssertionError("it was called")

    checked(costs_money, row)


@pytest.mark.parametrize(
    ("name", "words"),
    [
        (
            "tests.fakes:nothing",
            "environment.reward=tests.fakes:nothing cannot be imported: .*module tests.fakes has no nothing",
        ),
        ("tests.skyrl_train.rollout.test_reward:ASKED", "is of type list, and no function"),
        ("json.tool.nothing:f", "environment.reward=json.tool.nothing:f cannot be imported: .*there is no module"),
    ],
)
def test_what_is_no_function_is_refused(name, words):
    with pytest.raises(ValueError, match=words):
        RewardFunction.named(name)
