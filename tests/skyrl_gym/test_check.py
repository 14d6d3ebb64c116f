"""check_env passes every registered environment, and fails environments that are broken in each way it looks for."""

import asyncio
import threading

import pytest

import skyrl_gym
from skyrl_gym import error
from skyrl_gym.check import check_env, example_extras
from skyrl_gym.core import EnvFailure
from skyrl_gym.envs.base_text_env import BaseTextEnv

BUILT_IN = sorted(skyrl_gym.registry)


@pytest.mark.parametrize("env_id", BUILT_IN)
def test_every_registered_environment_keeps_the_contract(env_id, env_configs):
    rows = example_extras(env_id)
    assert rows, "a built-in environment gives example rows"
    for extras in rows:
        report = check_env(env_id, extras=extras, env_config=env_configs.get(env_id))
        assert report.passed, str(report)
        assert "the gold actions earn max_reward" in [fact.name for fact in report.facts]


class Good(BaseTextEnv):
    """Says back what it heard; two turns."""

    def __init__(self, env_config, extras):
        super().__init__()
        self.max_turns = 2
        self.extras = extras

    def answer(self, action):
        return [{"role": "user", "content": action.encode("utf-8", "replace").decode()}]

    def step(self, action):
        self.turns += 1
        reward = 0.5 if action == "good" else 0.0
        return {"observations": self.answer(action), "reward": reward, "done": self.turns == 2, "metadata": {}}

    def gold_actions(self):
        return ["good", "good"]


class OnlyAsync(Good):
    async def step_async(self, action):
        await asyncio.sleep(0)
        return Good.step(self, action)

    def step(self, action):
        raise RuntimeError("use step_async")


class RefusesKeywords(Good):
    def __init__(self, config):
        super().__init__(config, {})


class EditsExtras(Good):
    def step(self, action):
        self.extras["seen"] = True
        return super().step(action)


class EditsPrompt(Good):
    def init(self, prompt):
        prompt.append({"role": "user", "content": "more"})
        return prompt, {}


class InitForgetsTheDict(Good):
    def init(self, prompt):
        return prompt


class NoRole(Good):
    def answer(self, action):
        return [{"content": "x"}]


class SpeaksSurrogates(Good):
    def answer(self, action):
        return [{"role": "user", "content": action}]


class Raises(Good):
    def step(self, action):
        if "\x00" in action:
            raise KeyError("nul")
        return super().step(action)


class Exits(Good):
    def step(self, action):
        raise SystemExit(2)


class RunsOutOfAnswers(Good):
    def step(self, action):
        return next(iter([]))


class ExitsOnTheLoop(OnlyAsync):
    async def step_async(self, action):
        raise SystemExit(2)


class NothingBack(Good):
    def step(self, action):
        pass


class BlamesTheServer(Good):
    def step(self, action):
        if action == "":
            raise EnvFailure("empty")
        return super().step(action)


class NanReward(Good):
    def step(self, action):
        return {**super().step(action), "reward": float("nan")}


class NoMetadata(Good):
    def step(self, action):
        return {"observations": [], "reward": 0.0, "done": True}


class TruncatedButNotDone(Good):
    def step(self, action):
        return {**super().step(action), "truncated": True}


class NeverEnds(Good):
    def step(self, action):
        return {**super().step(action), "done": False}


class ClosesOnce(Good):
    closed = False

    def close(self):
        if self.closed:
            raise RuntimeError("already closed")
        self.closed = True


class StrangeMetrics(Good):
    def get_metrics(self):
        return {"list": [1, 2]}


class Random(Good):
    count = 0

    def answer(self, action):
        Random.count += 1
        return [{"role": "user", "content": str(Random.count)}]


class UnpaidGold(Good):
    max_reward = 2.0


class UnknownBest(Good):
    max_reward = None  # ty: ignore[invalid-assignment]


class GoldOfNoTexts(Good):
    def gold_actions(self):
        return "good"


class AsyncStep(Good):
    async def step(self, action):  # ty: ignore[incompatible-method-override]
        return super().step(action)


class AsyncInit(Good):
    async def init(self, prompt):  # ty: ignore[incompatible-method-override]
        return prompt, {}


class AsyncMetrics(Good):
    async def get_metrics(self):  # ty: ignore[incompatible-method-override]
        return {}


class AsyncClose(Good):
    async def close(self):  # ty: ignore[incompatible-method-override]
        pass


class ManyTurns(Good):
    def __init__(self, env_config, extras):
        super().__init__(env_config, extras)
        self.max_turns = "many"


class Waits(Good):
    def step(self, action):
        threading.Event().wait()


class WaitsOnTheLoop(OnlyAsync):
    async def step_async(self, action):
        await asyncio.Event().wait()


class BlocksTheLoop(OnlyAsync):
    async def step_async(self, action):
        threading.Event().wait()


class WaitsToClose(Good):
    def close(self):
        threading.Event().wait()


class Endless(NeverEnds):
    def __init__(self, env_config, extras):
        super().__init__(env_config, extras)
        self.max_turns = 10**9


@pytest.mark.parametrize("kind", [Good, OnlyAsync])
def test_a_good_environment_passes(kind):
    report = check_env(kind, extras={})
    assert report.passed, str(report)
    assert len(report.facts) == 11
    assert str(report).startswith(f"{kind.__name__}: keeps the contract\nok   ")


@pytest.mark.parametrize(
    ("kind", "fact", "words"),
    [
        (RefusesKeywords, "makes a BaseTextEnv", "unexpected keyword argument"),
        (EditsExtras, "left as they were", "extras or env_config were edited"),
        (EditsPrompt, "left as they were", "init edits the prompt"),
        (InitForgetsTheDict, "init returns", "it returned"),
        (NoRole, "step returns", "needs role and content"),
        (SpeaksSurrogates, "step returns", "cannot be encoded"),
        (Raises, "no string raises", "KeyError"),
        (Exits, "no string raises", "SystemExit"),
        (RunsOutOfAnswers, "no string raises", "StopIteration"),
        (ExitsOnTheLoop, "no string raises", "SystemExit"),
        (NothingBack, "step returns", "it must return a dict"),
        (BlamesTheServer, "no string raises", "EnvFailure"),
        (NanReward, "step returns", "finite float, not nan"),
        (NoMetadata, "step returns", "metadata"),
        (TruncatedButNotDone, "step returns", "truncated without done"),
        (NeverEnds, "ends within max_turns", "not done after 3 turns"),
        (ClosesOnce, "close works", "already closed"),
        (StrangeMetrics, "get_metrics is", "get_metrics returned"),
        (Random, "same seed and actions", "and then"),
        (UnpaidGold, "gold actions", "earned 1.0, not 2.0"),
        (UnknownBest, "gold actions", 'earned 1.0, not "None"'),
        (GoldOfNoTexts, "gold actions", 'gold_actions returned "good", and not a list of texts'),
        (AsyncStep, "no string raises", "step is a coroutine function: define init_async, step_async"),
        (AsyncInit, "init returns", "init is a coroutine function"),
        (AsyncMetrics, "get_metrics is", "get_metrics is a coroutine function: define it without `async`"),
        (AsyncClose, "close works", "close is a coroutine function"),
        (ManyTurns, "ends within max_turns", 'its max_turns is "many"'),
    ],
)
def test_a_broken_environment_is_reported_in_words_and_nothing_raises(kind, fact, words):
    report = check_env(kind, extras={})
    assert not report.passed
    assert any(fact in failure.name and words in failure.words for failure in report.failures), str(report)
    assert f"FAIL {report.failures[0].name}" in str(report)


@pytest.mark.parametrize(
    ("kind", "fact", "words"),
    [
        (Waits, "no string raises", 'step("") took longer than 2 s: the check ended here'),
        (WaitsOnTheLoop, "no string raises", "took longer than 2 s"),
        (BlocksTheLoop, "no string raises", "took longer than 2 s"),
        (WaitsToClose, "close works", "close took longer than 2 s"),
        (Endless, "ends within max_turns", "turns and 2 s: the check ended here"),
    ],
)
def test_an_environment_that_does_not_answer_ends_the_check(kind, fact, words):
    report = check_env(kind, extras={}, limit_s=2)
    assert [failure.name for failure in report.failures if fact in failure.name and words in failure.words], str(report)


def test_a_row_without_a_limit_and_a_seed_has_the_usual_ones():
    assert check_env(Good, extras={"max_turns": None, "seed": None}, bad_actions=["x"]).passed


def test_an_environment_without_examples_has_none():
    skyrl_gym.envs.register("quiet", f"{__name__}:Good")
    try:
        assert example_extras("quiet") == []
    finally:
        skyrl_gym.envs.deregister("quiet")


def test_facts_that_could_not_be_looked_at_are_not_listed():
    report = check_env(RefusesKeywords, extras={})
    assert [fact.passed for fact in report.facts] == [False, False]


def test_only_misuse_raises():
    with pytest.raises(error.Error, match="no environment 'nope'"):
        check_env("nope", extras={})
    with pytest.raises(TypeError, match="extras must be a dict"):
        check_env(Good, extras=[])  # ty: ignore[invalid-argument-type]


async def test_it_also_works_where_an_event_loop_is_running():
    assert check_env(Good, extras={}, bad_actions=["x"]).passed
